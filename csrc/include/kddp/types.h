// Types that all operations share: element types, matrices, the status of a call.
#pragma once

#include <cstdint>

namespace kddp {

enum class ElementType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// Static, so that each instruction set has its own copy (cpu/simd.h).
static constexpr int64_t size_of(ElementType type) {
    return type == ElementType::float64 ? 8 : type == ElementType::float32 ? 4 : 2;
}

// A matrix with contiguous columns and rows `row_stride` elements apart. It is absent if data is null.
struct Matrix {
    const void* data;
    ElementType type;
    int64_t row_stride;
};

struct Status {
    enum Code { ok, label_out_of_range };
    Code code = ok;
    int64_t row = 0;    // of the invalid label
    int64_t value = 0;  // the invalid label
};

}  // namespace kddp

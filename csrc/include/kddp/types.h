// What every operation speaks of: element types, matrices, and how a call ended.
#pragma once

#include <cstdint>

namespace kddp {

enum class ElementType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// Static, for each instruction set is to have its own (cpu/vector.h).
static constexpr int64_t size_of(ElementType type) {
    return type == ElementType::float64 ? 8 : type == ElementType::float32 ? 4 : 2;
}

// A matrix whose rows lie `row_stride` elements apart and whose columns lie side by side. No data: absent.
struct Matrix {
    const void* data;
    ElementType type;
    int64_t row_stride;
};

struct Status {
    enum Code { ok, label_out_of_range };
    Code code = ok;
    int64_t row = 0;    // where it went wrong
    int64_t value = 0;  // what stood there
};

}  // namespace kddp

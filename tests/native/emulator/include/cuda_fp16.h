// Replaces CUDA's headers cuda_fp16.h and cuda_bf16.h: conversions of 16-bit floats, rounded to nearest, ties to even.
#pragma once

#include <algorithm>

#include "cuda_types.h"

namespace emulator {

// A format of 1 + exponent + mantissa = 16 bits, with IEEE 754's infinities. As in CUDA, every NaN becomes 0x7fff.
template <int exponent_bits, int mantissa_bits>
struct SmallFloat {
    static constexpr int bias = (1 << (exponent_bits - 1)) - 1;
    uint16_t bits;

    static SmallFloat from(float value) {
        if (value != value) return {0x7fff};
        const unsigned sign = std::signbit(value) ? 0x8000u : 0u;
        const double magnitude = std::fabs(double(value));
        if (magnitude == 0) return {uint16_t(sign)};
        if (magnitude >= std::ldexp(1.0, bias + 1))
            return {uint16_t(sign | ((1u << exponent_bits) - 1) << mantissa_bits)};
        int exponent = 0;
        std::frexp(magnitude, &exponent);
        // The distance to the neighbouring number, which is constant below the smallest normal number.
        const int step = std::max(exponent - 1, 1 - bias) - mantissa_bits;
        const auto steps = unsigned(std::nearbyint(std::ldexp(magnitude, -step)));
        // A carry out of the mantissa raises the exponent, up to infinity.
        return {uint16_t(sign | ((unsigned(step + mantissa_bits + bias - 1) << mantissa_bits) + steps))};
    }

    float to_float() const {
        const unsigned exponent = (bits & 0x7fffu) >> mantissa_bits, mantissa = bits & ((1u << mantissa_bits) - 1);
        double value;
        if (exponent == (1u << exponent_bits) - 1)
            value = mantissa ? NAN : HUGE_VAL;
        else if (exponent == 0)
            value = std::ldexp(double(mantissa), 1 - bias - mantissa_bits);
        else
            value = std::ldexp(double(mantissa | 1u << mantissa_bits), int(exponent) - bias - mantissa_bits);
        return float(bits & 0x8000u ? -value : value);
    }
};

}  // namespace emulator

using __half = emulator::SmallFloat<5, 10>;
using __nv_bfloat16 = emulator::SmallFloat<8, 7>;

inline __half __float2half_rn(float x) { return __half::from(x); }
inline float __half2float(__half x) { return x.to_float(); }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16::from(x); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }

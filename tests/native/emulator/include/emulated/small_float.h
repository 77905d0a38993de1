// Floating-point numbers of 16 bits: from and to wider ones, rounded to the nearest, ties to even.
#pragma once

#include "emulated/math_functions.h"

namespace emulator {

// Any format of 1 + exponent + mantissa = 16 bits with IEEE's infinities and NaNs; all NaNs become 0x7fff, as CUDA's
// do.
template <int exponent_bits, int mantissa_bits>
struct SmallFloat {
    static constexpr int bias = (1 << (exponent_bits - 1)) - 1;
    static constexpr unsigned infinity = ((1u << exponent_bits) - 1) << mantissa_bits;

    static uint16_t from(double value) {
        if (value != value) return 0x7fff;
        const unsigned sign = std::signbit(value) ? 0x8000u : 0u;
        const double magnitude = std::fabs(value);
        if (magnitude == 0) return uint16_t(sign);
        if (magnitude >= std::ldexp(1.0, bias + 1)) return uint16_t(sign | infinity);
        int exponent = 0;
        std::frexp(magnitude, &exponent);
        // The distance between neighbours here; below the least normal number it no longer shrinks.
        const int step = std::max(exponent - 1, 1 - bias) - mantissa_bits;
        const auto steps = unsigned(std::nearbyint(std::ldexp(magnitude, -step)));
        // A carry out of the mantissa raises the exponent, at the top to infinity.
        return uint16_t(sign | ((unsigned(step + mantissa_bits + bias - 1) << mantissa_bits) + steps));
    }

    static float to(uint16_t bits) {
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

    // a * b + c, rounded once: the product is exact in double, and a sum that is not gets an odd last bit, so that
    // rounding it again changes nothing.
    static uint16_t fused(float a, float b, float c) {
        const double product = double(a) * b, sum = product + c;
        const double taken = sum - product, error = (product - (sum - taken)) + (c - taken);
        auto bits = bits_as<uint64_t>(sum);
        if (error != 0 && std::isfinite(sum) && !(bits & 1)) (error > 0) == (sum > 0) ? ++bits : --bits;
        return from(bits_as<double>(bits));
    }
};

using Half = SmallFloat<5, 10>;
using Bfloat16 = SmallFloat<8, 7>;

}  // namespace emulator

// Arithmetic and comparisons as CUDA's headers have them: computed in float, which rounds as if done at once.
#define EMULATED_SMALL_FLOAT(T, T2, format)                                                        \
    struct alignas(2) T {                                                                          \
        uint16_t bits;                                                                             \
        T() = default;                                                                             \
        T(float value) : bits(format::from(double(value))) {}                                      \
        T(double value) : bits(format::from(value)) {}                                             \
        T(int value) : bits(format::from(double(value))) {}                                        \
        operator float() const { return format::to(bits); }                                        \
        explicit operator bool() const { return (bits & 0x7fff) != 0; }                            \
    };                                                                                             \
    struct alignas(4) T2 {                                                                         \
        T x, y;                                                                                    \
    };                                                                                             \
    inline T operator+(T a, T b) { return T(float(a) + float(b)); }                                \
    inline T operator-(T a, T b) { return T(float(a) - float(b)); }                                \
    inline T operator*(T a, T b) { return T(float(a) * float(b)); }                                \
    inline T operator/(T a, T b) { return T(float(a) / float(b)); }                                \
    inline T operator-(T a) {                                                                      \
        a.bits ^= 0x8000;                                                                          \
        return a;                                                                                  \
    }                                                                                              \
    inline T& operator+=(T& a, T b) { return a = a + b; }                                          \
    inline T& operator-=(T& a, T b) { return a = a - b; }                                          \
    inline T& operator*=(T& a, T b) { return a = a * b; }                                          \
    inline T& operator/=(T& a, T b) { return a = a / b; }                                          \
    inline bool operator==(T a, T b) { return float(a) == float(b); }                              \
    inline bool operator!=(T a, T b) { return float(a) != float(b); }                              \
    inline bool operator<(T a, T b) { return float(a) < float(b); }                                \
    inline bool operator>(T a, T b) { return float(a) > float(b); }                                \
    inline bool operator<=(T a, T b) { return float(a) <= float(b); }                              \
    inline bool operator>=(T a, T b) { return float(a) >= float(b); }                              \
    inline T __hadd(T a, T b) { return a + b; }                                                    \
    inline T __hsub(T a, T b) { return a - b; }                                                    \
    inline T __hmul(T a, T b) { return a * b; }                                                    \
    inline T __hdiv(T a, T b) { return a / b; }                                                    \
    inline T __hneg(T a) { return -a; }                                                            \
    inline T __habs(T a) {                                                                         \
        a.bits &= 0x7fff;                                                                          \
        return a;                                                                                  \
    }                                                                                              \
    inline T __hfma(T a, T b, T c) {                                                               \
        a.bits = format::fused(a, b, c);                                                           \
        return a;                                                                                  \
    }                                                                                              \
    inline T __hmax(T a, T b) { return T(std::fmax(float(a), float(b))); }                         \
    inline T __hmin(T a, T b) { return T(std::fmin(float(a), float(b))); }                         \
    inline bool __heq(T a, T b) { return a == b; }                                                 \
    inline bool __hlt(T a, T b) { return a < b; }                                                  \
    inline bool __hgt(T a, T b) { return a > b; }                                                  \
    inline bool __hisnan(T a) { return std::isnan(float(a)); }                                     \
    inline int __hisinf(T a) { return std::isinf(float(a)) ? (a.bits & 0x8000 ? -1 : 1) : 0; }     \
    inline T2 __hadd2(T2 a, T2 b) { return {a.x + b.x, a.y + b.y}; }                               \
    inline T2 __hsub2(T2 a, T2 b) { return {a.x - b.x, a.y - b.y}; }                               \
    inline T2 __hmul2(T2 a, T2 b) { return {a.x * b.x, a.y * b.y}; }                               \
    inline T2 __hfma2(T2 a, T2 b, T2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; } \
    inline T2 __hmax2(T2 a, T2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }                 \
    inline float __low2float(T2 a) { return a.x; }                                                 \
    inline float __high2float(T2 a) { return a.y; }

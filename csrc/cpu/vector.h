// Vectors of the widest kind that this translation unit is compiled for, and the few functions that they
// lack.
//
// Everything here has internal linkage: each instruction set compiles its own copy, so that the linker can
// never hand the code of one to another.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define KDDP_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define KDDP_VECTOR_BYTES 32
#else
#define KDDP_VECTOR_BYTES 16
#endif

namespace kddp {
namespace {

template <class T>
struct VectorTraits;

template <>
struct VectorTraits<float> {
    using Bits = uint32_t;
    static constexpr int exponent_bias = 127, mantissa_bits = 23;
    static constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    static constexpr float lowest_exponent = -126.0f;
    // Minimax of 2^f in relative error on [-1/2, 1/2], own fit: 1.9e-9.
    static constexpr float exp2_coefficients[] = {1.0f,           0.693147205739f,  0.240226468907f, 0.0555032877362f,
                                                  0.00961848894f, 0.0013399932578f, 0.000153458194f};
};

template <>
struct VectorTraits<double> {
    using Bits = uint64_t;
    static constexpr int exponent_bias = 1023, mantissa_bits = 52;
    static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double lowest_exponent = -1022.0;
    // As above: 3.1e-18.
    static constexpr double exp2_coefficients[] = {1.0,
                                                   0.69314718055994533046,
                                                   0.24022650695910156211,
                                                   0.055504108664819921316,
                                                   0.0096181291075883325056,
                                                   0.0013333558146789983452,
                                                   0.00015403530462518032455,
                                                   0.000015252733489936729404,
                                                   1.3215433087767392654e-6,
                                                   1.0178198039851680892e-7,
                                                   7.0741059624137121565e-9,
                                                   4.4352804976168588762e-10};
};

template <class T, int bytes = KDDP_VECTOR_BYTES>
struct VectorOf {
    typedef T Type __attribute__((vector_size(bytes)));
};

template <class T>
using Vector = typename VectorOf<T>::Type;

template <class T>
using BitsVector = Vector<typename VectorTraits<T>::Bits>;

template <class T>
constexpr int lanes = KDDP_VECTOR_BYTES / sizeof(T);

template <class T>
constexpr int64_t round_up_to_lanes(int64_t n) {
    return (n + lanes<T> - 1) / lanes<T> * lanes<T>;
}

template <class T>
constexpr T infinity = std::numeric_limits<T>::infinity();

template <class T>
inline Vector<T> broadcast(T value) {
    return value - Vector<T>{};
}

template <class T>
inline Vector<T> load(const T* from) {
    Vector<T> v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class T>
inline void store(T* to, Vector<T> v) {
    std::memcpy(to, &v, sizeof v);
}

template <class T>
inline Vector<T> maximum(Vector<T> a, Vector<T> b) {
    return a > b ? a : b;
}

template <class T>
inline Vector<T> absolute(Vector<T> v) {
    constexpr auto all_but_sign = std::numeric_limits<typename VectorTraits<T>::Bits>::max() >> 1;
    return (Vector<T>)((BitsVector<T>)v & all_but_sign);
}

// Reductions fold a vector in halves, down to one lane.

template <class T, int bytes = KDDP_VECTOR_BYTES>
inline T sum_of_lanes(typename VectorOf<T, bytes>::Type v) {
    if constexpr (bytes == 2 * sizeof(T)) {
        return v[0] + v[1];
    } else {
        typename VectorOf<T, bytes / 2>::Type half[2];
        std::memcpy(half, &v, sizeof v);
        return sum_of_lanes<T, bytes / 2>(half[0] + half[1]);
    }
}

template <class T, int bytes = KDDP_VECTOR_BYTES>
inline T maximum_of_lanes(typename VectorOf<T, bytes>::Type v) {
    if constexpr (bytes == 2 * sizeof(T)) {
        return v[0] > v[1] ? v[0] : v[1];
    } else {
        typename VectorOf<T, bytes / 2>::Type half[2];
        std::memcpy(half, &v, sizeof v);
        return maximum_of_lanes<T, bytes / 2>(half[0] > half[1] ? half[0] : half[1]);
    }
}

#if defined(__AVX512F__)
inline Vector<float> nearest_integer(Vector<float> x) {
    return (Vector<float>)_mm512_maskz_roundscale_ps(0xffff, (__m512)x, 0);
}

inline Vector<double> nearest_integer(Vector<double> x) {
    return (Vector<double>)_mm512_maskz_roundscale_pd(0xff, (__m512d)x, 0);
}

inline Vector<float> times_power_of_two(Vector<float> x, Vector<float> n) {
    return (Vector<float>)_mm512_maskz_scalef_ps(0xffff, (__m512)x, (__m512)n);
}

inline Vector<double> times_power_of_two(Vector<double> x, Vector<double> n) {
    return (Vector<double>)_mm512_maskz_scalef_pd(0xff, (__m512d)x, (__m512d)n);
}
#else
template <class V>
inline V nearest_integer(V x) {
    using Traits = VectorTraits<std::remove_reference_t<decltype(x[0])> >;
    return (x + Traits::round_magic) - Traits::round_magic;
}

// For integers n that are exponents of normal numbers: the low bits of n + round_magic, moved to the exponent.
template <class V>
inline V times_power_of_two(V x, V n) {
    using T = std::remove_reference_t<decltype(x[0])>;
    using Traits = VectorTraits<T>;
    const BitsVector<T> exponent = ((BitsVector<T>)(n + Traits::round_magic) << Traits::mantissa_bits) +
                                   ((typename Traits::Bits)Traits::exponent_bias << Traits::mantissa_bits);
    return x * (V)exponent;
}
#endif

// 2^x for x <= 0, -inf and NaN included; 0 where the result would be subnormal. 2^n * 2^f with f = x - n.
template <class T>
inline Vector<T> exp2_of_nonpositive(Vector<T> x) {
    using Traits = VectorTraits<T>;
    const Vector<T> n = nearest_integer(x);
    const Vector<T> f = x - n;
    constexpr int degree = sizeof(Traits::exp2_coefficients) / sizeof(T) - 1;
    Vector<T> polynomial = broadcast<T>(Traits::exp2_coefficients[degree]);
    for (int i = degree - 1; i >= 0; --i) polynomial = polynomial * f + Traits::exp2_coefficients[i];
    const Vector<T> result = times_power_of_two(polynomial, n);
    return x < Traits::lowest_exponent ? Vector<T>{} : result;
}

// The two halves of a vector in double precision (of doubles: the vector itself, and zeros).
inline void widen(Vector<double> v, Vector<double>& low, Vector<double>& high) {
    low = v;
    high = Vector<double>{};
}

inline void widen(Vector<float> v, Vector<double>& low, Vector<double>& high) {
    typedef VectorOf<float, KDDP_VECTOR_BYTES / 2>::Type Half;
    Half half[2];
    std::memcpy(half, &v, sizeof v);
    low = __builtin_convertvector(half[0], Vector<double>);
    high = __builtin_convertvector(half[1], Vector<double>);
}

}  // namespace
}  // namespace kddp

// Vectors of the widest kind that this translation unit is compiled for, and the few functions that they
// lack.
//
// Everything here has internal linkage: each instruction set compiles its own copy, so that the linker can
// never hand the code of one to another.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

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
    static constexpr float ln2_high = 0.693145751953125f, ln2_low = 1.42860682030941723e-6f;
    static constexpr float exp_underflow = -87.0f;
    // Minimax in relative error on [-ln(2)/2, ln(2)/2], own fit: 1.9e-9.
    static constexpr float exp_coefficients[] = {1.0f,           1.0000000363f,   0.49999992075f, 0.16666420072f,
                                                 0.04166822619f, 0.008374824031f, 0.00138368357f};
};

template <>
struct VectorTraits<double> {
    using Bits = uint64_t;
    static constexpr int exponent_bias = 1023, mantissa_bits = 52;
    static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
    static constexpr double exp_underflow = -708.0;
    // As above: 3.1e-18.
    static constexpr double exp_coefficients[] = {1.0,
                                                  1.0000000000000000304,
                                                  0.50000000000000177031,
                                                  0.16666666666666168204,
                                                  0.041666666666492629684,
                                                  0.008333333333559433932,
                                                  0.0013888888951261041615,
                                                  0.00019841269432470488344,
                                                  0.000024801486481436400871,
                                                  2.755762262047198039e-6,
                                                  2.7632308174894485818e-7,
                                                  2.4994303273814395124e-8};
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

// e^x for x <= 0, -inf and NaN included; 0 where the result would be subnormal. 2^n * e^r with r = x - n
// ln(2).
template <class T>
inline Vector<T> exp_of_nonpositive(Vector<T> x) {
    using Traits = VectorTraits<T>;
    constexpr T log2_e = T(1.44269504088896340736);
    const Vector<T> shifted = x * log2_e + Traits::round_magic;
    const Vector<T> n = shifted - Traits::round_magic;
    const Vector<T> r = (x - n * Traits::ln2_high) - n * Traits::ln2_low;
    constexpr int degree = sizeof(Traits::exp_coefficients) / sizeof(T) - 1;
    Vector<T> polynomial = broadcast<T>(Traits::exp_coefficients[degree]);
    for (int i = degree - 1; i >= 0; --i) polynomial = polynomial * r + Traits::exp_coefficients[i];
    // The low bits of `shifted` hold n: moved to the exponent they are 2^n.
    const BitsVector<T> exponent = ((BitsVector<T>)shifted << Traits::mantissa_bits) +
                                   ((typename Traits::Bits)Traits::exponent_bias << Traits::mantissa_bits);
    const Vector<T> result = polynomial * (Vector<T>)exponent;
    return x < Traits::exp_underflow ? Vector<T>{} : result;
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

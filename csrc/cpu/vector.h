// Vectors of the widest kind that this translation unit is compiled for, and the few functions that they
// lack.
//
// Everything here has internal linkage: each instruction set compiles its own copy, so that the linker can
// never hand the code of one to another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define KDDP_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define KDDP_VECTOR_BYTES 32
#else
#define KDDP_VECTOR_BYTES 16
#endif

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define KDDP_HAS_SHUFFLEVECTOR 1
#endif
#endif

// What a loop is made of has to be in it, lambdas included.
#define KDDP_ALWAYS_INLINE __attribute__((always_inline))

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
    // Minimax of 2^f in relative error on [-1/2, 1/2] with 2^0 = 1, own fit: 1.1e-7.
    static constexpr float exp2_coefficients[] = {1.0f,           0.6931469774f,   0.2402224214f,
                                                  0.05550734123f, 0.009671510928f, 0.001326460177f};
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
    typedef T Type __attribute__((vector_size(bytes)));  // NOLINT(modernize-use-using): takes no such attribute
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

// Asks for a line of memory that is read soon, as far as the second-level cache: more can be under way to there than to
// the first. Any address will do.
inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

// Writes a vector past the caches, for what is not read again soon; `to` is aligned to `bytes`.
template <int bytes>
inline void stream(void* to, const void* from) {
#if defined(__AVX512F__)
    if constexpr (bytes == 64) return _mm512_stream_si512((__m512i*)to, _mm512_loadu_si512(from));
#endif
#if defined(__AVX2__)
    if constexpr (bytes == 32) return _mm256_stream_si256((__m256i*)to, _mm256_loadu_si256((const __m256i*)from));
#endif
#if defined(__SSE2__)
    if constexpr (bytes == 16) return _mm_stream_si128((__m128i*)to, _mm_loadu_si128((const __m128i*)from));
#endif
    std::memcpy(to, from, bytes);
}

// Before another thread reads what this one has streamed.
inline void finish_streams() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
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

// Sums vectors in double.
template <class T>
struct DoubleSum {
    Vector<double> sum{};

    DoubleSum& operator+=(Vector<T> v) {
        if constexpr (sizeof(T) == sizeof(double)) {
            sum += v;
        } else {
            typename VectorOf<T, KDDP_VECTOR_BYTES / 2>::Type half[2];
            std::memcpy(half, &v, sizeof v);
            sum += __builtin_convertvector(half[0], Vector<double>) + __builtin_convertvector(half[1], Vector<double>);
        }
        return *this;
    }
    double of_lanes() const { return sum_of_lanes<double>(sum); }
};

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

// 2^(x * factor), not above 1; NaN stays NaN, and what would be subnormal is 0. With n the integer next to
// x * factor it is 2^n * 2^f.
template <class T>
inline Vector<T> exp2_of_product(Vector<T> x, T factor) {
    using Traits = VectorTraits<T>;
    const Vector<T> exponent = x * factor;
    const Vector<T> n = nearest_integer(exponent);
    const Vector<T> f = exponent - n;
    constexpr int degree = sizeof(Traits::exp2_coefficients) / sizeof(T) - 1;
    Vector<T> polynomial = broadcast<T>(Traits::exp2_coefficients[degree]);
    for (int i = degree - 1; i >= 0; --i) polynomial = polynomial * f + Traits::exp2_coefficients[i];
    const Vector<T> result = times_power_of_two(polynomial, n);
    return exponent < Traits::lowest_exponent ? Vector<T>{} : result;
}

#if defined(__AVX512F__)
// The same in fewer operations: 2^(n/32) from a table that two registers hold, so that f is at most 1/64. Entry k is
// the bits of 2^(k/32) less k << 18: added to n << 18, they are those of 2^(n/32). Own fit: 5.4e-8.
alignas(64) constexpr uint32_t exp2_table[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};

// 2^(x * factor - shift), of a shift that is a multiple of 1/32 and far below `magic`: the difference costs nothing. An
// exponent of -127 or less has the bits of 0.
inline Vector<float> exp2_of_shifted(Vector<float> x, float factor, float shift) {
    const __m512 lowest = _mm512_set1_ps((shift - 127) / factor);
    const __m512 bounded = _mm512_maskz_max_ps(0xffff, lowest, (__m512)x);  // NaN stays NaN
    const __m512 magic = _mm512_set1_ps(393216 - shift);                    // 1.5 * 2^18: rounds to multiples of 1/32
    const __m512 shifted = _mm512_fmadd_ps(bounded, _mm512_set1_ps(factor), magic);
    const __m512 n = _mm512_sub_ps(shifted, magic);
    const __m512 f = _mm512_fmsub_ps(bounded, _mm512_set1_ps(factor), n);
    const __m512i bits = _mm512_castps_si512(shifted);
    const __m512i fraction =
        _mm512_permutex2var_epi32(_mm512_load_si512(exp2_table), bits, _mm512_load_si512(exp2_table + 16));
    const __m512i power = _mm512_add_epi32(fraction, _mm512_maskz_slli_epi32(0xffff, bits, 18));
    const __m512 slope = _mm512_fmadd_ps(f, _mm512_set1_ps(0.2402265038f), _mm512_set1_ps(0.6931573343f));
    const __m512 scale = _mm512_castsi512_ps(power);
    return (Vector<float>)_mm512_fmadd_ps(scale, _mm512_mul_ps(f, slope), scale);
}

template <>
inline Vector<float> exp2_of_product<float>(Vector<float> x, float factor) {
    return exp2_of_shifted(x, factor, 0);
}

template <class T>
constexpr bool has_exp2_of_shifted = sizeof(T) == 4;
#else
template <class T>
constexpr bool has_exp2_of_shifted = false;

template <class T>
Vector<T> exp2_of_shifted(Vector<T> x, T factor, T shift);  // not of this instruction set
#endif

constexpr double exp2_shift_unit = 1.0 / 32;

// log2 of a positive normal number. float: the exponent, and a polynomial in m - 1 with m from 3/4 to 3/2.
inline Vector<double> log2_of_positive(Vector<double> x) {
    for (int i = 0; i < lanes<double>; ++i) x[i] = std::log2(x[i]);
    return x;
}

inline Vector<float> log2_of_positive(Vector<float> x) {
    constexpr uint32_t three_quarters = 0x3f400000;
    const BitsVector<float> exponent = ((BitsVector<float>)x - three_quarters) & 0xff800000u;
    const Vector<float> f = (Vector<float>)((BitsVector<float>)x - exponent) - 1.0f;
    const Vector<float> n = __builtin_convertvector((VectorOf<int32_t>::Type)exponent >> 23, Vector<float>);
    // Of log2(1 + f) / f, own fit: 3.6e-8.
    constexpr float coefficients[] = {1.442695032f,   -0.7213484794f, 0.4809020856f,  -0.3605758797f, 0.2881913158f,
                                      -0.2427238251f, 0.2163268254f,  -0.1742320295f, 0.07806642968f};
    constexpr int degree = sizeof(coefficients) / sizeof(float) - 1;
    Vector<float> polynomial = broadcast<float>(coefficients[degree]);
    for (int i = degree - 1; i >= 0; --i) polynomial = polynomial * f + coefficients[i];
    return polynomial * f + n;
}

// The two halves of a vector in double precision (of doubles: the vector itself, and zeros).
inline void widen(Vector<double> v, Vector<double>& low, Vector<double>& high) {
    low = v;
    high = Vector<double>{};
}

// GCC makes four instructions of a conversion to 64 bytes, and takes a vector apart through memory.
inline void widen(Vector<float> v, Vector<double>& low, Vector<double>& high) {
    VectorOf<float, KDDP_VECTOR_BYTES / 2>::Type half[2];
#if defined(__AVX512F__) && KDDP_HAS_SHUFFLEVECTOR
    half[0] = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
    half[1] = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    std::memcpy(half, &v, sizeof v);
#endif
#if defined(__AVX512F__)
    low = (Vector<double>)_mm512_maskz_cvtps_pd(0xff, (__m256)half[0]);
    high = (Vector<double>)_mm512_maskz_cvtps_pd(0xff, (__m256)half[1]);
#else
    low = __builtin_convertvector(half[0], Vector<double>);
    high = __builtin_convertvector(half[1], Vector<double>);
#endif
}

}  // namespace
}  // namespace kddp

// SIMD vectors over the compiler's vector extensions: arithmetic, element types, aligned loops, stores past the caches.
//
// Everything here has internal linkage: each instruction set compiles its own copy, and the linker cannot replace the
// code of one instruction set by that of another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kddp/types.h"
#include "workspace.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__AVX512F__)
#define KDDP_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define KDDP_VECTOR_BYTES 32
#else
#define KDDP_VECTOR_BYTES 16
#endif

// For the bodies of loops, lambdas included.
#define KDDP_ALWAYS_INLINE __attribute__((always_inline))

// For the steps of a row: inlined copies could contract a formula to different fused multiplications, and take long to
// compile.
#define KDDP_NOINLINE __attribute__((noinline))

namespace kddp {
namespace {

// Sizes

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// Vectors

template <class T>
struct VectorTraits;

template <>
struct VectorTraits<float> {
    using Bits = uint32_t;
    static constexpr int exponent_bias = 127, mantissa_bits = 23;
    static constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    static constexpr float lowest_exponent = -126.0f;
    // Minimax polynomial of 2^f on [-1/2, 1/2] with 2^0 = 1, relative error 1.1e-7 (our own fit).
    static constexpr float exp2_coefficients[] = {1.0f,           0.6931469774f,   0.2402224214f,
                                                  0.05550734123f, 0.009671510928f, 0.001326460177f};
};

template <>
struct VectorTraits<double> {
    using Bits = uint64_t;
    static constexpr int exponent_bias = 1023, mantissa_bits = 52;
    static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double lowest_exponent = -1022.0;
    // As above, relative error 3.1e-18.
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
    typedef T Type __attribute__((vector_size(bytes)));  // NOLINT(modernize-use-using): `using` rejects the attribute
};

template <class T>
using Vector = typename VectorOf<T>::Type;

template <class T>
using BitsVector = Vector<typename VectorTraits<T>::Bits>;

template <class T>
constexpr int lanes = KDDP_VECTOR_BYTES / sizeof(T);

template <class T>
constexpr int64_t round_up_to_lanes(int64_t n) {
    return divide_up(n, lanes<T>) * lanes<T>;
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

// Folds a vector in halves, down to one lane.
template <class T, int bytes = KDDP_VECTOR_BYTES, class Combine>
inline T fold_lanes(typename VectorOf<T, bytes>::Type v, Combine combine) {
    if constexpr (bytes == 2 * sizeof(T)) {
        return combine(v[0], v[1]);
    } else {
        typename VectorOf<T, bytes / 2>::Type half[2];
        std::memcpy(half, &v, sizeof v);
        return fold_lanes<T, bytes / 2>(combine(half[0], half[1]), combine);
    }
}

template <class T>
inline T sum_of_lanes(Vector<T> v) {
    return fold_lanes<T>(v, [](auto a, auto b) { return a + b; });
}

template <class T>
inline T maximum_of_lanes(Vector<T> v) {
    return fold_lanes<T>(v, [](auto a, auto b) { return a > b ? a : b; });
}

template <class V>
inline V nearest_integer(V x) {
    using Traits = VectorTraits<std::remove_reference_t<decltype(x[0])> >;
    return (x + Traits::round_magic) - Traits::round_magic;
}

// n must be the exponent of a normal number: the low bits of n + round_magic move to the exponent.
template <class V>
inline V times_power_of_two(V x, V n) {
    using T = std::remove_reference_t<decltype(x[0])>;
    using Traits = VectorTraits<T>;
    const BitsVector<T> exponent = ((BitsVector<T>)(n + Traits::round_magic) << Traits::mantissa_bits) +
                                   ((typename Traits::Bits)Traits::exponent_bias << Traits::mantissa_bits);
    return x * (V)exponent;
}

// 2^(x * factor), computed as 2^n * 2^f with n the nearest integer of x * factor. NaN stays NaN; subnormal results
// become 0.
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
// The same in fewer operations: a table in two registers gives 2^(n/32), so |f| is at most 1/64. Entry k holds the bits
// of 2^(k/32) minus k << 18; adding n << 18 gives the bits of 2^(n/32). Relative error 5.4e-8 (our own fit).
alignas(64) constexpr uint32_t exp2_table[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};

// 2^(x * factor - shift). The shift must be a multiple of 1/32 far below `magic`; subtracting it costs no instruction.
// An exponent of -127 or less gives 0.
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
Vector<T> exp2_of_shifted(Vector<T> x, T factor, T shift);  // never called without AVX-512
#endif

constexpr double exp2_shift_unit = 1.0 / 32;

// log2 of a positive normal number. float: the exponent plus a polynomial in m - 1, with m between 3/4 and 3/2.
inline Vector<double> log2_of_positive(Vector<double> x) {
    for (int i = 0; i < lanes<double>; ++i) x[i] = std::log2(x[i]);
    return x;
}

inline Vector<float> log2_of_positive(Vector<float> x) {
    constexpr uint32_t three_quarters = 0x3f400000;
    const BitsVector<float> exponent = ((BitsVector<float>)x - three_quarters) & 0xff800000u;
    const Vector<float> f = (Vector<float>)((BitsVector<float>)x - exponent) - 1.0f;
    const Vector<float> n = __builtin_convertvector((VectorOf<int32_t>::Type)exponent >> 23, Vector<float>);
    // Polynomial of log2(1 + f) / f, error 3.6e-8 (our own fit).
    constexpr float coefficients[] = {1.442695032f,   -0.7213484794f, 0.4809020856f,  -0.3605758797f, 0.2881913158f,
                                      -0.2427238251f, 0.2163268254f,  -0.1742320295f, 0.07806642968f};
    constexpr int degree = sizeof(coefficients) / sizeof(float) - 1;
    Vector<float> polynomial = broadcast<float>(coefficients[degree]);
    for (int i = degree - 1; i >= 0; --i) polynomial = polynomial * f + coefficients[i];
    return polynomial * f + n;
}

// The two halves of a vector in double precision; of doubles, the vector itself and zeros.
inline void widen(Vector<double> v, Vector<double>& low, Vector<double>& high) {
    low = v;
    high = Vector<double>{};
}

inline void widen(Vector<float> v, Vector<double>& low, Vector<double>& high) {
#if defined(__AVX512F__)
    // Intrinsics, because GCC compiles the conversion to four instructions and splits the vector through memory.
    low = (Vector<double>)_mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 0));
    high = (Vector<double>)_mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 1));
#else
    VectorOf<float, KDDP_VECTOR_BYTES / 2>::Type half[2];
    std::memcpy(half, &v, sizeof v);
    low = __builtin_convertvector(half[0], Vector<double>);
    high = __builtin_convertvector(half[1], Vector<double>);
#endif
}

// A sum of vectors in double precision.
template <class T>
struct DoubleSum {
    Vector<double> sum{};

    DoubleSum& operator+=(Vector<T> v) {
        Vector<double> low, high;
        widen(v, low, high);
        sum += low + high;
        return *this;
    }
    double of_lanes() const { return sum_of_lanes<double>(sum); }
};

// Memory

// Prefetches a cache line to the second-level cache, which accepts more outstanding requests than the first-level
// cache. The address may be invalid.
inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

// Writes a vector past the caches, for data that is not read again soon; `to` must be aligned to `bytes`.
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

// Must run before another thread reads what this thread has written past the caches.
inline void finish_streams() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// Asks for huge pages in large fresh outputs: first touching 2 MiB pages costs a tenth of touching 4 KiB pages. Small
// buffers come from a heap that has been touched before.
inline void advise_huge_pages([[maybe_unused]] void* buffer, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = 2 << 20;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(buffer) + page - 1) / page * page;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(buffer) + uintptr_t(bytes)) / page * page;
    // Only a hint, so its failure is ignored.
    if (buffer && last > first) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Element types: read to vectors of the type computed in, written back rounded to nearest even

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

template <class Element>
constexpr ElementType type_of_element = std::is_same_v<Element, double>     ? ElementType::float64
                                        : std::is_same_v<Element, BFloat16> ? ElementType::bfloat16
                                        : std::is_same_v<Element, Float16>  ? ElementType::float16
                                                                            : ElementType::float32;

template <class Element>
using ComputedIn = std::conditional_t<std::is_same_v<Element, double>, double, float>;

// Calls body(element) with a value of this element type.
template <class Body>
inline auto with_element(ElementType type, Body body) {
    switch (type) {
        case ElementType::float64:
            return body(double());
        case ElementType::bfloat16:
            return body(BFloat16());
        case ElementType::float16:
            return body(Float16());
        default:
            return body(float());
    }
}

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline double to_number(double x) { return x; }
inline float to_number(float x) { return x; }
inline float to_number(BFloat16 x) { return from_bits(uint32_t(x.bits) << 16); }

inline float to_number(Float16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
    const uint32_t bits = magnitude < 0x7c00 ? (magnitude << 13) : (magnitude << 13) | 0x7f800000;
    // The exponent biases differ by 112. The multiplication corrects that and normalises subnormals.
    const float value = magnitude < 0x7c00 ? from_bits(bits) * 0x1p112f : from_bits(bits);
    return from_bits(to_bits(value) | sign);
}

inline void from_number(double x, double& to) { to = x; }
inline void from_number(double x, float& to) { to = float(x); }

inline void from_number(double x, BFloat16& to) {
    const uint32_t bits = to_bits(float(x));
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    to.bits = nan ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void from_number(double x, Float16& to) {
    const uint32_t bits = to_bits(float(x)), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
        half = 0x7e00;  // NaN
    } else if (magnitude >= 0x477ff000) {
        half = 0x7c00;  // rounds to infinity
    } else if (magnitude < 0x38800000) {
        // Subnormal: adding 1/2 moves the last kept bit to the end of the mantissa, where the addition rounds.
        half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
    } else {
        half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    }
    to.bits = uint16_t(sign | half);
}

// Whole vectors: element by element, unless one of the specializations below applies.

template <class T, class Element>
inline Vector<T> load_elements(const Element* from) {
    if constexpr (std::is_same_v<T, Element>) {
        return load<T>(from);
    } else {
        Vector<T> v{};
        for (int i = 0; i < lanes<T>; ++i) v[i] = T(to_number(from[i]));
        return v;
    }
}

template <class T, class Element>
inline void store_elements(Element* to, Vector<T> v) {
    if constexpr (std::is_same_v<T, Element>)
        store<T>(to, v);
    else
        for (int i = 0; i < lanes<T>; ++i) from_number(v[i], to[i]);
}

using HalfWords = VectorOf<uint16_t, KDDP_VECTOR_BYTES / 2>::Type;

template <>
inline Vector<float> load_elements<float, BFloat16>(const BFloat16* from) {
    HalfWords words;
    std::memcpy(&words, from, sizeof words);
    return (Vector<float>)(__builtin_convertvector(words, BitsVector<float>) << 16);
}

// The AVX-512 intrinsics have full masks: the others make GCC 12 warn about an uninitialised value (its bug 105593).
#if defined(__AVX512BF16__)
template <>
inline void store_elements<float, BFloat16>(BFloat16* to, Vector<float> v) {
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_maskz_cvtneps_pbh(0xffff, (__m512)v));
}
#else
// Rounds to nearest even. NaN is set explicitly, because the addition could turn it into infinity.
inline BitsVector<float> bfloat16_bits(Vector<float> v) {
    const BitsVector<float> bits = (BitsVector<float>)v;
    const BitsVector<float> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? BitsVector<float>{} + 0x7fc0 : rounded;
}

template <>
inline void store_elements<float, BFloat16>(BFloat16* to, Vector<float> v) {
    const HalfWords words = __builtin_convertvector(bfloat16_bits(v), HalfWords);
    std::memcpy(to, &words, sizeof words);
}
#endif

#if defined(__AVX512F__)
template <>
inline Vector<float> load_elements<float, Float16>(const Float16* from) {
    return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)from));
}

template <>
inline void store_elements<float, Float16>(Float16* to, Vector<float> v) {
    _mm256_storeu_si256((__m256i*)to, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
template <>
inline Vector<float> load_elements<float, Float16>(const Float16* from) {
    return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
}

template <>
inline void store_elements<float, Float16>(Float16* to, Vector<float> v) {
    _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#endif

// Writes a vector past the caches; `to` must be aligned to the bytes written.
template <class T, class Element>
inline void stream_elements(Element* to, Vector<T> v) {
    constexpr int bytes = lanes<T> * sizeof(Element);
    alignas(bytes) Element converted[lanes<T>];
    store_elements<T>(converted, v);
    stream<bytes>(to, converted);
}

// Two vectors of neighbouring elements in a permuted order that is cheaper to read and write.
template <class T>
struct VectorPair {
    Vector<T> first, second;
};

template <class T, class Element>
constexpr bool has_pairs = false;

template <class T, class Element>
VectorPair<T> load_pair(const Element* from);
template <class T, class Element>
void write_pair(Element* to, VectorPair<T> v, bool past_caches);

#if defined(__AVX512BF16__)
template <>
constexpr bool has_pairs<float, BFloat16> = true;

// Elements with an even index are the low halves of 32-bit words, the others the high halves.
template <>
inline VectorPair<float> load_pair<float, BFloat16>(const BFloat16* from) {
    const BitsVector<float> words = (BitsVector<float>)_mm512_loadu_si512(from);
    return {(Vector<float>)(words << 16), (Vector<float>)(words & 0xffff0000u)};
}

alignas(64) constexpr uint16_t interleaved[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                  8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

template <>
inline void write_pair<float, BFloat16>(BFloat16* to, VectorPair<float> v, bool past_caches) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)v.second, (__m512)v.first);
    const __m512i elements = _mm512_maskz_permutexvar_epi16(~__mmask32(0), _mm512_load_si512(interleaved), halves);
    if (!past_caches) return _mm512_storeu_si512(to, elements);
    // Only halves are known to be aligned.
    _mm256_stream_si256((__m256i*)to, _mm512_maskz_extracti64x4_epi64(0xff, elements, 0));
    _mm256_stream_si256((__m256i*)(to + 16), _mm512_maskz_extracti64x4_epi64(0xff, elements, 1));
}
#endif

// Lanes `first` to `last` of a vector. The other lanes are set to `fill` on reading and not written on writing; their
// memory, which may not be ours, is not touched.

template <class T, class Element>
inline Vector<T> load_partial(const Element* from, int64_t first, int64_t last, T fill) {
    T lane[lanes<T>];
    for (int i = 0; i < lanes<T>; ++i) lane[i] = i >= first && i < last ? T(to_number(from[i])) : fill;
    return load<T>(lane);
}

template <class T, class Element>
inline void store_partial(Element* to, Vector<T> v, int64_t first, int64_t last) {
    T lane[lanes<T>];
    store<T>(lane, v);
    for (int64_t i = first; i < last; ++i) from_number(lane[i], to[i]);
}

#if defined(__AVX512F__)
inline __mmask16 lane_mask(int64_t first, int64_t last) { return __mmask16((1u << last) - (1u << first)); }

template <>
inline Vector<float> load_partial<float, float>(const float* from, int64_t first, int64_t last, float fill) {
    return (Vector<float>)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), lane_mask(first, last), from);
}

template <>
inline void store_partial<float, float>(float* to, Vector<float> v, int64_t first, int64_t last) {
    _mm512_mask_storeu_ps(to, lane_mask(first, last), (__m512)v);
}
#endif

// Whole or partial vectors.

template <class T, class Element>
KDDP_ALWAYS_INLINE inline Vector<T> load_lanes(const Element* from, int64_t first, int64_t last, T fill) {
    return first == 0 && last == lanes<T> ? load_elements<T>(from) : load_partial<T>(from, first, last, fill);
}

// Loops over a range of elements by aligned vectors

// Elements start to start + count of a row. Loops index them by place: the first element has place `head`, chosen so
// that places divisible by the lanes are aligned addresses of the gradient.
struct Chunk {
    int64_t start, count;
    int64_t head;
    int64_t end() const { return head + count; }
    int64_t first_whole(int64_t lanes) const { return head > 0 ? lanes : 0; }
    int64_t last_whole(int64_t lanes) const {
        const int64_t first = first_whole(lanes);
        return end() < first ? end() : first + (end() - first) / lanes * lanes;
    }
};

// Calls body(i, first, last) for every vector of a chunk; i is the place of lane 0, and lanes first to last belong to
// the chunk. Partial vectors come first. With `pairs`, body_of_pair(i) replaces two calls for whole vectors.
template <class T, bool pairs, class Body, class PairBody>
KDDP_ALWAYS_INLINE inline void for_each_vector(Chunk chunk, Body body, PairBody body_of_pair) {
    const int64_t begin = chunk.first_whole(lanes<T>), end = chunk.last_whole(lanes<T>);
    for (int64_t i = begin > 0 ? 0 : end; i < chunk.end(); i = i < end ? end : chunk.end())
        body(i, i < chunk.head ? chunk.head - i : 0, smaller(lanes<T>, chunk.end() - i));
    int64_t i = begin;
    if constexpr (pairs)
        for (; i + 2 * lanes<T> <= end; i += 2 * lanes<T>) body_of_pair(i);
    for (; i < end; i += lanes<T>) body(i, int64_t(0), int64_t(lanes<T>));
}

template <class T, class Body>
KDDP_ALWAYS_INLINE inline void for_each_vector(Chunk chunk, Body body) {
    for_each_vector<T, false>(chunk, body, [](int64_t) {});
}

}  // namespace
}  // namespace kddp

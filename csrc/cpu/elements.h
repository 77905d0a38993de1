// Reading elements of any type into vectors of the type computed in, and writing them back rounded to nearest
// even.
#pragma once

#include "cpu/vector.h"
#include "kddp/types.h"

namespace kddp {
namespace {

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
    // The exponent's bias differs by 112; multiplying corrects it, and normalises subnormals on the way.
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
        // Subnormal: adding 1/2 moves the last bit that counts to the end of the mantissa, where it is
        // rounded.
        half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
    } else {
        half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    }
    to.bits = uint16_t(sign | half);
}

// Whole vectors. The general case goes element by element; the ones that matter follow.

template <class T, class Element>
inline Vector<T> load_elements(const Element* from) {
    Vector<T> v;
    for (int i = 0; i < lanes<T>; ++i) v[i] = T(to_number(from[i]));
    return v;
}

template <class T, class Element>
inline void store_elements(Element* to, Vector<T> v) {
    for (int i = 0; i < lanes<T>; ++i) from_number(v[i], to[i]);
}

template <>
inline Vector<float> load_elements<float, float>(const float* from) {
    return load<float>(from);
}

template <>
inline void store_elements<float, float>(float* to, Vector<float> v) {
    store<float>(to, v);
}

template <>
inline Vector<double> load_elements<double, double>(const double* from) {
    return load<double>(from);
}

template <>
inline void store_elements<double, double>(double* to, Vector<double> v) {
    store<double>(to, v);
}

#if defined(__AVX512F__)
// The forms with a mask, of all lanes: in the others GCC 12 sees an uninitialised value (its bug 105593).
template <>
inline Vector<float> load_elements<float, BFloat16>(const BFloat16* from) {
    const __m512i words = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)from));
    return (Vector<float>)_mm512_maskz_slli_epi32(0xffff, words, 16);
}
#else
using HalfWords = VectorOf<uint16_t, KDDP_VECTOR_BYTES / 2>::Type;

template <>
inline Vector<float> load_elements<float, BFloat16>(const BFloat16* from) {
    HalfWords words;
    std::memcpy(&words, from, sizeof words);
    return (Vector<float>)(__builtin_convertvector(words, BitsVector<float>) << 16);
}
#endif

#if defined(__AVX512BF16__)
template <>
inline void store_elements<float, BFloat16>(BFloat16* to, Vector<float> v) {
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_maskz_cvtneps_pbh(0xffff, (__m512)v));
}
#else
// Rounded to nearest even; adding to a NaN could make it infinite.
inline BitsVector<float> bfloat16_bits(Vector<float> v) {
    const BitsVector<float> bits = (BitsVector<float>)v;
    const BitsVector<float> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? BitsVector<float>{} + 0x7fc0 : rounded;
}

template <>
inline void store_elements<float, BFloat16>(BFloat16* to, Vector<float> v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)to, _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)bfloat16_bits(v)));
#else
    const HalfWords words = __builtin_convertvector(bfloat16_bits(v), HalfWords);
    std::memcpy(to, &words, sizeof words);
#endif
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

// A whole vector past the caches; `to` is aligned to it.
template <class T, class Element>
inline void stream_elements(Element* to, Vector<T> v) {
    constexpr int bytes = lanes<T> * sizeof(Element);
    alignas(bytes) Element converted[lanes<T>];
    store_elements<T>(converted, v);
    stream<bytes>(to, converted);
}

// Two vectors of neighbouring elements, in an order that is cheaper than their own; the same on reading and on writing.
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

// The elements of even number are the low halves of 32 bits, the others the high ones.
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
    // Only half of it is sure to be aligned.
    __m256i half[2];
#if KDDP_HAS_SHUFFLEVECTOR
    half[0] = (__m256i)__builtin_shufflevector(elements, elements, 0, 1, 2, 3);
    half[1] = (__m256i)__builtin_shufflevector(elements, elements, 4, 5, 6, 7);
#else
    std::memcpy(half, &elements, sizeof elements);
#endif
    _mm256_stream_si256((__m256i*)to, half[0]);
    _mm256_stream_si256((__m256i*)(to + 16), half[1]);
}
#endif

// Lanes `first` to `last` of a vector; the others are filled on reading and left alone on writing.

// A copy of them is read, for memory around them may be nobody's.
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

}  // namespace
}  // namespace kddp

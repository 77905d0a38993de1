// Element types: what is computed in, and how several elements lie in a few words.
#pragma once

#include <type_traits>

#include "cuda/memory.cuh"
#include "kddp/types.h"

namespace kddp {

#if defined(KDDP_EMULATOR)
template <class To, class From>
inline To bits_as(From from) {
    To to;
    static_assert(sizeof to == sizeof from, "the same bits");
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline float float_of(unsigned bits) { return bits_as<float>(bits); }
inline unsigned bits_of(float x) { return bits_as<unsigned>(x); }
inline double double_of(unsigned low, unsigned high) { return bits_as<double>(uint64_t(high) << 32 | low); }
inline unsigned low_bits_of(double x) { return unsigned(bits_as<uint64_t>(x)); }
inline unsigned high_bits_of(double x) { return unsigned(bits_as<uint64_t>(x) >> 32); }
#else
__device__ __forceinline__ float float_of(unsigned bits) { return __uint_as_float(bits); }
__device__ __forceinline__ unsigned bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ double double_of(unsigned low, unsigned high) {
    return __hiloint2double(static_cast<int>(high), static_cast<int>(low));
}
__device__ __forceinline__ unsigned low_bits_of(double x) { return static_cast<unsigned>(__double2loint(x)); }
__device__ __forceinline__ unsigned high_bits_of(double x) { return static_cast<unsigned>(__double2hiint(x)); }
#endif

// Element i of what was loaded.
template <class T, ElementType type, int count>
__device__ __forceinline__ T element_of(const Words<count>& from, int i) {
    if constexpr (type == ElementType::float32) return T(float_of(from.words[i]));
    if constexpr (type == ElementType::float64) return T(double_of(from.words[2 * i], from.words[2 * i + 1]));
    if constexpr (type == ElementType::bfloat16)
        return T(float_of(i % 2 ? from.words[i / 2] & 0xffff0000u : from.words[i / 2] << 16));
    if constexpr (type == ElementType::float16)
        return T(__half2float(__ushort_as_half(static_cast<unsigned short>(from.words[i / 2] >> (i % 2 * 16)))));
}

template <ElementType type, class T>
__device__ __forceinline__ unsigned half_bits(T value) {
    if constexpr (type == ElementType::bfloat16)
        return __bfloat16_as_ushort(__float2bfloat16_rn(static_cast<float>(value)));
    else
        return __half_as_ushort(__float2half_rn(static_cast<float>(value)));
}

// Puts element i into words that are 0 there.
template <ElementType type, class T, int count>
__device__ __forceinline__ void put_element(Words<count>& to, int i, T value) {
    if constexpr (type == ElementType::float32) {
        to.words[i] = bits_of(static_cast<float>(value));
    } else if constexpr (type == ElementType::float64) {
        to.words[2 * i] = low_bits_of(value), to.words[2 * i + 1] = high_bits_of(value);
    } else {
        to.words[i / 2] |= half_bits<type>(value) << (i % 2 * 16);
    }
}

// A run of n elements at an address that is aligned to as many bytes as it has, or to 16.
template <class T, ElementType type, int n>
__device__ __forceinline__ void load_run(const char* from, T* to) {
    constexpr int bytes = n * static_cast<int>(size_of(type)), at_once = bytes < 16 ? bytes : 16;
    constexpr int of_load = at_once / static_cast<int>(size_of(type));
#pragma unroll
    for (int k = 0; k < bytes / at_once; ++k) {
        const auto words = load_input<at_once>(from + k * at_once);
#pragma unroll
        for (int i = 0; i < of_load; ++i) to[k * of_load + i] = element_of<T, type>(words, i);
    }
}

template <class T, ElementType type>
__device__ __forceinline__ T load_element(const char* from) {
    return element_of<T, type>(load_input<static_cast<int>(size_of(type))>(from), 0);
}

template <class T, ElementType type, int n>
__device__ __forceinline__ void store_run(char* to, const T* from) {
    constexpr int bytes = n * static_cast<int>(size_of(type)), at_once = bytes < 16 ? bytes : 16;
    constexpr int of_store = at_once / static_cast<int>(size_of(type));
#pragma unroll
    for (int k = 0; k < bytes / at_once; ++k) {
        Words<at_once / 4> words{};
#pragma unroll
        for (int i = 0; i < of_store; ++i) put_element<type>(words, i, from[k * of_store + i]);
        store_words<at_once>(to + k * at_once, words);
    }
}

template <class T, ElementType type>
__device__ __forceinline__ void store_element(char* to, T value) {
    Words<static_cast<int>(size_of(type) + 3) / 4> words{};
    put_element<type>(words, 0, value);
    store_words<static_cast<int>(size_of(type))>(to, words);
}

// Calls `function` with the type as a constant. Uniform: one branch is taken by all threads. What is computed in float
// has no elements of float64.
template <class T, class Function>
__device__ __forceinline__ void with_type(ElementType type, Function function) {
    if constexpr (sizeof(T) == 8)
        if (type == ElementType::float64) return function(std::integral_constant<ElementType, ElementType::float64>());
    switch (type) {
        case ElementType::bfloat16:
            return function(std::integral_constant<ElementType, ElementType::bfloat16>());
        case ElementType::float16:
            return function(std::integral_constant<ElementType, ElementType::float16>());
        default:
            return function(std::integral_constant<ElementType, ElementType::float32>());
    }
}

template <class T>
constexpr T lowest_number = sizeof(T) == 4 ? T(-3.402823466e+38f) : T(-1.7976931348623157e+308);

}  // namespace kddp

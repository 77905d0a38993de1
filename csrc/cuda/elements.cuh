// Element types: conversion between the words that memory holds and the type that a kernel computes in.
#pragma once

#include "cuda/memory.cuh"
#include "kddp/types.h"

namespace kddp {

template <class To, class From>
KDDP_DEVICE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a bit_cast keeps the size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// Element i of loaded words.
template <class T, ElementType type, int count>
KDDP_DEVICE T element_of(const Words<count>& from, int i) {
    if constexpr (type == ElementType::float32) return T(bit_cast<float>(from.words[i]));
    if constexpr (type == ElementType::float64)
        return T(bit_cast<double>(uint64_t(from.words[2 * i + 1]) << 32 | from.words[2 * i]));
    if constexpr (type == ElementType::bfloat16)
        return T(bit_cast<float>(i % 2 ? from.words[i / 2] & 0xffff0000u : from.words[i / 2] << 16));
    if constexpr (type == ElementType::float16)
        return T(__half2float(__ushort_as_half(static_cast<unsigned short>(from.words[i / 2] >> (i % 2 * 16)))));
}

// Stores element i into words whose bits are still 0 there.
template <ElementType type, class T, int count>
KDDP_DEVICE void put_element(Words<count>& to, int i, T value) {
    if constexpr (type == ElementType::float32) {
        to.words[i] = bit_cast<unsigned>(static_cast<float>(value));
    } else if constexpr (type == ElementType::float64) {
        const auto bits = bit_cast<uint64_t>(static_cast<double>(value));
        to.words[2 * i] = static_cast<unsigned>(bits), to.words[2 * i + 1] = static_cast<unsigned>(bits >> 32);
    } else if constexpr (type == ElementType::bfloat16) {
        to.words[i / 2] |= unsigned(__bfloat16_as_ushort(__float2bfloat16_rn(static_cast<float>(value))))
                           << (i % 2 * 16);
    } else {
        to.words[i / 2] |= unsigned(__half_as_ushort(__float2half_rn(static_cast<float>(value)))) << (i % 2 * 16);
    }
}

// Loads n contiguous elements. The address is aligned to their size together, or to 16 bytes if that is less.
template <class T, ElementType type, int n, Input input = Input::read_only>
KDDP_DEVICE void load_run(const char* from, T* to) {
    constexpr int bytes = n * static_cast<int>(size_of(type)), access_bytes = bytes < 16 ? bytes : 16;
    constexpr int access_elements = access_bytes / static_cast<int>(size_of(type));
#pragma unroll
    for (int k = 0; k < bytes / access_bytes; ++k) {
        const auto words = load_input<access_bytes, input>(from + k * access_bytes);
#pragma unroll
        for (int i = 0; i < access_elements; ++i) to[k * access_elements + i] = element_of<T, type>(words, i);
    }
}

template <class T, ElementType type, Input input = Input::read_only>
KDDP_DEVICE T load_element(const char* from) {
    return element_of<T, type>(load_input<static_cast<int>(size_of(type)), input>(from), 0);
}

template <class T, ElementType type, int n>
KDDP_DEVICE void store_run(char* to, const T* from) {
    constexpr int bytes = n * static_cast<int>(size_of(type)), access_bytes = bytes < 16 ? bytes : 16;
    constexpr int access_elements = access_bytes / static_cast<int>(size_of(type));
#pragma unroll
    for (int k = 0; k < bytes / access_bytes; ++k) {
        Words<access_bytes / 4> words{};
#pragma unroll
        for (int i = 0; i < access_elements; ++i) put_element<type>(words, i, from[k * access_elements + i]);
        store_words<access_bytes>(to + k * access_bytes, words);
    }
}

template <class T, ElementType type>
KDDP_DEVICE void store_element(char* to, T value) {
    Words<static_cast<int>(size_of(type) + 3) / 4> words{};
    put_element<type>(words, 0, value);
    store_words<static_cast<int>(size_of(type))>(to, words);
}

// Calls function(type) with the type as a compile-time constant. All threads take the same branch. Kernels that compute
// in float have no float64 elements.
template <class T, class Function>
KDDP_DEVICE void with_type(ElementType type, Function function) {
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

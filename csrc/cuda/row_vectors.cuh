// Reading and writing a row of logits by vectors of 16 bytes, wherever it starts.
//
// A row's classes are counted in places, of which the first two vectors have `head` before the row: so vectors are
// aligned, and pairs of them, which a sector of 32 bytes holds. Else 8 lanes would touch a sector more in every step.
// What lies around a row is read with it where it belongs to the same matrix, and never written.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/loss_launch.cuh"

namespace kddp {

// One side of a row, or of the part of it that a team works at. Vectors from `first_whole` to before `last_whole` lie
// in the matrix as a whole, and are aligned.
struct RowSource {
    const char* data;  // place 0
    ElementType type;
    int first_whole, last_whole;
};

__device__ __forceinline__ const char* address_of(const Matrix& matrix, int64_t row, int64_t column) {
    return static_cast<const char*>(matrix.data) + (row * matrix.row_stride + column) * size_of(matrix.type);
}

// Vectors that begin together at a multiple of a sector.
constexpr int bytes_of_sector = 32, vectors_of_sector = bytes_of_sector / 16;

// Places before the first class, for vectors of n elements of this type.
template <int n>
__device__ __forceinline__ int head_of(const char* row, ElementType type, int together = vectors_of_sector) {
    const unsigned places = static_cast<unsigned>(together * n);
    return static_cast<int>(reinterpret_cast<uintptr_t>(row) / static_cast<unsigned>(size_of(type)) % places);
}

template <int n>
__device__ __forceinline__ bool is_aligned(const void* row, ElementType type, int head) {
    const unsigned bytes = n * static_cast<unsigned>(size_of(type)), at_once = bytes < 16 ? bytes : 16;
    return (reinterpret_cast<uintptr_t>(row) - head * static_cast<unsigned>(size_of(type))) % at_once == 0;
}

// `elements`: from the first of the matrix to behind its last; `start`: the column of the part's first class.
template <int n>
__device__ __forceinline__ RowSource source_of(const Matrix& matrix, int64_t elements, int64_t row, int64_t start,
                                               int head, int vectors) {
    const char* data = address_of(matrix, row, start);
    RowSource source{data - head * static_cast<int>(size_of(matrix.type)), matrix.type, 0, 0};
    if (!is_aligned<n>(data, matrix.type, head)) return source;
    const int64_t before = row * matrix.row_stride + start - head, after = elements - before;
    source.first_whole = before < 0 ? static_cast<int>((n - 1 - before) / n) : 0;
    source.last_whole = after >= int64_t(vectors) * n ? vectors : vectors - 1;
    return source;
}

// What a kernel's rows are made of: computed in T, the student's logits of a type known when it is compiled, or, of
// `any` type, when it runs. The teacher's may be of another.
template <class T_, ElementType type_, bool any_ = false>
struct RowKinds {
    using T = T_;
    static constexpr ElementType type = type_;
    static constexpr bool any = any_;
    static constexpr int n = 16 / static_cast<int>(any ? 8 : size_of(type));  // classes of a vector
};

// A run of n elements, or one, of a type known when it runs. What is computed in float has no elements of float64.
template <class T, int n>
__device__ __forceinline__ void load_run_of(ElementType type, const char* from, T (&to)[n]) {
    if (sizeof(T) == 8 && type == ElementType::float64) {
        if constexpr (sizeof(T) == 8) load_run<T, ElementType::float64, n>(from, to);
    } else if (type == ElementType::float32) {
        load_run<T, ElementType::float32, n>(from, to);
    } else if (type == ElementType::bfloat16) {
        load_run<T, ElementType::bfloat16, n>(from, to);
    } else {
        load_run<T, ElementType::float16, n>(from, to);
    }
}

template <class T>
__device__ __forceinline__ T load_element_of(ElementType type, const char* from) {
    if constexpr (sizeof(T) == 8)
        if (type == ElementType::float64) return load_element<T, ElementType::float64>(from);
    if (type == ElementType::float32) return load_element<T, ElementType::float32>(from);
    if (type == ElementType::bfloat16) return load_element<T, ElementType::bfloat16>(from);
    return load_element<T, ElementType::float16>(from);
}

// The n elements of a vector; those before the first of `classes`, or behind the last, are the lowest number.
template <class Kinds, bool of_student, class T, int n>
__device__ __forceinline__ void read_vector(const RowSource& row, int vector, int head, int classes, T (&to)[n]) {
    constexpr bool own = of_student && !Kinds::any;
    const bool is_own = own || (!Kinds::any && row.type == Kinds::type);
    const int bytes = own ? static_cast<int>(size_of(Kinds::type)) : static_cast<int>(size_of(row.type));
    const char* from = row.data + static_cast<int64_t>(vector) * (n * bytes);
    const int first = vector * n - head;
    if (vector >= row.first_whole && vector < row.last_whole) {
        if (is_own)
            load_run<T, Kinds::any ? ElementType::float32 : Kinds::type, n>(from, to);
        else
            load_run_of<T, n>(row.type, from, to);
#pragma unroll
        for (int i = 0; i < n; ++i)
            if (first + i < 0 || first + i >= classes) to[i] = lowest_number<T>;
        return;
    }
#pragma unroll
    for (int i = 0; i < n; ++i) {
        to[i] = lowest_number<T>;
        if (first + i < 0 || first + i >= classes) continue;
        if constexpr (own)
            to[i] = load_element<T, Kinds::type>(from + i * bytes);
        else
            to[i] = load_element_of<T>(row.type, from + i * bytes);
    }
}

// Writes the elements first to end of n, at an address aligned to all n, in as few pieces as there are.
template <class T, ElementType type, int n>
__device__ __forceinline__ void write_pieces(char* to, int first, int end, const T* from) {
    if constexpr (n == 1) {
        if (first <= 0 && end > 0) store_element<T, type>(to, from[0]);
    } else if (first <= 0 && end >= n) {
        store_run<T, type, n>(to, from);
    } else {
        constexpr int half = n / 2;
        write_pieces<T, type, half>(to, first, end, from);
        write_pieces<T, type, half>(to + half * size_of(type), first - half, end - half, from + half);
    }
}

// Writes what of a vector belongs to the row.
template <class T, ElementType type, int n>
__device__ __forceinline__ void write_vector(char* row, bool aligned, int first, int classes, const T* from) {
    constexpr int bytes = static_cast<int>(size_of(type));
    char* to = row + static_cast<int64_t>(first) * bytes;
    if (aligned) return write_pieces<T, type, n>(to, -first, classes - first, from);
#pragma unroll
    for (int i = 0; i < n; ++i)
        if (first + i >= 0 && first + i < classes) store_element<T, type>(to + i * bytes, from[i]);
}

template <class Kinds, class T>
__device__ __forceinline__ void write_gradient(char* row, ElementType type, bool aligned, int first, int classes,
                                               const T* from) {
    if constexpr (Kinds::any)
        with_type<T>(type,
                     [&](auto type) { write_vector<T, type.value, Kinds::n>(row, aligned, first, classes, from); });
    else
        write_vector<T, Kinds::type, Kinds::n>(row, aligned, first, classes, from);
}

}  // namespace kddp

// Rows of logits as vectors of 16 bytes: reading them from a matrix, caching them in shared memory, writing gradients.
//
// A row may start anywhere. Its first vectors contain `head` elements before the row, so that vectors, and the pairs of
// vectors that fill a sector of 32 bytes, are aligned; otherwise 8 lanes would touch one more sector in every step.
// Elements around the row are read if they belong to the same matrix, and are never written.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/loss_launch.cuh"

namespace kddp {

// The types of a kernel. The student's logits are of `type` and computed in float; or, for float64 kernels, both sides'
// logits are of `any` type, known at run time, and computed in double. The teacher's type may differ, except in the
// kernels of usual calls (see usual_call).
template <ElementType type_, bool is_usual_ = false>
struct RowTypes {
    static constexpr ElementType type = type_;
    static constexpr bool is_usual = is_usual_;
    static constexpr bool any = type == ElementType::float64;
    using T = std::conditional_t<any, double, float>;
    static constexpr int n = 16 / static_cast<int>(size_of(type));  // elements per vector
};

// One side of a row, or of the part of a row that a team works on. The vectors first_whole <= v < last_whole are
// aligned and lie entirely in the matrix.
struct RowSource {
    const char* data;  // of vector 0
    ElementType type;
    int first_whole, last_whole;
};

KDDP_DEVICE const char* address_of(const Matrix& matrix, int64_t row, int64_t column) {
    return static_cast<const char*>(matrix.data) + (row * matrix.row_stride + column) * size_of(matrix.type);
}

constexpr int vectors_per_sector = 2;

// Elements before the first class, so that the pairs of vectors of n elements are aligned.
template <int n>
KDDP_DEVICE int head_of(const char* row, ElementType type) {
    constexpr unsigned elements = vectors_per_sector * n;
    return static_cast<int>(reinterpret_cast<uintptr_t>(row) / static_cast<unsigned>(size_of(type)) % elements);
}

template <int n>
KDDP_DEVICE bool is_aligned(const void* row, ElementType type, int head) {
    const unsigned bytes = n * static_cast<unsigned>(size_of(type)), access_bytes = bytes < 16 ? bytes : 16;
    return (reinterpret_cast<uintptr_t>(row) - head * static_cast<unsigned>(size_of(type))) % access_bytes == 0;
}

// `elements`: from the first of the matrix to behind its last. `start`: the column of the part's first class.
template <int n>
KDDP_DEVICE RowSource source_of(const Matrix& matrix, int64_t elements, int64_t row, int64_t start, int head,
                                int vectors) {
    const char* data = address_of(matrix, row, start);
    RowSource source{data - head * static_cast<int>(size_of(matrix.type)), matrix.type, 0, 0};
    if (!is_aligned<n>(data, matrix.type, head)) return source;
    const int64_t before = row * matrix.row_stride + start - head, after = elements - before;
    source.first_whole = before < 0 ? static_cast<int>((n - 1 - before) / n) : 0;
    source.last_whole = after >= int64_t(vectors) * n ? vectors : vectors - 1;
    return source;
}

template <class T>
KDDP_DEVICE T load_element_of(ElementType type, const char* from) {
    T value;
    with_type<T>(type, [&](auto type) { value = load_element<T, type.value>(from); });
    return value;
}

// Reads the n elements of a vector. Elements outside of the row's `classes` become the lowest number.
template <class Types, bool is_student, class T, int n>
KDDP_DEVICE void read_vector(const RowSource& row, int vector, int head, int classes, T (&to)[n]) {
    constexpr bool is_known = !Types::any && (is_student || Types::is_usual);  // the type, when compiling
    const int bytes = static_cast<int>(is_known ? size_of(Types::type) : size_of(row.type));
    const char* from = row.data + static_cast<int64_t>(vector) * (n * bytes);
    const int first = vector * n - head;
    if (vector >= row.first_whole && vector < row.last_whole) {
        if (is_known || (!Types::any && row.type == Types::type))
            load_run<T, Types::type, n>(from, to);
        else
            with_type<T>(row.type, [&](auto type) { load_run<T, type.value, n>(from, to); });
#pragma unroll
        for (int i = 0; i < n; ++i)
            if (first + i < 0 || first + i >= classes) to[i] = lowest_number<T>;
        return;
    }
#pragma unroll
    for (int i = 0; i < n; ++i) {
        to[i] = lowest_number<T>;
        if (first + i < 0 || first + i >= classes) continue;
        if constexpr (is_known)
            to[i] = load_element<T, Types::type>(from + i * bytes);
        else
            to[i] = load_element_of<T>(row.type, from + i * bytes);
    }
}

// One side of a row in shared memory. Each thread reads only what it has stored itself. Vectors of n numbers are cut
// into planes of 16 bytes, so that no two threads meet in a bank.
template <class T, int n>
struct CachedRow {
    SharedArray<uint4> memory;
    int vectors;

    static constexpr int plane_size = 16 / static_cast<int>(sizeof(T)), plane_count = n / plane_size;
    static constexpr ElementType type = sizeof(T) == 8 ? ElementType::float64 : ElementType::float32;

    KDDP_DEVICE void load(int plane, int vector, T (&to)[plane_size]) const {
        const auto words = bit_cast<Words<4>>(memory.load(plane * vectors + vector));
#pragma unroll
        for (int i = 0; i < plane_size; ++i) to[i] = element_of<T, type>(words, i);
    }
    KDDP_DEVICE void store(int plane, int vector, const T* from) const {
        Words<4> words{};
#pragma unroll
        for (int i = 0; i < plane_size; ++i) put_element<type>(words, i, from[i]);
        memory.store(plane * vectors + vector, bit_cast<uint4>(words));
    }
};

// Writes elements `first` to `end` of n, in as few stores as possible. The address is aligned to all n.
template <class T, ElementType type, int n>
KDDP_DEVICE void write_range(char* to, int first, int end, const T* from) {
    if constexpr (n == 1) {
        if (first <= 0 && end > 0) store_element<T, type>(to, from[0]);
    } else if (first <= 0 && end >= n) {
        store_run<T, type, n>(to, from);
    } else {
        constexpr int half = n / 2;
        write_range<T, type, half>(to, first, end, from);
        write_range<T, type, half>(to + half * size_of(type), first - half, end - half, from + half);
    }
}

// Writes the elements of a vector that belong to the row.
template <class T, ElementType type, int n>
KDDP_DEVICE void write_vector(char* row, bool aligned, int first, int classes, const T* from) {
    constexpr int bytes = static_cast<int>(size_of(type));
    char* to = row + static_cast<int64_t>(first) * bytes;
    if (aligned) return write_range<T, type, n>(to, -first, classes - first, from);
#pragma unroll
    for (int i = 0; i < n; ++i)
        if (first + i >= 0 && first + i < classes) store_element<T, type>(to + i * bytes, from[i]);
}

// `inner`: the vector is aligned and lies entirely in the row.
template <class Types, class T>
KDDP_DEVICE void write_gradient(char* row, ElementType type, bool inner, bool aligned, int first, int classes,
                                const T* from) {
    if constexpr (Types::any)
        with_type<T>(type,
                     [&](auto type) { write_vector<T, type.value, Types::n>(row, aligned, first, classes, from); });
    else if (inner)
        store_run<T, Types::type, Types::n>(row + static_cast<int64_t>(first) * static_cast<int>(size_of(Types::type)),
                                            from);
    else
        write_vector<T, Types::type, Types::n>(row, aligned, first, classes, from);
}

}  // namespace kddp

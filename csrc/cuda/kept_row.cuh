// What is kept of a row of logits in shared memory, where each thread finds again what itself has put there.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/memory.cuh"

namespace kddp {

// A part's values: vectors of n, cut into planes of 16 bytes so that no two threads meet in a bank.
template <class T, int n>
struct KeptRow {
    SharedArray<uint4> planes;
    int vectors;

    static constexpr int of_plane = 16 / static_cast<int>(sizeof(T)), plane_count = n / of_plane;

    static constexpr ElementType type = sizeof(T) == 8 ? ElementType::float64 : ElementType::float32;

    __device__ __forceinline__ void load(int plane, int vector, T (&to)[of_plane]) const {
        const uint4 v = planes.load(plane * vectors + vector);
        const Words<4> words{{v.x, v.y, v.z, v.w}};
#pragma unroll
        for (int i = 0; i < of_plane; ++i) to[i] = element_of<T, type>(words, i);
    }
    __device__ __forceinline__ void store(int plane, int vector, const T* from) const {
        Words<4> words{};
#pragma unroll
        for (int i = 0; i < of_plane; ++i) put_element<type>(words, i, from[i]);
        planes.store(plane * vectors + vector,
                     make_uint4(words.words[0], words.words[1], words.words[2], words.words[3]));
    }
};

}  // namespace kddp

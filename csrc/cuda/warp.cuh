// Reductions over the lanes of a warp, or over teams of 8 lanes each: every lane gets the result, which depends on the
// order of nothing.
#pragma once

#include "cuda/platform.cuh"

namespace kddp {

constexpr unsigned all_lanes = 0xffffffffu;

template <int lanes, class T>
__device__ __forceinline__ T sum_of_lanes(T value) {
#pragma unroll
    for (int distance = lanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(all_lanes, value, distance);
    return value;
}

// NaN is ignored.
template <class T>
__device__ __forceinline__ T larger(T a, T b) {
    if constexpr (sizeof(T) == 4)
        return fmaxf(a, b);
    else
        return fmax(a, b);
}

template <int lanes, class T>
__device__ __forceinline__ T maximum_of_lanes(T value) {
#pragma unroll
    for (int distance = lanes / 2; distance > 0; distance /= 2)
        value = larger(value, __shfl_xor_sync(all_lanes, value, distance));
    return value;
}

// Sum over a block of up to 1024 threads in a fixed order. Every thread gets it; `scratch` holds 32.
template <class Scratch>
__device__ __forceinline__ double sum_of_block(double value, Scratch scratch) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    value = sum_of_lanes<32>(value);
    __syncthreads();
    if (lane == 0) scratch.store(warp, value);
    __syncthreads();
    value = lane < static_cast<int>(blockDim.x / 32) ? scratch.load(lane) : 0;
    return sum_of_lanes<32>(value);
}

}  // namespace kddp

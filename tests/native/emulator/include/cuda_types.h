// CUDA's types, and empty macros for the words that mark functions.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>  // the standard library has attributes with the names of the macros below: include it first
#include <string>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

struct CUstream_st;
using cudaStream_t = CUstream_st*;

// With the values of CUDA's headers.
enum cudaError_t : int {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
    cudaErrorCooperativeLaunchTooLarge = 720,
};

// The scheduler sets these before a thread runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

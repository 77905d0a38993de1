// The compiler: nvcc for a GPU, or a C++ compiler for the emulator of the tests. Only this file and memory.cuh tell
// them apart.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

#if defined(KDDP_EMULATOR)
#include "emulator.h"
#endif

#define KDDP_DEVICE __device__ __forceinline__
// For what a kernel does once: compiled as a function of its own, because nvcc takes much longer for one large function
// than for two small ones.
#define KDDP_DEVICE_CALL inline __device__ __noinline__

namespace kddp {

#if defined(KDDP_EMULATOR)

#define KDDP_LAUNCH EMULATOR_LAUNCH
#define KDDP_LAUNCH_COOPERATIVE EMULATOR_LAUNCH_COOPERATIVE

inline float fast_exp2(float x) {
    const float result = exp2f(x);
    return result < 1.17549435e-38f ? 0.0f : result;
}
inline unsigned load_acquire(unsigned* counter) { return atomicAdd(counter, 0u); }
inline int opaque_thread() { return static_cast<int>(threadIdx.x); }
inline int opaque_block() { return static_cast<int>(blockIdx.x); }
inline unsigned opaque_zero() { return 0; }
inline void compiler_barrier() {}
inline void back_off() { emulator::yield(); }

#else

// Errors are checked once, after the launch.
#define KDDP_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, argument) \
    (kernel)<<<grid, block, dynamic_shared_bytes, stream>>>(argument)
// All blocks run at once, so that they may wait for one another. Returns the launch's error.
#define KDDP_LAUNCH_COOPERATIVE(kernel, grid, block, dynamic_shared_bytes, stream, argument) \
    ::kddp::launch_cooperative(kernel, grid, block, dynamic_shared_bytes, stream, argument)

template <class Argument>
cudaError_t launch_cooperative(void (*kernel)(Argument), dim3 grid, dim3 block, int shared_bytes, cudaStream_t stream,
                               const Argument& argument) {
    void* arguments[] = {const_cast<Argument*>(&argument)};
    return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared_bytes,
                                       stream);
}

// 2^x in one instruction: at most two roundings off; results below 2^-126 become 0.
KDDP_DEVICE float fast_exp2(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// Reads, with acquire order, a counter that other blocks may be changing.
KDDP_DEVICE unsigned load_acquire(unsigned* counter) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
}

// threadIdx.x, blockIdx.x and 0 as values that the compiler does not know to be constant, so that it cannot keep what
// it derived from them in registers.
KDDP_DEVICE int opaque_thread() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}
KDDP_DEVICE int opaque_block() {
    int block;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    return block;
}

KDDP_DEVICE unsigned opaque_zero() {
    unsigned zero;
    asm volatile("mov.u32 %0, 0;" : "=r"(zero));
    return zero;
}

// Makes the compiler reload from memory whatever the thread has read before.
KDDP_DEVICE void compiler_barrier() { asm volatile("" ::: "memory"); }

// Pauses a loop that polls a counter.
KDDP_DEVICE void back_off() { __nanosleep(64); }

#endif

KDDP_DEVICE double fast_exp2(double x) { return exp2(x); }
// For numbers up to 1, at most two units in the last place off.
KDDP_DEVICE float fast_divide(float x, float y) { return __fdividef(x, y); }
KDDP_DEVICE double fast_divide(double x, double y) { return x / y; }
// a b - c d, with the rounding error of the second product added back, so that the result is accurate to its own size
// and not only to that of the products.
template <class T>
KDDP_DEVICE T difference_of_products(T a, T b, T c, T d) {
    const T product = c * d;
    return fma(a, b, -product) - fma(c, d, -product);
}
KDDP_DEVICE float log2_of(float x) { return log2f(x); }
KDDP_DEVICE double log2_of(double x) { return log2(x); }

}  // namespace kddp

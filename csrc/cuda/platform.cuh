// The compiler: nvcc for a GPU, or a C++ compiler for the emulator of the tests. Only this file, memory.cuh and
// opaque() tell them apart.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

#if defined(KDDP_EMULATOR)

#include "emulator.h"

#define KDDP_LAUNCH EMULATOR_LAUNCH
#define KDDP_LAUNCH_COOPERATIVE EMULATOR_LAUNCH_COOPERATIVE

#else

// Errors are checked once, after the launch.
#define KDDP_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, argument) \
    (kernel)<<<grid, block, dynamic_shared_bytes, stream>>>(argument)
// All blocks run at once, so that they may wait for one another.
#define KDDP_LAUNCH_COOPERATIVE(kernel, grid, block, dynamic_shared_bytes, stream, argument) \
    ::kddp::launch_cooperative(kernel, grid, block, dynamic_shared_bytes, stream, argument)

#endif

#define KDDP_DEVICE __device__ __forceinline__

namespace kddp {

#if !defined(KDDP_EMULATOR)
template <class Argument>
void launch_cooperative(void (*kernel)(Argument), dim3 grid, dim3 block, int shared_bytes, cudaStream_t stream,
                        const Argument& argument) {
    void* arguments[] = {const_cast<Argument*>(&argument)};
    cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared_bytes, stream);
}
#endif

// 2^x in one instruction: at most two roundings off; results below 2^-126 become 0.
KDDP_DEVICE float fast_exp2(float x) {
#if defined(KDDP_EMULATOR)
    const float result = exp2f(x);
    return result < 1.17549435e-38f ? 0.0f : result;
#else
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#endif
}
KDDP_DEVICE double fast_exp2(double x) { return exp2(x); }
// For numbers up to 1, at most two units in the last place off.
KDDP_DEVICE float fast_divide(float x, float y) { return __fdividef(x, y); }
KDDP_DEVICE double fast_divide(double x, double y) { return x / y; }
// a b - c d, with the rounding error of the second product added back, so that the result is accurate to its own size
// and not only to that of the products.
KDDP_DEVICE float difference_of_products(float a, float b, float c, float d) {
    const float product = __fmul_rn(c, d);
    return __fmaf_rn(a, b, -product) - __fmaf_rn(c, d, -product);
}
KDDP_DEVICE double difference_of_products(double a, double b, double c, double d) {
    const double product = __dmul_rn(c, d);
    return __fma_rn(a, b, -product) - __fma_rn(c, d, -product);
}
KDDP_DEVICE float log2_of(float x) { return log2f(x); }
KDDP_DEVICE double log2_of(double x) { return log2(x); }

// Reads, with acquire order, a counter that other blocks may be changing.
KDDP_DEVICE unsigned load_acquire(unsigned* counter) {
#if defined(KDDP_EMULATOR)
    return atomicAdd(counter, 0u);
#else
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
#endif
}
KDDP_DEVICE unsigned long long load_acquire(unsigned long long* counter) {
#if defined(KDDP_EMULATOR)
    return atomicAdd(counter, 0ull);
#else
    unsigned long long value;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(counter) : "memory");
    return value;
#endif
}

// threadIdx.x and blockIdx.x as values that the compiler does not know to be constant, so that it cannot keep what it
// derived from them in registers.
KDDP_DEVICE int opaque_thread() {
#if defined(KDDP_EMULATOR)
    return static_cast<int>(threadIdx.x);
#else
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
#endif
}
KDDP_DEVICE int opaque_block() {
#if defined(KDDP_EMULATOR)
    return static_cast<int>(blockIdx.x);
#else
    int block;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    return block;
#endif
}

// Makes the compiler reload from memory whatever the thread has read before.
KDDP_DEVICE void compiler_barrier() {
#if !defined(KDDP_EMULATOR)
    asm volatile("" ::: "memory");
#endif
}

// Pauses a loop that polls a counter.
KDDP_DEVICE void back_off() {
#if defined(KDDP_EMULATOR)
    emulator::yield();
#else
    __nanosleep(64);
#endif
}

}  // namespace kddp

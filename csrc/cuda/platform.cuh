// Who compiles: nvcc for a GPU, or a C++ compiler for the emulator of the tests. The one place that knows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

#include "cuda/place.h"

#if defined(KDDP_EMULATOR)

#include "emulator.h"

#define KDDP_LAUNCH EMULATOR_LAUNCH
#define KDDP_LAUNCH_COOPERATIVE EMULATOR_LAUNCH_COOPERATIVE

#else

// Errors are looked for once, after the launch.
#define KDDP_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, argument) \
    (kernel)<<<grid, block, dynamic_shared_bytes, stream>>>(argument)
// All blocks run at once, so that they may wait for each other.
#define KDDP_LAUNCH_COOPERATIVE(kernel, grid, block, dynamic_shared_bytes, stream, argument) \
    ::kddp::launch_cooperative(kernel, grid, block, dynamic_shared_bytes, stream, argument)

#endif

namespace kddp {

#if !defined(KDDP_EMULATOR)
template <class Argument>
void launch_cooperative(void (*kernel)(Argument), dim3 grid, dim3 block, int shared_bytes, cudaStream_t stream,
                        const Argument& argument) {
    void* arguments[] = {const_cast<Argument*>(&argument)};
    cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared_bytes, stream);
}
#endif

// 2^x in one instruction: within two roundings, results below 2^-126 are 0.
__device__ __forceinline__ float exp2_of(float x) {
#if defined(KDDP_EMULATOR)
    const float result = exp2f(x);
    return result < 1.17549435e-38f ? 0.0f : result;
#else
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#endif
}
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }
// Within two units in the last place, of numbers up to 1.
__device__ __forceinline__ float quotient_of(float x, float y) { return __fdividef(x, y); }
__device__ __forceinline__ double quotient_of(double x, double y) { return x / y; }
// a b - c d, rounded but where it is no longer than its terms: what the second product is rounded by comes back.
__device__ __forceinline__ float difference_of_products(float a, float b, float c, float d) {
    const float product = __fmul_rn(c, d);
    return __fmaf_rn(a, b, -product) - __fmaf_rn(c, d, -product);
}
__device__ __forceinline__ double difference_of_products(double a, double b, double c, double d) {
    const double product = __dmul_rn(c, d);
    return __fma_rn(a, b, -product) - __fma_rn(c, d, -product);
}
__device__ __forceinline__ float log2_of(float x) { return log2f(x); }
__device__ __forceinline__ double log2_of(double x) { return log2(x); }

// What another block may be changing.
__device__ __forceinline__ unsigned read_counter(unsigned* counter) {
#if defined(KDDP_EMULATOR)
    return atomicAdd(counter, 0u);
#else
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
#endif
}
__device__ __forceinline__ unsigned long long read_counter(unsigned long long* counter) {
#if defined(KDDP_EMULATOR)
    return atomicAdd(counter, 0ull);
#else
    unsigned long long value;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(counter) : "memory");
    return value;
#endif
}

// threadIdx.x and blockIdx.x, of which the compiler does not know that they stay the same: so it keeps nothing in
// registers that it has worked out of them before.
__device__ __forceinline__ int thread_of_block() {
#if defined(KDDP_EMULATOR)
    return static_cast<int>(threadIdx.x);
#else
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
#endif
}
__device__ __forceinline__ int block_of_grid() {
#if defined(KDDP_EMULATOR)
    return static_cast<int>(blockIdx.x);
#else
    int block;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    return block;
#endif
}

// What a thread has read of memory it reads again behind this.
__device__ __forceinline__ void forget_memory() {
#if !defined(KDDP_EMULATOR)
    asm volatile("" ::: "memory");
#endif
}

// Between two looks at what another block is to change.
__device__ __forceinline__ void wait_a_little() {
#if defined(KDDP_EMULATOR)
    emulator::yield();
#else
    __nanosleep(64);
#endif
}

}  // namespace kddp

// Replaces CUDA's header of the same name, with those functions that csrc/cuda uses.
#pragma once

#include "emulator.h"

#define EMULATED_SITE emulator::Site site = emulator::site()

namespace emulator {

template <class T>
T exchange(WarpOperation operation, unsigned mask, T value, int parameter, Site site) {
    static_assert(sizeof(T) <= 8, "lanes exchange at most 8 bytes at once");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = warp_operation(operation, mask, bits, parameter, site);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Replaces *address by change(*address) and returns the old value.
template <class T, class Change>
T atomic(T* address, Site site, Change change) {
    begin_atomic(address, sizeof(T), site);
    const T before = *address, after = change(before);
    *address = after;
    end_atomic(before != after);
    return before;
}

}  // namespace emulator

inline void __syncthreads(EMULATED_SITE) { emulator::block_barrier(site); }
inline void __threadfence(EMULATED_SITE) { emulator::fence(site); }
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATED_SITE) {
    emulator::warp_operation(emulator::WarpOperation::synchronize, mask, 0, 0, site);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, EMULATED_SITE) {
    return emulator::exchange(emulator::WarpOperation::shuffle, mask, value, lane, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, EMULATED_SITE) {
    return emulator::exchange(emulator::WarpOperation::shuffle_xor, mask, value, lane_mask, site);
}
inline int __any_sync(unsigned mask, int predicate, EMULATED_SITE) {
    return int(emulator::warp_operation(emulator::WarpOperation::any, mask, predicate != 0, 0, site));
}

template <class T, class V>
T atomicAdd(T* address, V value, EMULATED_SITE) {
    return emulator::atomic(address, site, [&](T old) { return T(old + T(value)); });
}
inline unsigned atomicInc(unsigned* address, unsigned last, EMULATED_SITE) {
    return emulator::atomic(address, site, [&](unsigned old) { return old >= last ? 0u : old + 1; });
}

// The host's arithmetic. Where a GPU's is approximate, this is more accurate.
inline float __fdividef(float x, float y) { return x / y; }
using std::fma;

// The host's side of the runtime: checks arguments as CUDA does and records the calls that change something.
enum cudaDeviceAttr : int { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute : int { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaFuncAttributes {
    size_t sharedSizeBytes;
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int bytes);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
// As on an H100: 2048 threads, 32 blocks and 228 KiB of shared memory per multiprocessor; 64 registers per thread.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads,
                                                          size_t dynamic_shared_bytes);

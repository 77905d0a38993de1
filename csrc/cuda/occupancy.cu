// What the CUDA runtime knows about a device and about a kernel on it.
#include <map>
#include <tuple>

#include "cuda/backend.h"
#include "cuda/platform.cuh"

namespace kddp {
namespace {

int current_device() {
    int device = 0;
    cudaGetDevice(&device);
    return device;
}

int attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    cudaDeviceGetAttribute(&value, which, device);
    return value;
}

// An upper bound of the static shared memory of the kernels that use the most dynamic shared memory.
constexpr int static_shared_bytes = 4224;

__global__ void probe(int) {}

}  // namespace

cudaError_t find_kernels() {
    cudaFuncAttributes attributes;
    void (*kernel)(int) = probe;
    return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
}

int max_dynamic_shared_bytes() {
    return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, current_device()) - static_shared_bytes;
}

int resident_blocks(const void* kernel, int threads, int shared_bytes) {
    static thread_local std::map<std::tuple<int, const void*, int, int>, int> cache;
    const int device = current_device();
    const std::tuple key{device, kernel, threads, shared_bytes};
    if (const auto known = cache.find(key); known != cache.end()) return known->second;
    if (shared_bytes > 0) {
        // The limit counts static shared memory too: setting more than the rest is an error.
        cudaFuncAttributes attributes{};
        if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return 1;
        const int limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       limit - static_cast<int>(attributes.sharedSizeBytes));
        if (error != cudaSuccess) return 1;
    }
    int per_multiprocessor = 0;
    const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, threads,
                                                                            static_cast<size_t>(shared_bytes));
    const int blocks = per_multiprocessor * attribute(cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess || blocks <= 0) return 1;
    return cache[key] = blocks;
}

}  // namespace kddp

// What the runtime knows of a device and of a kernel on it, kept for the calls that follow.
#include <map>
#include <mutex>
#include <tuple>

#include "cuda/occupancy.h"
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

// Of what a block may have, the kernels whose rows need most of it declare so much themselves, or less.
constexpr int static_shared_bytes = 4096;

__global__ void probe(int) {}

}  // namespace

cudaError_t find_kernels() {
    cudaFuncAttributes attributes;
    void (*kernel)(int) = probe;
    return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
}

int most_dynamic_shared_bytes() {
    static std::mutex mutex;
    static std::map<int, int> known;
    const int device = current_device();
    const std::scoped_lock lock(mutex);
    const auto found = known.find(device);
    if (found != known.end()) return found->second;
    return known[device] = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - static_shared_bytes;
}

int resident_blocks(const void* kernel, int threads, int shared_bytes) {
    static std::mutex mutex;
    static std::map<std::tuple<int, const void*, int, int>, int> known;
    const int device = current_device();
    const std::scoped_lock lock(mutex);
    const auto key = std::make_tuple(device, kernel, threads, shared_bytes);
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
    if (shared_bytes > 0) {
        // With what the kernel declares itself it may not exceed what a block may have: that would be an error.
        cudaFuncAttributes attributes{};
        cudaFuncGetAttributes(&attributes, kernel);
        const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             most - static_cast<int>(attributes.sharedSizeBytes));
    }
    int of_multiprocessor = 0;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_multiprocessor, kernel, threads,
                                                  static_cast<size_t>(shared_bytes));
    const int blocks = of_multiprocessor * attribute(cudaDevAttrMultiProcessorCount, device);
    return known[key] = blocks > 0 ? blocks : 1;
}

}  // namespace kddp

// The host's side of the runtime: arguments are checked, calls recorded, errors kept for the thread that made them.
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <set>

#include "emulated/host_functions.h"
#include "state.h"

namespace emulator {

namespace {

constexpr int shared_by_default = 48 << 10, shared_at_most = 227 << 10, shared_of_multiprocessor = 228 << 10;
constexpr int reserved_shared = 1 << 10, threads_of_multiprocessor = 2048, blocks_of_multiprocessor = 32;
constexpr int registers_of_multiprocessor = 65536, registers_of_thread = 64;
constexpr size_t most_calls = 100000;

std::mutex guard;
std::deque<Call> recorded;
std::map<const void*, int> dynamic_limits;  // that cudaFuncSetAttribute raised
std::map<cudaStream_t, int> streams;        // and their devices
int device_count = 2, multiprocessors = 4;
thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t record(Call call, cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    call.device = current_device, call.error = error;
    const std::scoped_lock lock(guard);
    if (recorded.size() == most_calls) recorded.pop_front();
    recorded.push_back(std::move(call));
    return error;
}

uint64_t number_of(cudaStream_t stream) { return reinterpret_cast<uintptr_t>(stream); }

// A stream that was not made here is taken for one of any device.
bool is_of_another_device(cudaStream_t stream) {
    const std::scoped_lock lock(guard);
    const auto found = streams.find(stream);
    return found != streams.end() && found->second != current_device;
}

int dynamic_limit(const void* function) {
    const std::scoped_lock lock(guard);
    int limit = 0;
    for (const auto& [raised, bytes] : dynamic_limits)
        if (!function || raised == function) limit = std::max(limit, bytes);
    return limit ? limit : shared_by_default;
}

int blocks_that_fit(uint64_t threads, uint64_t shared) {
    threads = (threads + 31) / 32 * 32;
    if (threads == 0 || threads > 1024 || shared > shared_at_most) return 0;
    const uint64_t by_threads = threads_of_multiprocessor / threads;
    const uint64_t by_registers = registers_of_multiprocessor / (threads * registers_of_thread);
    const uint64_t by_shared = shared_of_multiprocessor / (shared + reserved_shared);
    return int(std::min({by_threads, by_registers, by_shared, uint64_t(blocks_of_multiprocessor)}));
}

// A kernel's own name where its library shows it, as a launch may have it in a variable; else the text of the launch.
std::string name_of(const Kernel& kernel) {
    Dl_info found;
    if (!kernel.address || !dladdr(kernel.address, &found) || found.dli_saddr != kernel.address) return kernel.name;
    int status = 0;
    char* const demangled = abi::__cxa_demangle(found.dli_sname, nullptr, nullptr, &status);
    if (!demangled) return kernel.name;
    std::string name = demangled;
    std::free(demangled);
    // Without the type of the result and the parameters.
    if (name.rfind("void ", 0) == 0) name.erase(0, 5);
    size_t at = name.size();
    for (int depth = 0; at > 0;) {
        --at;
        if (name[at] == ')') ++depth;
        if (name[at] == '(' && --depth == 0) break;
    }
    return at ? name.substr(0, at) : name;
}

cudaError_t error_of_launch(const Kernel& kernel, dim3 grid, dim3 block, size_t bytes, cudaStream_t stream,
                            bool cooperative) {
    const uint64_t threads = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
    if (threads == 0 || threads > 1024 || block.z > 64 || blocks == 0) return cudaErrorInvalidConfiguration;
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
    if (bytes > size_t(dynamic_limit(kernel.address))) return cudaErrorInvalidValue;
    if (is_of_another_device(stream)) return cudaErrorInvalidResourceHandle;
    if (cooperative && blocks > uint64_t(blocks_that_fit(threads, bytes)) * uint64_t(multiprocessors))
        return cudaErrorCooperativeLaunchTooLarge;
    return cudaSuccess;
}

}  // namespace

cudaError_t check_launch(const Kernel& kernel, Launch& launch, dim3 grid, dim3 block, size_t bytes, cudaStream_t stream,
                         bool cooperative) {
    launch.report.kernel = name_of(kernel);
    launch.report.grid = grid, launch.report.block = block;
    launch.report.dynamic_shared = bytes, launch.report.cooperative = cooperative;
    launch.report.device = current_device, launch.report.stream = number_of(stream);
    const int raised = dynamic_limit(kernel.address);
    launch.shared_limit = size_t(raised > shared_by_default ? shared_at_most : shared_by_default);
    Call call;
    call.name = "launch", call.kernel = launch.report.kernel, call.stream = number_of(stream);
    call.grid = grid, call.block = block, call.shared = bytes;
    return record(call, error_of_launch(kernel, grid, block, bytes, stream, cooperative));
}

std::vector<Call> calls() {
    const std::scoped_lock lock(guard);
    return {recorded.begin(), recorded.end()};
}
void clear_calls() {
    const std::scoped_lock lock(guard);
    recorded.clear();
}
void set_devices(int count, int multiprocessors_of_each) {
    device_count = count, multiprocessors = multiprocessors_of_each;
}

namespace {

cudaError_t record(const char* name, cudaError_t error = cudaSuccess, cudaStream_t stream = nullptr) {
    Call call;
    call.name = name, call.stream = number_of(stream);
    return record(call, error);
}

// Not recorded: questions that change nothing.
cudaError_t answer(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

template <class Handle>
cudaError_t make_handle(const char* name, Handle* handle, std::map<cudaStream_t, int>* kept) {
    if (!handle) return record(name, cudaErrorInvalidValue);
    static uintptr_t next = 0x1000;
    *handle = reinterpret_cast<Handle>(next += 0x10);
    if (kept) {
        const std::scoped_lock lock(guard);
        (*kept)[reinterpret_cast<cudaStream_t>(*handle)] = current_device;
    }
    return record(name, cudaSuccess, reinterpret_cast<cudaStream_t>(*handle));
}

int attribute_of(cudaDeviceAttr attribute) {
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock:
            return 1024;
        case cudaDevAttrMaxSharedMemoryPerBlock:
            return shared_by_default;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            return shared_at_most;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
            return shared_of_multiprocessor;
        case cudaDevAttrReservedSharedMemoryPerBlock:
            return reserved_shared;
        case cudaDevAttrWarpSize:
            return 32;
        case cudaDevAttrMultiProcessorCount:
            return multiprocessors;
        case cudaDevAttrMaxThreadsPerMultiProcessor:
            return threads_of_multiprocessor;
        case cudaDevAttrMaxBlocksPerMultiprocessor:
            return blocks_of_multiprocessor;
        case cudaDevAttrMaxRegistersPerBlock:
        case cudaDevAttrMaxRegistersPerMultiprocessor:
            return registers_of_multiprocessor;
        case cudaDevAttrComputeCapabilityMajor:
            return 9;
        case cudaDevAttrCooperativeLaunch:
            return 1;
        case cudaDevAttrL2CacheSize:
            return 50 << 20;
        case cudaDevAttrGlobalMemoryBusWidth:
            return 5120;
        default:
            return 0;
    }
}

}  // namespace
}  // namespace emulator

using namespace emulator;

cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }

#define KDDP_ERRORS(of)                                                                                                \
    of(cudaSuccess, "no error") of(cudaErrorInvalidValue, "invalid argument")                                          \
        of(cudaErrorMemoryAllocation, "out of memory") of(cudaErrorInitializationError, "initialization error")        \
            of(cudaErrorInvalidConfiguration, "invalid configuration argument") of(                                    \
                cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version")           \
                of(cudaErrorInvalidDeviceFunction, "invalid device function") of(cudaErrorNoDevice,                    \
                                                                                 "no CUDA-capable device is detected") \
                    of(cudaErrorInvalidDevice, "invalid device ordinal") of(                                           \
                        cudaErrorNoKernelImageForDevice, "no kernel image is available for execution on the device")   \
                        of(cudaErrorInvalidResourceHandle, "invalid resource handle")                                  \
                            of(cudaErrorLaunchOutOfResources, "too many resources requested for launch")               \
                                of(cudaErrorLaunchFailure, "unspecified launch failure")                               \
                                    of(cudaErrorCooperativeLaunchTooLarge, "too many blocks in cooperative launch")    \
                                        of(cudaErrorNotSupported, "operation not supported")                           \
                                            of(cudaErrorUnknown, "unknown error")

const char* cudaGetErrorName(cudaError_t error) {
#define KDDP_NAME(code, text) \
    if (error == code) return #code;
    KDDP_ERRORS(KDDP_NAME)
    return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) {
#define KDDP_TEXT(code, text) \
    if (error == code) return text;
    KDDP_ERRORS(KDDP_TEXT)
    return "unrecognized error code";
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= device_count)
        return record("cudaSetDevice", device_count ? cudaErrorInvalidDevice : cudaErrorNoDevice);
    current_device = device;
    return record("cudaSetDevice");
}
cudaError_t cudaGetDevice(int* device) {
    if (!device_count) return answer(cudaErrorNoDevice);
    *device = current_device;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
    *count = device_count;
    return answer(device_count ? cudaSuccess : cudaErrorNoDevice);
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (device < 0 || device >= device_count) return answer(cudaErrorInvalidDevice);
    *value = attribute_of(attribute);
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return record("cudaDeviceSynchronize"); }

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return make_handle("cudaStreamCreate", stream, &streams); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    return make_handle("cudaStreamCreateWithFlags", stream, &streams);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    size_t known;
    {
        const std::scoped_lock lock(guard);
        known = streams.erase(stream);
    }
    return record("cudaStreamDestroy", known ? cudaSuccess : cudaErrorInvalidResourceHandle, stream);
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return record("cudaStreamSynchronize", cudaSuccess, stream); }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t, unsigned) {
    return record("cudaStreamWaitEvent", cudaSuccess, stream);
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    return make_handle("cudaEventCreateWithFlags", event, nullptr);
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t stream) { return record("cudaEventRecord", cudaSuccess, stream); }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return record("cudaEventSynchronize"); }
cudaError_t cudaEventDestroy(cudaEvent_t) { return record("cudaEventDestroy"); }

static cudaError_t allocate(const char* name, void** address, size_t bytes, cudaStream_t stream) {
    *address = bytes ? std::malloc(bytes) : nullptr;
    return record(name, bytes && !*address ? cudaErrorMemoryAllocation : cudaSuccess, stream);
}
static cudaError_t release(const char* name, void* address, cudaStream_t stream) {
    std::free(address);
    return record(name, cudaSuccess, stream);
}
static cudaError_t copy(const char* name, void* to, const void* from, size_t bytes, cudaStream_t stream) {
    std::memmove(to, from, bytes);
    return record(name, cudaSuccess, stream);
}
static cudaError_t set(const char* name, void* to, int value, size_t bytes, cudaStream_t stream) {
    std::memset(to, value, bytes);
    return record(name, cudaSuccess, stream);
}
cudaError_t cudaMalloc(void** address, size_t bytes) { return allocate("cudaMalloc", address, bytes, nullptr); }
cudaError_t cudaMallocAsync(void** address, size_t bytes, cudaStream_t stream) {
    return allocate("cudaMallocAsync", address, bytes, stream);
}
cudaError_t cudaFree(void* address) { return release("cudaFree", address, nullptr); }
cudaError_t cudaFreeAsync(void* address, cudaStream_t stream) { return release("cudaFreeAsync", address, stream); }
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    return copy("cudaMemcpy", to, from, bytes, nullptr);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    return copy("cudaMemcpyAsync", to, from, bytes, stream);
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) { return set("cudaMemset", to, value, bytes, nullptr); }
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
    return set("cudaMemsetAsync", to, value, bytes, stream);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
    const bool is_limit = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (!function) return record("cudaFuncSetAttribute", cudaErrorInvalidDeviceFunction);
    if (is_limit && (value < 0 || value > shared_at_most)) return record("cudaFuncSetAttribute", cudaErrorInvalidValue);
    if (is_limit) {
        const std::scoped_lock lock(guard);
        dynamic_limits[function] = value;
    }
    return record("cudaFuncSetAttribute");
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
    if (!function) return answer(cudaErrorInvalidDeviceFunction);
    *attributes = {};
    attributes->maxThreadsPerBlock = 1024, attributes->numRegs = registers_of_thread;
    attributes->ptxVersion = attributes->binaryVersion = 90;
    attributes->maxDynamicSharedSizeBytes = dynamic_limit(function);
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int block_size,
                                                          size_t bytes) {
    if (!function || !blocks || block_size <= 0) return answer(cudaErrorInvalidValue);
    *blocks = bytes > size_t(dynamic_limit(function)) ? 0 : blocks_that_fit(uint64_t(block_size), bytes);
    return cudaSuccess;
}

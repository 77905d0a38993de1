// The host's side of the runtime, which checks arguments and records calls, and the C interface for ctypes.
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <map>
#include <utility>

#include "cuda_runtime.h"
#include "state.h"

namespace emulator {

namespace {

// Of a multiprocessor of an H100, except for the registers, which only nvcc knows.
constexpr int default_shared = 48 << 10, max_shared = 227 << 10, multiprocessor_shared = 228 << 10;
constexpr int reserved_shared = 1 << 10, multiprocessor_threads = 2048, multiprocessor_blocks = 32;
constexpr int multiprocessor_registers = 65536, thread_registers = 64;
constexpr size_t max_calls = 100000;

std::deque<Call> calls;
std::map<const void*, int> dynamic_limits;                              // set by cudaFuncSetAttribute
int device_count = 2, multiprocessors = 4, usable_multiprocessors = 4;  // usable in the present context, as with MPS
thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t keep_error(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

cudaError_t record(Call call, cudaError_t error) {
    call.device = current_device, call.error = error;
    if (calls.size() == max_calls) calls.pop_front();
    calls.push_back(std::move(call));
    return keep_error(error);
}

int dynamic_limit(const void* kernel) {
    const auto raised = dynamic_limits.find(kernel);
    return raised == dynamic_limits.end() ? default_shared : raised->second;
}

int blocks_that_fit(uint64_t threads, uint64_t shared) {
    threads = (threads + 31) / 32 * 32;
    if (threads == 0 || threads > 1024 || shared > max_shared) return 0;
    const uint64_t by_threads = multiprocessor_threads / threads;
    const uint64_t by_registers = multiprocessor_registers / (threads * thread_registers);
    const uint64_t by_shared = multiprocessor_shared / (shared + reserved_shared);
    return int(std::min({by_threads, by_registers, by_shared, uint64_t(multiprocessor_blocks)}));
}

// The kernel's demangled name without result type and parameters; a launch may only have the name of a variable.
std::string name_of(const Kernel& kernel) {
    Dl_info symbol;
    if (!dladdr(kernel.address, &symbol) || symbol.dli_saddr != kernel.address) return kernel.name;
    int status = 0;
    char* const demangled = abi::__cxa_demangle(symbol.dli_sname, nullptr, nullptr, &status);
    if (!demangled) return kernel.name;
    std::string name = demangled;
    std::free(demangled);
    if (name.rfind("void ", 0) == 0) name.erase(0, 5);
    size_t at = name.size();
    for (int depth = 0; at > 0;) {
        --at;
        if (name[at] == ')') ++depth;
        if (name[at] == '(' && --depth == 0) break;
    }
    return at ? name.substr(0, at) : name;
}

cudaError_t error_of_launch(const Kernel& kernel, dim3 grid, dim3 block, size_t bytes, bool cooperative) {
    const bool is_1d = grid.y == 1 && grid.z == 1 && block.y == 1 && block.z == 1;
    if (!is_1d || block.x == 0 || block.x > 1024 || grid.x == 0 || grid.x > 0x7fffffffu)
        return cudaErrorInvalidConfiguration;
    if (bytes > size_t(dynamic_limit(kernel.address))) return cudaErrorInvalidValue;
    if (cooperative && grid.x > unsigned(blocks_that_fit(block.x, bytes) * usable_multiprocessors))
        return cudaErrorCooperativeLaunchTooLarge;
    return cudaSuccess;
}

std::string quoted(const std::string& text) { return "\"" + text + "\""; }

// A JSON object of names and values that are JSON already.
std::string object(const std::vector<std::pair<std::string, std::string>>& members) {
    std::string text;
    for (const auto& [name, json] : members) text += (text.empty() ? "{" : ", ") + quoted(name) + ": " + json;
    return text + "}";
}

const char* json_of(bool value) { return value ? "true" : "false"; }

std::string json_of(const SiteReport& site);
std::string json_of(const Report& report);
std::string json_of(const Call& call);

template <class List>
std::string list_of(const List& items) {
    std::string text;
    for (const auto& item : items) text += (text.empty() ? "" : ", ") + json_of(item);
    return "[" + text + "]";
}

std::string json_of(const SiteReport& site) {
    return object({{"file", quoted(site.file)},
                   {"line", std::to_string(site.line)},
                   {"shared", json_of(site.shared)},
                   {"is_store", json_of(site.is_store)},
                   {"accesses", std::to_string(site.accesses)},
                   {"sectors", std::to_string(site.sectors)},
                   {"bank_conflicts", std::to_string(site.bank_conflicts)}});
}

std::string json_of(const Report& report) {
    return object({{"kernel", quoted(report.kernel)},
                   {"grid", std::to_string(report.grid)},
                   {"block", std::to_string(report.block)},
                   {"dynamic_shared", std::to_string(report.dynamic_shared)},
                   {"cooperative", json_of(report.cooperative)},
                   {"sectors_read", std::to_string(report.sectors_read)},
                   {"sectors_written", std::to_string(report.sectors_written)},
                   {"shared_reads", std::to_string(report.shared_reads)},
                   {"shared_writes", std::to_string(report.shared_writes)},
                   {"bank_conflicts", std::to_string(report.bank_conflicts)},
                   {"sites", list_of(report.sites)}});
}

std::string json_of(const Call& call) {
    return object({{"name", quoted(call.name)},
                   {"device", std::to_string(call.device)},
                   {"stream", std::to_string(call.stream)},
                   {"grid", std::to_string(call.grid)},
                   {"block", std::to_string(call.block)},
                   {"shared", std::to_string(call.shared)},
                   {"error", std::to_string(call.error)}});
}

}  // namespace

cudaError_t check_launch(const Kernel& kernel, Launch& launch, dim3 grid, dim3 block, size_t bytes, cudaStream_t stream,
                         bool cooperative) {
    launch.report.kernel = name_of(kernel);
    launch.report.grid = grid.x, launch.report.block = block.x;
    launch.report.dynamic_shared = bytes, launch.report.cooperative = cooperative;
    launch.shared_limit = size_t(dynamic_limit(kernel.address) > default_shared ? max_shared : default_shared);
    return record({"launch", 0, reinterpret_cast<uintptr_t>(stream), grid.x, block.x, bytes},
                  error_of_launch(kernel, grid, block, bytes, cooperative));
}

const char* guarded(const std::function<void()>& run) {
    static thread_local std::string text;
    try {
        run();
        return nullptr;
    } catch (const std::exception& error) {
        text = error.what();
        return text.c_str();
    }
}

}  // namespace emulator

using namespace emulator;

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

#define EMULATED_ERRORS(entry)                                                      \
    entry(cudaSuccess, "no error") entry(cudaErrorInvalidValue, "invalid argument") \
        entry(cudaErrorInvalidConfiguration, "invalid configuration argument")      \
            entry(cudaErrorInvalidDevice, "invalid device ordinal")                 \
                entry(cudaErrorCooperativeLaunchTooLarge, "too many blocks in cooperative launch")

const char* cudaGetErrorName(cudaError_t error) {
#define EMULATED_NAME(code, text) \
    if (error == (code)) return #code;
    EMULATED_ERRORS(EMULATED_NAME)
    return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) {
#define EMULATED_TEXT(code, text) \
    if (error == (code)) return text;
    EMULATED_ERRORS(EMULATED_TEXT)
    return "unrecognized error code";
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= device_count) return record({"cudaSetDevice"}, cudaErrorInvalidDevice);
    current_device = device;
    return record({"cudaSetDevice"}, cudaSuccess);
}
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (device < 0 || device >= device_count) return keep_error(cudaErrorInvalidDevice);
    *value = attribute == cudaDevAttrMultiProcessorCount ? multiprocessors : max_shared;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
    if (bytes < 0 || bytes > max_shared) return record({"cudaFuncSetAttribute"}, cudaErrorInvalidValue);
    dynamic_limits[kernel] = bytes;
    return record({"cudaFuncSetAttribute"}, cudaSuccess);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) { return *attributes = {}, cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads, size_t bytes) {
    *blocks = bytes > size_t(dynamic_limit(kernel)) ? 0 : blocks_that_fit(uint64_t(threads), bytes);
    return cudaSuccess;
}

// Texts stay valid until the next call of the same function.
extern "C" {
void emulator_set_seed(uint64_t seed) { set_seed(seed); }
uint64_t emulator_seed() { return seed(); }
void emulator_set_devices(int count, int multiprocessors_each, int usable) {
    device_count = count, multiprocessors = multiprocessors_each, usable_multiprocessors = usable;
}
int emulator_set_device(int device) { return cudaSetDevice(device); }
int emulator_device() { return current_device; }
int emulator_last_error() { return cudaGetLastError(); }
void emulator_allow(const void* address, size_t bytes, int writable, const char* name) {
    allow(address, bytes, writable != 0, name);
}
void emulator_allow_everything() { allow_everything(); }
void emulator_needs(const void* address, size_t bytes, int is_store, const char* kernel) {
    needs(address, bytes, is_store != 0, kernel);
}
void emulator_clear() { reports.clear(), calls.clear(); }
const char* emulator_reports() {
    static std::string text;
    text = list_of(reports);
    return text.c_str();
}
const char* emulator_calls() {
    static std::string text;
    text = list_of(calls);
    return text.c_str();
}
}

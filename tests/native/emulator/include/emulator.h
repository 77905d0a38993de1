// An emulator of CUDA kernels: a C++ compiler compiles the same .cu files, and they run on the CPU with a fiber for
// each thread. The emulator checks and counts what the threads do. See docs/cuda-without-a-gpu.md.
#pragma once

#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda_types.h"

namespace emulator {

// A position in the source. As a default argument, site() is that of the call.
struct Site {
    const char* file;
    int line;
};
constexpr Site site(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

// A fault of a kernel. The text names the kernel, the block, the thread and the line.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Kernel {
    const char* name;
    const void* address;
};

// Runs `body` once for every thread of a one-dimensional grid; in a cooperative launch all blocks run at once. What the
// hardware would refuse, such as too many threads, is returned, and left for cudaGetLastError(). A fault of the kernel
// is an Error.
cudaError_t launch(const Kernel& kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes, cudaStream_t stream,
                   bool cooperative, const std::function<void()>& body);

// Lets other threads run. Loops that wait for another thread must call it.
void yield();

// Every access of a kernel to global or shared memory must be reported before it happens.
void global_access(const void* address, size_t bytes, bool is_store, Site site);
void shared_access(const void* address, size_t bytes, bool is_store, Site site);
// The block's static shared memory that is declared at this site, and its dynamic shared memory.
void* shared_memory(Site site, size_t bytes, size_t alignment);
void* dynamic_shared_memory();

// Memory that kernels may access. Once anything is allowed, everything else is out of bounds.
void allow(const void* address, size_t bytes, bool writable, const char* name);
void allow_everything();

// What one source line of a launch accessed. One access is one warp's.
struct SiteReport {
    std::string file;
    int line = 0;
    bool shared = false, is_store = false;
    uint64_t accesses = 0, sectors = 0, bank_conflicts = 0;
};

// What one launch did. A sector has 32 bytes; bank conflicts are cycles beyond the first of each phase.
struct Report {
    std::string kernel;
    unsigned grid = 0, block = 0;
    uint64_t dynamic_shared = 0;
    bool cooperative = false;
    uint64_t sectors_read = 0, sectors_written = 0;
    uint64_t shared_reads = 0, shared_writes = 0, bank_conflicts = 0;
    std::vector<SiteReport> sites;
};

// A launch or a call of the CUDA runtime that changes something.
struct Call {
    std::string name;  // "launch", or the function's name
    int device = 0;    // the calling thread's current device
    uint64_t stream = 0;
    unsigned grid = 0, block = 0;
    uint64_t shared = 0;
    int error = 0;
};

// Runs a function and returns the text of its exception, or null. For functions that ctypes calls.
const char* guarded(const std::function<void()>& run);

// What cuda_runtime.h is built on.

enum class WarpOperation { synchronize, shuffle, shuffle_xor, any };

uint64_t warp_operation(WarpOperation operation, unsigned mask, uint64_t value, int parameter, Site site);
void block_barrier(Site site);
void fence(Site site);
// An atomic operation calls these before and after it: it is checked, and other threads may run before it.
void begin_atomic(const void* address, size_t bytes, Site site);
void end_atomic(bool changed);

// Launches a function with a copy of its arguments, as <<<>>> does.
template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(bool cooperative, const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                          size_t bytes, cudaStream_t stream, Arguments&&... arguments) {
    const std::tuple<std::decay_t<Parameters>...> copy(std::forward<Arguments>(arguments)...);
    return launch({name, reinterpret_cast<const void*>(kernel)}, grid, block, bytes, stream, cooperative,
                  [&] { std::apply(kernel, copy); });
}

}  // namespace emulator

// kernel<<<grid, block, bytes, stream>>>(arguments...)
#define EMULATOR_LAUNCH(kernel, ...) emulator::launch_kernel(false, #kernel, kernel, __VA_ARGS__)
#define EMULATOR_LAUNCH_COOPERATIVE(kernel, ...) emulator::launch_kernel(true, #kernel, kernel, __VA_ARGS__)

// An emulator of CUDA kernels: the same .cu files, compiled by a C++ compiler, run on the CPU, a fiber a thread, and
// are checked and counted as they run. See docs/cuda-without-a-gpu.md.
#pragma once

#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "emulated/types.h"

namespace emulator {

// A place in the source: as a default argument, that of the call.
struct Site {
    const char* file;
    int line;
};
constexpr Site site(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

// What a launch found wrong. The text names kernel, block, thread and place.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A kernel's name and, where it is known, its address, by which cudaFuncSetAttribute knows it.
struct Kernel {
    const char* name;
    const void* address;
    Kernel(const char* name_, const void* address_ = nullptr) : name(name_), address(address_) {}
};

// Runs `body` once for every thread. What the hardware would refuse (too many threads, too much shared memory) is left
// for cudaGetLastError(), as there; what a kernel does wrong is an Error.
void launch(const Kernel& kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes, cudaStream_t stream,
            const std::function<void()>& body);
// The same with all blocks running at once, so that they may wait for each other.
void launch_cooperative(const Kernel& kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes, cudaStream_t stream,
                        const std::function<void()>& body);

// Lets other threads run: in loops that wait for another thread to write.
void yield();
// Whether a kernel's thread is running.
bool in_kernel();

// Every access of a kernel to global memory, before it happens.
void global_access(const void* address, size_t bytes, bool is_store, Site site);
// The same for shared memory.
void shared_access(const void* address, size_t bytes, bool is_store, Site site);
// A block's static shared memory declared at this place, and its dynamic shared memory.
void* shared_memory(Site site, size_t bytes, size_t alignment);
void* dynamic_shared_memory();

// Memory that kernels may use. Once anything is allowed, anything else is an error.
void allow(const void* address, size_t bytes, bool writable, const char* name = "");
// Takes back what was allowed, all of it.
void allow_everything();
// What the next launch has to read or write at least: counted in its report, and, where `checked`, an error if it does
// not access every byte.
void needs(const void* address, size_t bytes, bool is_store, bool checked = true);

// The order of lanes, warps and blocks. At first that of the environment variable KDDP_EMULATOR_SEED, or 0.
void set_seed(uint64_t seed);
uint64_t seed();

// Whether shuffles, votes and reductions order the lanes' accesses to memory, as __syncwarp does (at first they do).
// CUDA promises it of __syncwarp alone; to see what a kernel relies on, say false.
void set_shuffles_order(bool order);

// What was counted at one place of the source: an access is one warp's.
struct SiteReport {
    std::string file;
    int line = 0;
    bool shared = false, is_store = false;
    unsigned bytes_of_thread = 0;
    uint64_t accesses = 0, sectors = 0, bytes = 0, bank_conflicts = 0;
};

// What one launch did. Sectors have 32 bytes.
struct Report {
    std::string kernel;
    dim3 grid, block;
    uint64_t dynamic_shared = 0, static_shared = 0, seed = 0;
    int device = 0;
    uint64_t stream = 0;
    bool cooperative = false;
    uint64_t sectors_read = 0, sectors_written = 0;    // by each warp's access
    uint64_t bytes_read = 0, bytes_written = 0;        // that threads asked for
    uint64_t needed_read = 0, needed_written = 0;      // that needs() declared
    uint64_t accesses_read = 0, accesses_written = 0;  // of warps
    uint64_t shared_reads = 0, shared_writes = 0;      // of warps
    uint64_t bank_conflicts = 0;                       // cycles beyond the first of each phase
    uint64_t barriers = 0, warp_operations = 0, atomics = 0, fences = 0;
    std::vector<SiteReport> sites;
};

// Of the launches since clear_reports(), the last few hundred.
std::vector<Report> reports();
void clear_reports();

// One call of the runtime, in order.
struct Call {
    std::string name;    // "launch" or the function's name
    std::string kernel;  // of a launch
    int device = 0;      // the current one of the calling thread
    uint64_t stream = 0;
    dim3 grid{0, 0, 0}, block{0, 0, 0};
    uint64_t shared = 0;
    int error = 0;
};
std::vector<Call> calls();
void clear_calls();

// Runs something; the text of the exception that left it, or null. For functions that C or Python calls.
const char* guarded(const std::function<void()>& run);

// Devices that the fake runtime has (2), and multiprocessors of each (4: few, so that grids that fill a device are
// small).
void set_devices(int count, int multiprocessors_of_each);

// --- what the headers of this folder need of the runtime ---

enum class WarpOperation {
    synchronize,
    shuffle,
    shuffle_up,
    shuffle_down,
    shuffle_xor,
    ballot,
    any,
    all,
    add,
    minimum,
    maximum,
    signed_minimum,
    signed_maximum,
    bit_and,
    bit_or,
    bit_xor,
    match_any,
    match_all,
};
enum class BarrierResult { none, count, all, any };

uint64_t warp_operation(WarpOperation operation, unsigned mask, uint64_t value, int parameter, int width, Site site);
int block_barrier(BarrierResult result, bool predicate, Site site);
void fence(Site site);
unsigned lane();
// Before and after an atomic operation: others may run before it, and it is checked and counted.
void begin_atomic(const void* address, size_t bytes, Site site);
void end_atomic(bool changed);
[[noreturn]] void fail(const std::string& what, Site site);

// Launches a function with a copy of its arguments, as <<<>>> does.
template <class... Parameters, class... Arguments>
void launch_function(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t bytes,
                     cudaStream_t stream, bool cooperative, Arguments&&... arguments) {
    const std::tuple<std::decay_t<Parameters>...> kept(std::forward<Arguments>(arguments)...);
    const auto body = [&] { std::apply(kernel, kept); };
    (cooperative ? launch_cooperative : launch)({name, reinterpret_cast<const void*>(kernel)}, grid, block, bytes,
                                                stream, body);
}

}  // namespace emulator

// kernel<<<grid, block, bytes, stream>>>(arguments...)
#define EMULATOR_LAUNCH(kernel, grid, block, bytes, stream, ...) \
    emulator::launch_function(#kernel, kernel, grid, block, bytes, stream, false, ##__VA_ARGS__)
#define EMULATOR_LAUNCH_COOPERATIVE(kernel, grid, block, bytes, stream, ...) \
    emulator::launch_function(#kernel, kernel, grid, block, bytes, stream, true, ##__VA_ARGS__)

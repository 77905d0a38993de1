// A running launch: its blocks, warps and threads, and which of them can run.
#pragma once

#include <array>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator.h"
#include "fiber.h"

namespace emulator {

struct Block;
struct Warp;

enum class State : uint8_t { runs, at_barrier, in_warp_operation, finished };

struct WarpCall {
    WarpOperation operation;
    unsigned mask;
    int parameter;
    uint64_t value, result;
    Site site;
};

struct Thread {
    Fiber fiber;
    Warp* warp;
    int number;  // in the block
    int lane;
    State state;
    Site site;               // where it waits
    uint32_t fence_time;     // of its last fence
    uint32_t acquired_time;  // of its last fence or atomic operation
    WarpCall call;
};

// One access of a warp: the accesses of its lanes that belong together.
struct WarpAccess {
    unsigned lanes = 0;
    std::array<uint64_t, 32> addresses;
};

// The accesses of a warp at one site. Those that the lanes make for the n-th time since the warp last synchronized
// belong together.
struct SiteAccesses {
    std::array<uint32_t, 32> counts{};
    std::vector<WarpAccess> open;
    uint32_t first = 0;  // number of open[0]
    bool in_use = false;
};

struct Warp {
    Block* block;
    int number, first_thread, size;
    WarpCall first_call;              // of the waiting lanes,
    bool same_calls;                  // and whether all of them made the same call
    unsigned ready, waiting, exited;  // lanes; those behind the block's last thread count as exited
    int ready_index = -1;             // in the list of warps that have ready lanes
    uint32_t synchronized_time;       // when all its lanes were last ordered
    uint32_t fenced_time;             // what was written before is covered by a fence
    uint32_t last_acquire, acquired_time;
    std::vector<SiteAccesses> accesses;  // by number of the site
    std::vector<int> used_sites;
};

// Who last accessed a byte.
struct Touch {
    uint32_t time = 0;
    uint32_t lanes = 0;
    int16_t warp = -1;  // -2: several warps
    uint16_t site = 0;
};

// Without padding, so that bytes can be compared by memcmp.
struct SharedByte {
    Touch write, read;
    uint32_t atomic = 0;  // whether the write was
};
static_assert(sizeof(SharedByte) == 2 * sizeof(Touch) + sizeof(uint32_t));

struct SharedVariable {
    Site site;
    size_t offset, bytes;
};

// A block's shared memory.
struct Arena {
    std::unique_ptr<unsigned char[]> storage;
    unsigned char* data = nullptr;  // aligned
    size_t capacity = 0, end = 0;   // end: of the last variable
    std::vector<SharedByte> bytes;
    std::vector<SharedVariable> variables;
};

struct Block {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    int waiting, exited;  // at the barrier
    Thread* first_waiting;
    uint32_t number;  // in the grid
    uint32_t start_time, barrier_time, fenced_time, last_acquire, acquired_time;
    bool has_fenced;
    Arena arena;
};

// A range of addresses that the launch has to access, and which bytes it has accessed.
struct Need {
    uint64_t first, end;
    bool is_store;
    std::string kernel;  // a part of its name
    std::vector<bool> touched;
};

// The running launch. A process runs one at a time.
struct Launch {
    Report report;
    size_t shared_limit = 0;
    const std::function<void()>* body = nullptr;
    std::vector<Block*> blocks;   // running
    std::vector<uint32_t> order;  // of the blocks that have not started, in reverse
    std::vector<Block*> finished;
    std::vector<Warp*> ready;  // warps with ready lanes
    Thread* current = nullptr;
    Fiber host;
    uint64_t random = 0;
    unsigned stay = 0;                  // probability, of 256, that the same warp continues
    unsigned preempt = 0;               // one access in this many lets others run first; 0: none
    uint64_t idle = 0, idle_limit = 0;  // polls since anything changed
    std::string error;
    uint32_t start_time = 0;
    std::unordered_map<uint32_t, std::vector<uint32_t>> released;  // of each thread of finished blocks
    std::vector<Need> needs;
    std::vector<SiteReport> sites;
};

extern Launch* launching;
// The clock that orders accesses. It advances whenever threads synchronize.
extern uint32_t now;

inline uint64_t draw(uint64_t& state) {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}
inline unsigned bit(int lane) { return 1u << lane; }
inline bool same_site(Site a, Site b) {
    return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}
inline Thread& thread_of(const Warp& warp, int lane) {
    return warp.block->threads[size_t(warp.first_thread) + size_t(lane)];
}

// scheduler.cpp
bool in_kernel();
[[noreturn]] void fail(const std::string& what, Site site = {"", 0});
Thread& current_thread(const char* what, Site site);
void make_ready(Thread& thread);
void wait(Thread& thread, State state, Site site);  // until another thread makes it ready
void run_others();                                  // and returns later
void after_access(bool is_store);
void set_seed(uint64_t seed);
uint64_t seed();
std::string describe(Site site);
std::string describe(const Thread& thread);  // "thread 1"
std::string describe_mask(unsigned mask);

// synchronization.cpp
void check_exit(const Thread& thread);
void complete_operations(Warp& warp);  // those that waited only for a lane that has exited
// Whether what these lanes of the same block did at `time` happens before what `thread` does now.
bool is_ordered(const Thread& thread, int warp, unsigned lanes, uint32_t time);
void acquire(Thread& thread);
bool has_acquired(const Thread& thread, uint32_t time);
uint32_t released_time(const Thread& thread);  // what it wrote before is visible to other blocks

// accesses.cpp
int site_number(Site site, size_t bytes, bool is_store, bool is_shared);
Site site_of(int number);
void add_access(Warp& warp, int site, int lane, uint64_t address);
void close_accesses(Warp& warp);
extern std::deque<Report> reports;
void keep_report(Launch& launch);

// shared_memory.cpp
void begin_arena(Block& block);
bool in_arena(const void* address);
void touch_shared(const Thread& thread, const void* address, size_t bytes, bool is_store, bool is_atomic, Site site);

// global_memory.cpp
void forget_writes();
void keep_released(const Block& block);
void needs(const void* address, size_t bytes, bool is_store, const std::string& kernel);
void take_needs(Launch& launch);
void check_needs(Launch& launch);

// host.cpp
cudaError_t check_launch(const Kernel& kernel, Launch& launch, dim3 grid, dim3 block, size_t bytes, cudaStream_t stream,
                         bool cooperative);

}  // namespace emulator

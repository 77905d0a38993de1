// A launch as it runs: blocks, warps, threads, and who may go on.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator.h"
#include "fiber.h"

namespace emulator {

struct Block;
struct Warp;

enum class Waits : uint8_t { no, at_barrier, in_warp, finished };

// A call of a warp operation.
struct WarpCall {
    WarpOperation operation;
    unsigned mask;
    int parameter, width;
    uint64_t value, result;
    Site site;
};

struct Thread {
    Fiber fiber;
    Warp* warp;
    uint3 index;
    int number;  // in the block
    int lane;
    Waits waits;
    bool predicate;          // at a barrier
    Site site;               // where it waits
    const void* atomic;      // of the atomic operation under way
    uint32_t fence_time;     // of its last fence
    uint32_t acquired_time;  // of its last fence or atomic operation
    WarpCall call;
};

// Accesses of a warp's lanes that belong together.
struct Group {
    unsigned lanes = 0;
    std::array<uint64_t, 32> addresses;
};

// Groups at one place of the source: the n-th access of each lane since the warp last came together.
struct Groups {
    std::array<uint32_t, 32> counts{};
    std::vector<Group> open;
    uint32_t first = 0;  // number of open[0]
    bool in_use = false;
};

struct Warp {
    Block* block;
    int number;
    int first_thread, size;
    WarpCall first_call;              // of the lanes that wait,
    bool waits_for_one;               // and whether all of them made the same
    unsigned ready, waiting, exited;  // lanes; those beyond the block's last thread have exited
    int place = -1;                   // in the list of warps that have ready lanes
    uint32_t together_time;           // when all its lanes were last ordered
    uint32_t fenced_time;             // what was written before then is covered by a fence
    uint32_t last_acquire, acquired_time;
    std::vector<uint32_t> pair_times;  // [lane][other]: the time up to which lane knows other, by partial masks
    std::vector<Groups> groups;        // by number of the site
    std::vector<int> used_groups;
};

// How one thread, or several, last touched a byte.
struct Touch {
    uint32_t time = 0;
    uint32_t lanes = 0;
    int16_t warp = -1;  // -2: of several warps
    uint16_t site = 0;
};

// None of its bytes is padding: all are compared at once.
struct SharedByte {
    Touch write, read;
    uint32_t atomic = 0;  // whether the write was
};
static_assert(sizeof(SharedByte) == 2 * sizeof(Touch) + sizeof(uint32_t));

// A variable in shared memory.
struct Variable {
    Site site;
    size_t offset, bytes;
};

struct Arena {
    std::unique_ptr<unsigned char[]> storage;
    unsigned char* data = nullptr;  // aligned
    size_t capacity = 0, end = 0;   // end: of the last variable
    std::vector<SharedByte> bytes;
    std::vector<Variable> variables;
};

struct Block {
    uint3 index;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    int waiting, exited;  // at the barrier
    Thread* first_waiting;
    BarrierResult barrier_result;
    int predicates;     // that are true
    int barrier_value;  // of the last barrier
    uint32_t number;    // in the grid
    uint32_t start_time, barrier_time, fenced_time, last_acquire, acquired_time;
    bool has_fenced;
    Arena arena;
};

// A range of addresses, and which bytes of it were accessed.
struct Need {
    uint64_t first, end;
    bool is_store;
    std::vector<bool> touched;
};

// The launch under way. One at a time in a process.
struct Launch {
    Report report;
    dim3 grid, block;
    size_t shared_limit = 0;
    const std::function<void()>* body = nullptr;
    std::vector<Block*> blocks;   // alive
    std::vector<uint32_t> order;  // of the blocks that have not begun, last first
    std::vector<Block*> finished;
    std::vector<Warp*> ready;  // warps with ready lanes
    Thread* current = nullptr;
    Fiber host;
    uint64_t random = 0;
    unsigned stay = 0;                  // of 256: how likely the warp that ran goes on
    unsigned preempt = 0;               // an access in so many lets others go first; 0: none
    uint64_t idle = 0, idle_limit = 0;  // turns of waiting since anything changed
    std::string error;
    uint32_t start_time = 0;
    std::unordered_map<uint32_t, std::vector<uint32_t>> released;  // by the threads of blocks that are over
    std::vector<Need> needs;
    std::vector<SiteReport> sites;
};

extern Launch* launching;
// Counts what orders threads; an access happens at the time that it had then.
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
void make_ready(Thread& thread);
void wait(Thread& thread, Waits why, Site site);  // until another thread makes it ready
void run_others();                                // and comes back
void after_access(bool is_store);
std::string describe(Site site);
std::string describe(uint3 index);
uint3 index_of_block(uint32_t number);
std::string describe(const Thread& thread);  // "thread (1, 0, 0)"
std::string lanes_text(unsigned mask);
Thread& current_thread(const char* what, Site site);

// barrier.cpp
void leave_barriers(const Thread& thread);  // when it exits

// warp.cpp
void complete_operations(Warp& warp);  // that waited only for a lane that has exited

// groups.cpp
int site_number(Site site, size_t bytes, bool is_store, bool is_shared);
Site site_of(int number);
void add_to_group(Warp& warp, int site, int lane, uint64_t address);
void close_groups(Warp& warp);
std::vector<SiteReport> counted_sites(const Launch& launch);

// shared_memory.cpp
void begin_arena(Block& block);
bool in_arena(const void* address);
void shared_touch(const Thread& thread, const void* address, size_t bytes, bool is_store, bool is_atomic, Site site);

// order.cpp
// Whether what these lanes did at that time happens before what `thread` does now; all of one block.
bool is_ordered(const Thread& thread, int warp, unsigned lanes, uint32_t time);
void order_lanes(Warp& warp, unsigned mask, bool is_syncwarp);
void acquire(Thread& thread);
bool has_acquired(const Thread& thread, uint32_t time);
uint32_t released_time(const Thread& thread);  // what it wrote before then, other blocks may see

// global_order.cpp
void forget_written();
void check_order(const Thread& thread, uint64_t address, size_t bytes, bool is_store, int access, Site site);
void keep_released(const Block& block);

// global_memory.cpp
void take_needs(Launch& launch);
void check_needs(Launch& launch);
void check_global(const void* address, size_t bytes, bool is_store, Site site);

// host.cpp
cudaError_t check_launch(const Kernel& kernel, Launch& launch, dim3 grid, dim3 block, size_t bytes, cudaStream_t stream,
                         bool cooperative);

// report.cpp
void keep_report(Launch& launch);

}  // namespace emulator

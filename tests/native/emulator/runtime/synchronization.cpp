// Barriers, warp operations and fences, and which accesses they order.
#include <algorithm>

#include "state.h"

namespace emulator {

namespace {

const char* const names[] = {"__syncwarp", "__shfl_sync", "__shfl_xor_sync", "__any_sync"};
const char* name_of(const WarpCall& call) { return names[static_cast<int>(call.operation)]; }

bool same_call(const WarpCall& a, const WarpCall& b) {
    return a.mask == b.mask && a.operation == b.operation && same_site(a.site, b.site);
}

template <class Function>
void for_each_lane(unsigned mask, const Function& function) {
    for (; mask; mask &= mask - 1) function(__builtin_ctz(mask));
}

// Sets the lanes' results. Fails if a shuffle reads a lane that does not take part.
void set_results(Warp& warp, const WarpCall& call, unsigned present) {
    bool any = false;
    for_each_lane(present, [&](int lane) { any = any || thread_of(warp, lane).call.value; });
    for_each_lane(present, [&](int lane) {
        WarpCall& own = thread_of(warp, lane).call;
        if (call.operation == WarpOperation::any) own.result = any;
        if (call.operation != WarpOperation::shuffle && call.operation != WarpOperation::shuffle_xor) return;
        const int source = (call.operation == WarpOperation::shuffle ? own.parameter : lane ^ own.parameter) & 31;
        if (!(present & bit(source)))
            fail(std::string(name_of(own)) + ": " + describe(thread_of(warp, lane)) + " reads lane " +
                     std::to_string(source) +
                     (own.mask & bit(source) ? ", which has exited"
                                             : ", which is not in mask " + describe_mask(own.mask)),
                 own.site);
        own.result = thread_of(warp, source).call.value;
    });
}

// Orders what the lanes of a warp did before. Partial masks order nothing, because csrc/cuda does not use them.
void order_lanes(Warp& warp, unsigned mask) {
    ++now;
    if ((mask | warp.exited) != ~0u) return;
    warp.synchronized_time = now;
    warp.acquired_time = warp.last_acquire;
    close_accesses(warp);
}

// If all lanes of the call's mask have arrived, sets their results and lets them continue.
bool complete(Warp& warp, const WarpCall call) {
    const unsigned present = call.mask & ~warp.exited;
    if (present & ~warp.waiting) return false;
    bool all_same = true;
    if (!warp.same_calls)
        for_each_lane(present, [&](int lane) { all_same = all_same && same_call(thread_of(warp, lane).call, call); });
    if (!all_same) return false;
    set_results(warp, call, present);
    order_lanes(warp, call.mask);
    warp.waiting &= ~present;
    for_each_lane(present, [&](int lane) {
        Thread& thread = thread_of(warp, lane);
        if (thread.state == State::in_warp_operation) make_ready(thread);
    });
    return true;
}

void check_call(const Thread& thread, const WarpCall& call) {
    const std::string name = name_of(call);
    if (!(call.mask & bit(thread.lane)))
        fail(name + ": mask " + describe_mask(call.mask) + " lacks the calling lane, " + std::to_string(thread.lane),
             call.site);
    // Two lanes that wait for each other in different calls would wait forever.
    Warp& warp = *thread.warp;
    if (!warp.waiting) warp.first_call = call, warp.same_calls = true;
    if (warp.same_calls && same_call(warp.first_call, call)) return;
    warp.same_calls = false;
    for_each_lane(call.mask & warp.waiting, [&](int lane) {
        const Thread& other = thread_of(warp, lane);
        if (!(other.call.mask & bit(thread.lane)) || same_call(other.call, call)) return;
        fail(name + " with mask " + describe_mask(call.mask) + ": " + describe(other) + " waits in " +
                 name_of(other.call) + " with mask " + describe_mask(other.call.mask) + " at " +
                 describe(other.call.site),
             call.site);
    });
}

// The last thread has arrived at the barrier: all others may continue.
void release(Block& block, const Thread& last) {
    block.waiting = 0;
    block.first_waiting = nullptr;
    block.barrier_time = ++now;
    block.acquired_time = block.last_acquire;
    for (Warp& warp : block.warps) close_accesses(warp);
    for (Thread& thread : block.threads)
        if (&thread != &last) make_ready(thread);
}

}  // namespace

uint64_t warp_operation(WarpOperation operation, unsigned mask, uint64_t value, int parameter, Site site) {
    Thread& thread = current_thread(names[static_cast<int>(operation)], site);
    Warp& warp = *thread.warp;
    thread.call = {operation, mask, parameter, value, 0, site};
    check_call(thread, thread.call);
    warp.waiting |= bit(thread.lane);
    if (complete(warp, thread.call))
        run_others();
    else
        wait(thread, State::in_warp_operation, site);
    return thread.call.result;
}

void complete_operations(Warp& warp) {
    unsigned left = warp.waiting;
    while (left) {
        const WarpCall call = thread_of(warp, __builtin_ctz(left)).call;
        complete(warp, call);
        left &= ~call.mask;
    }
}

void block_barrier(Site site) {
    Thread& thread = current_thread("__syncthreads", site);
    Block& block = *thread.warp->block;
    for (const Thread& other : block.threads)
        if (block.exited && other.state == State::finished)
            fail("divergent barrier: " + describe(other) + " has exited without it", site);
    thread.site = site;
    if (!block.first_waiting) block.first_waiting = &thread;
    const Thread& first = *block.first_waiting;
    if (!same_site(first.site, site))
        fail("divergent barrier: " + describe(first) + " waits at another one, " + describe(first.site), site);
    if (++block.waiting < int(block.threads.size())) {
        wait(thread, State::at_barrier, site);
    } else {
        release(block, thread);
        run_others();
    }
}

void check_exit(const Thread& thread) {
    const Thread* first = thread.warp->block->first_waiting;
    if (first) fail("divergent barrier: the thread exits, but " + describe(*first) + " waits for it", first->site);
}

bool is_ordered(const Thread& thread, int warp_number, unsigned lanes, uint32_t time) {
    const Warp& warp = *thread.warp;
    if (time < warp.block->barrier_time) return true;
    if (warp_number != warp.number) return false;
    return !(lanes & ~bit(thread.lane)) || time < warp.synchronized_time;
}

// A fence covers what its thread has written, and what its warp and its block had written before they synchronized.
void fence(Site site) {
    Thread& thread = current_thread("__threadfence", site);
    Warp& warp = *thread.warp;
    acquire(thread);
    thread.fence_time = now;
    warp.fenced_time = warp.synchronized_time;
    warp.block->fenced_time = warp.block->barrier_time;
    warp.block->has_fenced = true;
}

// From now on the thread may read what others have released.
void acquire(Thread& thread) {
    thread.acquired_time = thread.warp->last_acquire = thread.warp->block->last_acquire = ++now;
}

bool has_acquired(const Thread& thread, uint32_t time) {
    return time < std::max({thread.acquired_time, thread.warp->acquired_time, thread.warp->block->acquired_time});
}

uint32_t released_time(const Thread& thread) {
    return std::max({thread.fence_time, thread.warp->fenced_time, thread.warp->block->fenced_time});
}

}  // namespace emulator

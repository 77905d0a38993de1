// What is ordered before what: by barriers in a block, by warp operations in a warp, by fences between blocks.
#include <algorithm>

#include "state.h"

namespace emulator {

bool is_ordered(const Thread& thread, int warp_number, unsigned lanes, uint32_t time) {
    const Warp& warp = *thread.warp;
    if (time < warp.block->barrier_time) return true;
    if (warp_number != warp.number) return false;
    const unsigned others = lanes & ~bit(thread.lane);
    if (!others || time < warp.together_time) return true;
    if (warp.pair_times.empty()) return false;
    for (unsigned left = others; left; left &= left - 1)
        if (time >= warp.pair_times[size_t(thread.lane) * 32 + size_t(__builtin_ctz(left))]) return false;
    return true;
}

static bool shuffles_order = true;
void set_shuffles_order(bool order) { shuffles_order = order; }

// What each lane of the mask knows of others, all of them know from now on.
void order_lanes(Warp& warp, unsigned mask, bool is_syncwarp) {
    ++now;
    const bool all = (mask | warp.exited) == ~0u;
    if (!is_syncwarp && !shuffles_order) {
        if (all) close_groups(warp);
        return;
    }
    if (all) {
        warp.together_time = now;
        warp.acquired_time = warp.last_acquire;
        return close_groups(warp);
    }
    std::vector<uint32_t>& times = warp.pair_times;
    if (times.empty()) times.resize(32 * 32, 0);
    uint32_t joined[32] = {}, acquired = 0;
    for (size_t lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        for (size_t other = 0; other < 32; ++other) joined[other] = std::max(joined[other], times[lane * 32 + other]);
        if (int(lane) < warp.size) acquired = std::max(acquired, thread_of(warp, int(lane)).acquired_time);
    }
    for (size_t lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        for (size_t other = 0; other < 32; ++other) times[lane * 32 + other] = mask >> other & 1 ? now : joined[other];
        if (int(lane) < warp.size) thread_of(warp, int(lane)).acquired_time = acquired;
    }
}

// A fence covers what its thread has written, and what its warp and block had before they last came together.
void fence(Site site) {
    Thread& thread = current_thread("__threadfence", site);
    Warp& warp = *thread.warp;
    acquire(thread);
    thread.fence_time = now;
    warp.fenced_time = warp.together_time;
    warp.block->fenced_time = warp.block->barrier_time;
    warp.block->has_fenced = true;
    ++launching->report.fences;
}

// From now on the thread may know what others have released.
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

// __syncthreads: all threads of a block at the same place, none gone.
#include "state.h"

namespace emulator {

namespace {

int value_of(BarrierResult result, int true_ones, int threads) {
    if (result == BarrierResult::count) return true_ones;
    return result == BarrierResult::all ? true_ones == threads : true_ones > 0;
}

// The last thread has come: all others may go on.
void release(Block& block, const Thread& last) {
    ++launching->report.barriers;
    block.barrier_value = value_of(block.barrier_result, block.predicates, int(block.threads.size()));
    block.waiting = block.predicates = 0;
    block.first_waiting = nullptr;
    block.barrier_time = ++now;
    block.acquired_time = block.last_acquire;
    for (Warp& warp : block.warps) close_groups(warp);
    for (Thread& thread : block.threads)
        if (&thread != &last) make_ready(thread);
}

const Thread& exited_thread(const Block& block) {
    for (const Thread& thread : block.threads)
        if (thread.waits == Waits::finished) return thread;
    return block.threads[0];
}

}  // namespace

int block_barrier(BarrierResult result, bool predicate, Site site) {
    Thread& thread = current_thread("__syncthreads", site);
    Block& block = *thread.warp->block;
    if (block.exited) fail("divergent barrier: " + describe(exited_thread(block)) + " has exited without it", site);
    thread.site = site;
    if (!block.first_waiting) block.first_waiting = &thread, block.barrier_result = result;
    const Thread& first = *block.first_waiting;
    if (!same_site(first.site, site) || block.barrier_result != result)
        fail("divergent barrier: " + describe(first) + " waits at another, " + describe(first.site), site);
    block.predicates += predicate;
    if (++block.waiting < int(block.threads.size())) {
        wait(thread, Waits::at_barrier, site);
    } else {
        release(block, thread);
        run_others();
    }
    return block.barrier_value;
}

void leave_barriers(const Thread& thread) {
    const Block& block = *thread.warp->block;
    if (!block.first_waiting) return;
    const Thread& first = *block.first_waiting;
    fail("divergent barrier: the thread exits, but " + describe(first) + " waits for it", first.site);
}

}  // namespace emulator

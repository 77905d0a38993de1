// What the lanes of a warp do together: shuffles, votes, reductions. Each waits for all lanes of its mask.
#include <algorithm>

#include "state.h"

namespace emulator {

namespace {

const char* const names[] = {
    "__syncwarp",        "__shfl_sync",       "__shfl_up_sync",    "__shfl_down_sync",  "__shfl_xor_sync",
    "__ballot_sync",     "__any_sync",        "__all_sync",        "__reduce_add_sync", "__reduce_min_sync",
    "__reduce_max_sync", "__reduce_min_sync", "__reduce_max_sync", "__reduce_and_sync", "__reduce_or_sync",
    "__reduce_xor_sync", "__match_any_sync",  "__match_all_sync",
};
const char* name_of(const WarpCall& call) { return names[static_cast<int>(call.operation)]; }

bool is_shuffle(WarpOperation operation) {
    return operation >= WarpOperation::shuffle && operation <= WarpOperation::shuffle_xor;
}

bool belong_together(const WarpCall& a, const WarpCall& b) {
    return a.mask == b.mask && a.operation == b.operation && same_site(a.site, b.site);
}

// The lane that a shuffle reads, as the instruction defines it: within a segment of `width` lanes, else its own.
int source_lane(const WarpCall& call, int lane) {
    const int first = lane & ~(call.width - 1), last = first + call.width - 1;
    int source = lane;
    switch (call.operation) {
        case WarpOperation::shuffle:
            source = first | (call.parameter & (call.width - 1));
            break;
        case WarpOperation::shuffle_up:
            source = lane - call.parameter;
            break;
        case WarpOperation::shuffle_down:
            source = lane + call.parameter;
            break;
        default:
            source = lane ^ call.parameter;
    }
    const bool below_counts = call.operation == WarpOperation::shuffle_up;
    return source > last || source < 0 || (below_counts && source < first) ? lane : source;
}

uint64_t combine(WarpOperation operation, uint64_t a, uint64_t b) {
    const auto x = static_cast<uint32_t>(a), y = static_cast<uint32_t>(b);
    const auto i = static_cast<int32_t>(x), j = static_cast<int32_t>(y);
    switch (operation) {
        case WarpOperation::add:
            return x + y;
        case WarpOperation::minimum:
            return std::min(x, y);
        case WarpOperation::maximum:
            return std::max(x, y);
        case WarpOperation::signed_minimum:
            return static_cast<uint32_t>(std::min(i, j));
        case WarpOperation::signed_maximum:
            return static_cast<uint32_t>(std::max(i, j));
        case WarpOperation::bit_and:
        case WarpOperation::all:
            return x & y;
        case WarpOperation::bit_xor:
            return x ^ y;
        default:  // bit_or, any
            return x | y;
    }
}

template <class Do>
void for_lanes(unsigned mask, const Do& run) {
    for (; mask; mask &= mask - 1) run(__builtin_ctz(mask));
}

// What all lanes get alike, of those present.
uint64_t common_result(Warp& warp, WarpOperation operation, unsigned present) {
    uint64_t result = 0;
    bool first = true, equal = true;
    uint64_t first_value = 0;
    for_lanes(present, [&](int lane) {
        const uint64_t value = thread_of(warp, lane).call.value;
        if (operation == WarpOperation::ballot)
            result |= value << lane;
        else
            result = first ? value : combine(operation, result, value);
        if (first) first_value = value;
        equal = equal && value == first_value;
        first = false;
    });
    return operation == WarpOperation::match_all ? (equal ? present : 0u) : result;
}

void find_results(Warp& warp, const WarpCall& call, unsigned present) {
    if (call.operation == WarpOperation::synchronize || is_shuffle(call.operation)) return;
    if (call.operation != WarpOperation::match_any) {
        const uint64_t result = common_result(warp, call.operation, present);
        for_lanes(present, [&](int lane) { thread_of(warp, lane).call.result = result; });
        return;
    }
    for_lanes(present, [&](int lane) {
        WarpCall& own = thread_of(warp, lane).call;
        own.result = 0;
        for_lanes(present, [&](int other) {
            if (thread_of(warp, other).call.value == own.value) own.result |= bit(other);
        });
    });
}

// The values that the lanes of a shuffle read; fails where one reads a lane that does not take part.
void find_shuffled(Warp& warp, unsigned present) {
    for_lanes(present, [&](int lane) {
        WarpCall& own = thread_of(warp, lane).call;
        const int source = source_lane(own, lane);
        if (!(present & bit(source)))
            fail(std::string(name_of(own)) + ": " + describe(thread_of(warp, lane)) + " reads lane " +
                     std::to_string(source) +
                     (own.mask & bit(source) ? ", which has exited" : ", which is not in mask ") +
                     (own.mask & bit(source) ? "" : lanes_text(own.mask)),
                 own.site);
        own.result = thread_of(warp, source).call.value;
    });
}

// Whether all lanes of the call's mask have come; if so, they have their results and may go on.
bool complete(Warp& warp, const WarpCall call) {
    const unsigned present = call.mask & ~warp.exited;
    if (present & ~warp.waiting) return false;
    bool all_same = true;
    if (!warp.waits_for_one)
        for_lanes(present, [&](int lane) { all_same = all_same && belong_together(thread_of(warp, lane).call, call); });
    if (!all_same) return false;
    ++launching->report.warp_operations;
    find_results(warp, call, present);
    if (is_shuffle(call.operation)) find_shuffled(warp, present);
    order_lanes(warp, call.mask, call.operation == WarpOperation::synchronize);
    warp.waiting &= ~present;
    for_lanes(present, [&](int lane) {
        Thread& thread = thread_of(warp, lane);
        if (thread.waits == Waits::in_warp) make_ready(thread);
    });
    return true;
}

void check_call(const Thread& thread, const WarpCall& call) {
    const std::string name = name_of(call);
    if (!(call.mask & bit(thread.lane)))
        fail(name + ": mask " + lanes_text(call.mask) + " lacks the calling lane, " + std::to_string(thread.lane),
             call.site);
    if (is_shuffle(call.operation) && (call.width < 1 || call.width > 32 || (call.width & (call.width - 1))))
        fail(name + ": a width of " + std::to_string(call.width) + " is no power of two up to 32", call.site);
    // Two lanes that wait for each other in different calls wait for ever.
    Warp& warp = *thread.warp;
    if (!warp.waiting) warp.first_call = call, warp.waits_for_one = true;
    if (warp.waits_for_one && belong_together(warp.first_call, call)) return;
    warp.waits_for_one = false;
    for_lanes(call.mask & warp.waiting, [&](int lane) {
        const Thread& other = thread_of(warp, lane);
        if (!(other.call.mask & bit(thread.lane)) || belong_together(other.call, call)) return;
        fail(name + " with mask " + lanes_text(call.mask) + ": " + describe(other) + " waits in " +
                 name_of(other.call) + " with mask " + lanes_text(other.call.mask) + " at " + describe(other.call.site),
             call.site);
    });
}

}  // namespace

uint64_t warp_operation(WarpOperation operation, unsigned mask, uint64_t value, int parameter, int width, Site site) {
    Thread& thread = current_thread(names[static_cast<int>(operation)], site);
    Warp& warp = *thread.warp;
    thread.call = {operation, mask, parameter, width, value, 0, site};
    check_call(thread, thread.call);
    warp.waiting |= bit(thread.lane);
    if (complete(warp, thread.call))
        run_others();
    else
        wait(thread, Waits::in_warp, site);
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

}  // namespace emulator

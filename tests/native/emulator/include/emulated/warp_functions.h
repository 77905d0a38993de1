// Barriers, fences, and what the lanes of a warp do together.
#pragma once

#include "emulator.h"

namespace emulator {

template <class T>
T exchange(WarpOperation operation, unsigned mask, T value, int parameter, int width, Site site) {
    static_assert(sizeof(T) <= 8, "at most 8 bytes are exchanged at once");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = warp_operation(operation, mask, bits, parameter, width, site);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace emulator

#define EMULATED_SITE emulator::Site site = emulator::site()

inline void __syncthreads(EMULATED_SITE) { emulator::block_barrier(emulator::BarrierResult::none, false, site); }
inline int __syncthreads_count(int predicate, EMULATED_SITE) {
    return emulator::block_barrier(emulator::BarrierResult::count, predicate != 0, site);
}
inline int __syncthreads_and(int predicate, EMULATED_SITE) {
    return emulator::block_barrier(emulator::BarrierResult::all, predicate != 0, site);
}
inline int __syncthreads_or(int predicate, EMULATED_SITE) {
    return emulator::block_barrier(emulator::BarrierResult::any, predicate != 0, site);
}
inline void __threadfence(EMULATED_SITE) { emulator::fence(site); }
inline void __threadfence_system(EMULATED_SITE) { emulator::fence(site); }
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { emulator::yield(); }
[[noreturn]] inline void __trap(EMULATED_SITE) { emulator::fail("__trap()", site); }

inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATED_SITE) {
    emulator::warp_operation(emulator::WarpOperation::synchronize, mask, 0, 0, 32, site);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMULATED_SITE) {
    return emulator::exchange(emulator::WarpOperation::shuffle, mask, value, lane, width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, EMULATED_SITE) {
    return emulator::exchange(emulator::WarpOperation::shuffle_up, mask, value, int(distance), width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, EMULATED_SITE) {
    return emulator::exchange(emulator::WarpOperation::shuffle_down, mask, value, int(distance), width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, EMULATED_SITE) {
    return emulator::exchange(emulator::WarpOperation::shuffle_xor, mask, value, lane_mask, width, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATED_SITE) {
    return unsigned(emulator::warp_operation(emulator::WarpOperation::ballot, mask, predicate != 0, 0, 32, site));
}
inline int __any_sync(unsigned mask, int predicate, EMULATED_SITE) {
    return int(emulator::warp_operation(emulator::WarpOperation::any, mask, predicate != 0, 0, 32, site));
}
inline int __all_sync(unsigned mask, int predicate, EMULATED_SITE) {
    return int(emulator::warp_operation(emulator::WarpOperation::all, mask, predicate != 0, 0, 32, site));
}
// The mask of the lanes that run together is the hardware's choice: here a lane is always on its own.
inline unsigned __activemask() { return 1u << emulator::lane(); }

inline unsigned __reduce_add_sync(unsigned mask, unsigned value, EMULATED_SITE) {
    return unsigned(emulator::warp_operation(emulator::WarpOperation::add, mask, value, 0, 32, site));
}
inline int __reduce_add_sync(unsigned mask, int value, EMULATED_SITE) {
    return int(emulator::warp_operation(emulator::WarpOperation::add, mask, unsigned(value), 0, 32, site));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, EMULATED_SITE) {
    return unsigned(emulator::warp_operation(emulator::WarpOperation::minimum, mask, value, 0, 32, site));
}
inline int __reduce_min_sync(unsigned mask, int value, EMULATED_SITE) {
    return int(emulator::warp_operation(emulator::WarpOperation::signed_minimum, mask, unsigned(value), 0, 32, site));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, EMULATED_SITE) {
    return unsigned(emulator::warp_operation(emulator::WarpOperation::maximum, mask, value, 0, 32, site));
}
inline int __reduce_max_sync(unsigned mask, int value, EMULATED_SITE) {
    return int(emulator::warp_operation(emulator::WarpOperation::signed_maximum, mask, unsigned(value), 0, 32, site));
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, EMULATED_SITE) {
    return unsigned(emulator::warp_operation(emulator::WarpOperation::bit_and, mask, value, 0, 32, site));
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, EMULATED_SITE) {
    return unsigned(emulator::warp_operation(emulator::WarpOperation::bit_or, mask, value, 0, 32, site));
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, EMULATED_SITE) {
    return unsigned(emulator::warp_operation(emulator::WarpOperation::bit_xor, mask, value, 0, 32, site));
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, EMULATED_SITE) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return unsigned(emulator::warp_operation(emulator::WarpOperation::match_any, mask, bits, 0, 32, site));
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* all_equal, EMULATED_SITE) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    const auto equal = unsigned(emulator::warp_operation(emulator::WarpOperation::match_all, mask, bits, 0, 32, site));
    *all_equal = equal != 0;
    return equal;
}

// What a kernel can do wrong, once each. The line of a fault is marked by the name that the tests look for.
#include "checked_memory.h"

__device__ int own_index() { return int(blockIdx.x * blockDim.x + threadIdx.x); }

__global__ void missing_barrier(float* out) {
    CHECKED_SHARED(float, memory, 64);
    memory.store(threadIdx.x, 1);
    checked::store(out + own_index(), memory.load(63 - threadIdx.x));  // race: missing_barrier
}

// Written, and ordered; but the next round writes before the last has been read.
__global__ void missing_second_barrier(float* out) {
    CHECKED_SHARED(float, memory, 64);
    for (int round = 0; round < 2; ++round) {
        memory.store(threadIdx.x, float(round));  // race: missing_second_barrier
        __syncthreads();
        checked::store(out + own_index(), memory.load(63 - threadIdx.x));  // race: missing_second_barrier
    }
}

// Lanes of a warp do not run in step.
__global__ void missing_syncwarp(float* out, bool synchronize) {
    CHECKED_SHARED(float, memory, 32);
    memory.store(threadIdx.x, 1);
    if (synchronize) __syncwarp();
    checked::store(out + own_index(), memory.load(threadIdx.x ^ 1));  // race: missing_syncwarp
}

// What a vote orders by chance, and not by promise.
__global__ void vote_for_syncwarp(float* out) {
    CHECKED_SHARED(float, memory, 32);
    memory.store(threadIdx.x, 1);
    __any_sync(0xffffffffu, 1);
    checked::store(out + own_index(), memory.load(threadIdx.x ^ 1));  // race: vote_for_syncwarp
}

// Pairs of lanes are in order, each with its own mask; what lies beyond a pair is not.
__global__ void order_of_pairs(float* out, int distance) {
    CHECKED_SHARED(float, memory, 32);
    memory.store(threadIdx.x, 1);
    __syncwarp(3u << (threadIdx.x & ~1u));
    checked::store(out + own_index(), memory.load(threadIdx.x ^ distance));  // race: order_of_pairs
}

__global__ void divergent_barrier(float* out) {
    if (threadIdx.x < 48) __syncthreads();  // divergent_barrier
    checked::store(out + own_index(), 1);
}

__global__ void two_barriers(float* out) {
    if (threadIdx.x % 2)
        __syncthreads();  // two_barriers: odd
    else
        __syncthreads();  // two_barriers: even
    checked::store(out + own_index(), 1);
}

__global__ void mask_without_caller(int* out) {
    checked::store(out + own_index(), __shfl_sync(0x0000ffffu, 1, 0));  // mask_without_caller
}

__global__ void source_outside_mask(int* out) {
    if (threadIdx.x >= 16) return;
    checked::store(out + own_index(), __shfl_xor_sync(0x0000ffffu, 1, 16));  // source_outside_mask
}

__global__ void source_has_exited(int* out) {
    if (threadIdx.x >= 16) return;
    checked::store(out + own_index(), __shfl_xor_sync(0xffffffffu, 1, 16));  // source_has_exited
}

// Half of the warp is in another call.
__global__ void two_shuffles(int* out) {
    int value;
    if (threadIdx.x < 16)
        value = __shfl_sync(0xffffffffu, 1, 0);  // two_shuffles: low
    else
        value = __shfl_sync(0xffffffffu, 2, 0);  // two_shuffles: high
    checked::store(out + own_index(), value);
}

__global__ void masks_differ(int* out) {
    checked::store(out + own_index(), __any_sync(threadIdx.x < 16 ? 0x7fffffffu : 0xffffffffu, 1));  // masks_differ
}

__global__ void bad_width(int* out) {
    checked::store(out + own_index(), __shfl_sync(0xffffffffu, 1, 0, 12));  // bad_width
}

__global__ void one_too_far(float* out, int count) {
    if (int(threadIdx.x) <= count) checked::store(out + own_index(), 1);  // one_too_far
}

__global__ void writes_input(const float* in) {
    auto* const input = const_cast<float*>(in);  // NOLINT(cppcoreguidelines-pro-type-const-cast): the fault
    checked::store(input + threadIdx.x, 1);      // writes_input
}

__global__ void unwritten(float* out) {
    CHECKED_SHARED(float, memory, 32);
    if (threadIdx.x != 7) memory.store(threadIdx.x, 1);
    __syncthreads();
    checked::store(out + own_index(), memory.load(threadIdx.x));  // unwritten
}

__global__ void past_the_end_of_shared(float* out) {
    CHECKED_SHARED(float, first, 32);
    CHECKED_SHARED(float, second, 32);
    second.store(threadIdx.x, 1);
    first.store(threadIdx.x + 1, 1);  // past_the_end_of_shared
    checked::store(out + own_index(), 1);
}

// Two elements at a time, without the last of an odd number.
__global__ void missing_tail(const float* in, float* out, int count) {
    for (int i = threadIdx.x; i < count / 2; i += blockDim.x)
        for (int k = 0; k < 2; ++k) checked::store(out + 2 * i + k, checked::load(in + 2 * i + k));
}

// A row a thread.
__global__ void a_row_each(float* out, int columns) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    for (int i = 0; i < columns; ++i) checked::store(out + row * columns + i, 1);
}

__global__ void misaligned(const float* in, float4* out) {
    checked::store(out + own_index(),
                   checked::load(reinterpret_cast<const float4*>(in + 1) + threadIdx.x));  // misaligned
}

// Through global memory, as through shared.
__global__ void race_in_global(float* out) {
    checked::store(out + threadIdx.x, 1);
    checked::load(out + 63 - threadIdx.x);  // race_in_global
}

__global__ void two_writers(float* out) {
    checked::store(out + threadIdx.x, float(blockIdx.x));  // two_writers
}

// One block tells another that its value is there, with or without a fence before.
__global__ void message(float* out, unsigned* flag, bool fence) {
    if (threadIdx.x != 0) return;
    if (blockIdx.x == 0) {
        checked::store(out, 1);
        if (fence) __threadfence();
        atomicExch(flag, 1);
    } else {
        while (atomicAdd(flag, 0) == 0) __nanosleep(64);
        __threadfence();
        checked::store(out + 1, checked::load(out));  // missing_fence
    }
}

// So may one warp of a block tell another.
__global__ void message_of_a_warp(float* out, unsigned* flag) {
    if (threadIdx.x < 32) {
        checked::store(out + threadIdx.x, 1);
        __threadfence();
        __syncwarp();
        if (threadIdx.x == 0) atomicExch(flag, 1);
        return;
    }
    if (threadIdx.x == 32)
        while (atomicAdd(flag, 0) == 0) __nanosleep(64);
    __syncwarp();
    __threadfence();
    checked::store(out + threadIdx.x, checked::load(out + threadIdx.x - 32));
}

// The fence may be another thread's, behind a barrier.
__global__ void message_of_a_block(float* out, unsigned* flag, bool barrier) {
    if (blockIdx.x == 0) {
        checked::store(out + threadIdx.x, 1);
        if (barrier) __syncthreads();
        if (threadIdx.x == 0) __threadfence(), atomicExch(flag, 1);
    } else {
        if (threadIdx.x == 0) {
            while (atomicAdd(flag, 0) == 0) __nanosleep(64);
            __threadfence();
        }
        __syncthreads();
        checked::store(out + 64 + threadIdx.x, checked::load(out + threadIdx.x));  // fence_of_one_thread
    }
}

// Some wait at the barrier for a lane that waits in a shuffle for them.
__global__ void deadlock() {
    if (threadIdx.x == 0)
        __shfl_sync(0xffffffffu, 1, 0);  // deadlock: shuffle
    else
        __syncthreads();  // deadlock: barrier
}

__global__ void waits_for_ever(unsigned* flag) {
    while (atomicAdd(flag, 0) == 0) __nanosleep(64);
}

__global__ void traps() { __trap(); }  // traps

__global__ void too_much_static_shared() {
    CHECKED_SHARED(double, memory, 6145);  // too_much_static_shared
    memory.store(0, 0);
}

__global__ void static_and_dynamic_shared() {
    CHECKED_SHARED(double, memory, 2048);  // static_and_dynamic_shared
    memory.store(0, 0);
}

extern "C" const char* run_fault(int which, float* out, const float* in, int count) {
    const auto run = [&] {
        auto* integers = reinterpret_cast<int*>(out);
        auto* flag = reinterpret_cast<unsigned*>(out + 200);
        *flag = 0;
        switch (which) {
            case 0:
                return CHECKED_LAUNCH(missing_barrier, 2, 64, 0, nullptr, out);
            case 1:
                return CHECKED_LAUNCH(missing_second_barrier, 2, 64, 0, nullptr, out);
            case 2:
                return CHECKED_LAUNCH(missing_syncwarp, 2, 32, 0, nullptr, out, false);
            case 3:
                return CHECKED_LAUNCH(order_of_pairs, 2, 32, 0, nullptr, out, 2);
            case 4:
                return CHECKED_LAUNCH(divergent_barrier, 2, 64, 0, nullptr, out);
            case 5:
                return CHECKED_LAUNCH(two_barriers, 2, 64, 0, nullptr, out);
            case 6:
                return CHECKED_LAUNCH(mask_without_caller, 2, 32, 0, nullptr, integers);
            case 7:
                return CHECKED_LAUNCH(source_outside_mask, 2, 32, 0, nullptr, integers);
            case 8:
                return CHECKED_LAUNCH(source_has_exited, 2, 32, 0, nullptr, integers);
            case 9:
                return CHECKED_LAUNCH(two_shuffles, 2, 32, 0, nullptr, integers);
            case 10:
                return CHECKED_LAUNCH(masks_differ, 2, 32, 0, nullptr, integers);
            case 11:
                return CHECKED_LAUNCH(bad_width, 2, 32, 0, nullptr, integers);
            case 12:
                return CHECKED_LAUNCH(one_too_far, 1, 64, 0, nullptr, out, count);
            case 13:
                return CHECKED_LAUNCH(writes_input, 1, 32, 0, nullptr, in);
            case 14:
                return CHECKED_LAUNCH(unwritten, 2, 32, 0, nullptr, out);
            case 15:
                return CHECKED_LAUNCH(past_the_end_of_shared, 2, 32, 0, nullptr, out);
            case 16:
                return CHECKED_LAUNCH(missing_tail, 1, 32, 0, nullptr, in, out, count);
            case 17:
                return CHECKED_LAUNCH(a_row_each, count / 10 / 32, 32, 0, nullptr, out, 10);
            case 18:
                return CHECKED_LAUNCH(misaligned, 1, 8, 0, nullptr, in, reinterpret_cast<float4*>(out));
            case 19:
                return EMULATOR_LAUNCH(deadlock, 1, 32, 0, nullptr);
            case 20:
                return CHECKED_LAUNCH(waits_for_ever, 1, 32, 0, nullptr, reinterpret_cast<unsigned*>(out));
            case 21:
                return EMULATOR_LAUNCH(traps, 1, 32, 0, nullptr);
            case 22:
                return EMULATOR_LAUNCH(too_much_static_shared, 1, 32, 0, nullptr);
            case 23:
                return EMULATOR_LAUNCH(static_and_dynamic_shared, 1, 32, 40 << 10, nullptr);
            case 24:
                return CHECKED_LAUNCH(race_in_global, 1, 64, 0, nullptr, out);
            case 25:
                return CHECKED_LAUNCH(two_writers, 2, 32, 0, nullptr, out);
            case 26:
                return EMULATOR_LAUNCH_COOPERATIVE(message, 2, 32, 0, nullptr, out, flag, false);
            case 27:
                return EMULATOR_LAUNCH_COOPERATIVE(message_of_a_block, 2, 64, 0, nullptr, out, flag, false);
            // And those that are right.
            case 32:
                return CHECKED_LAUNCH(missing_syncwarp, 2, 32, 0, nullptr, out, true);
            case 33:
                return CHECKED_LAUNCH(order_of_pairs, 2, 32, 0, nullptr, out, 1);
            case 34:
                return EMULATOR_LAUNCH_COOPERATIVE(message, 2, 32, 0, nullptr, out, flag, true);
            case 35:
                return EMULATOR_LAUNCH_COOPERATIVE(message_of_a_block, 2, 64, 0, nullptr, out, flag, true);
            case 36:
                return CHECKED_LAUNCH(message_of_a_warp, 1, 64, 0, nullptr, out, flag);
            case 37:
                return CHECKED_LAUNCH(vote_for_syncwarp, 2, 32, 0, nullptr, out);
            default:
                throw emulator::Error("there is no such fault");
        }
    };
    return emulator::guarded(run);
}

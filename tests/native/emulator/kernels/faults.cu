// One kernel for each fault that the emulator must find. A comment with the kernel's name marks the line of the fault.
#include "kernels.h"

__global__ void missing_barrier(float* out) {
    KDDP_SHARED(float, memory, 64);
    memory.store(threadIdx.x, 1);
    store_global(out + own_index(), memory.load(63 - threadIdx.x));  // missing_barrier
}

// The second round writes before all threads have read the first.
__global__ void missing_second_barrier(float* out) {
    KDDP_SHARED(float, memory, 64);
    for (int round = 0; round < 2; ++round) {
        memory.store(threadIdx.x, float(round));  // missing_second_barrier
        __syncthreads();
        store_global(out + own_index(), memory.load(63 - threadIdx.x));  // missing_second_barrier
    }
}

// The lanes of a warp do not run in lockstep.
__global__ void missing_syncwarp(float* out, bool synchronize) {
    KDDP_SHARED(float, memory, 32);
    memory.store(threadIdx.x, 1);
    if (synchronize) __syncwarp();
    store_global(out + own_index(), memory.load(threadIdx.x ^ 1));  // missing_syncwarp
}

__global__ void divergent_barrier(float* out) {
    if (threadIdx.x < 48) __syncthreads();  // divergent_barrier
    store_global(out + own_index(), 1.0f);
}

__global__ void two_barriers(float* out) {
    if (threadIdx.x % 2)
        __syncthreads();  // two_barriers
    else
        __syncthreads();  // two_barriers
    store_global(out + own_index(), 1.0f);
}

__global__ void mask_without_caller(int* out) {
    store_global(out + own_index(), __shfl_sync(0x0000ffffu, 1, 0));  // mask_without_caller
}

__global__ void source_outside_mask(int* out) {
    if (threadIdx.x >= 16) return;
    store_global(out + own_index(), __shfl_xor_sync(0x0000ffffu, 1, 16));  // source_outside_mask
}

__global__ void source_has_exited(int* out) {
    if (threadIdx.x >= 16) return;
    store_global(out + own_index(), __shfl_xor_sync(0xffffffffu, 1, 16));  // source_has_exited
}

// Half of the warp is in another call.
__global__ void two_shuffles(int* out) {
    int value;
    if (threadIdx.x < 16)
        value = __shfl_sync(0xffffffffu, 1, 0);  // two_shuffles
    else
        value = __shfl_sync(0xffffffffu, 2, 0);  // two_shuffles
    store_global(out + own_index(), value);
}

__global__ void masks_differ(int* out) {
    store_global(out + own_index(), __any_sync(threadIdx.x < 16 ? 0x7fffffffu : 0xffffffffu, 1));  // masks_differ
}

__global__ void one_too_far(float* out, int count) {
    if (int(threadIdx.x) <= count) store_global(out + own_index(), 1.0f);  // one_too_far
}

__global__ void writes_input(const float* in) {
    auto* const input = const_cast<float*>(in);  // NOLINT(cppcoreguidelines-pro-type-const-cast): the fault
    store_global(input + threadIdx.x, 1.0f);     // writes_input
}

__global__ void unwritten(float* out) {
    KDDP_SHARED(float, memory, 32);
    if (threadIdx.x != 7) memory.store(threadIdx.x, 1);
    __syncthreads();
    store_global(out + own_index(), memory.load(threadIdx.x));  // unwritten
}

__global__ void past_the_end_of_shared(float* out) {
    KDDP_SHARED(float, first, 32);
    KDDP_SHARED(float, second, 32);
    second.store(threadIdx.x, 1);
    first.store(threadIdx.x + 1, 1);  // past_the_end_of_shared
    store_global(out + own_index(), 1.0f);
}

// Copies two elements at a time, and forgets the last one of an odd number.
__global__ void missing_tail(const float* in, float* out, int count) {
    for (int i = threadIdx.x; i < count / 2; i += blockDim.x)
        for (int k = 0; k < 2; ++k) store_global(out + 2 * i + k, load_global(in + 2 * i + k));
}

__global__ void misaligned(const float* in) { load_input<16>(in + 1 + 4 * threadIdx.x); }  // misaligned

__global__ void race_in_global(float* out) {
    store_global(out + threadIdx.x, 1.0f);
    load_workspace(out + 63 - threadIdx.x);  // race_in_global
}

__global__ void two_writers(float* out) {
    store_global(out + threadIdx.x, float(blockIdx.x));  // two_writers
}

// One block tells another that its value is there, with or without a fence before.
__global__ void missing_fence(float* out, unsigned* flag, bool fence) {
    if (threadIdx.x != 0) return;
    if (blockIdx.x == 0) {
        store_global(out, 1.0f);
        if (fence) __threadfence();
        atomicAdd(flag, 1);
    } else {
        while (atomicAdd(flag, 0) == 0) emulator::yield();
        __threadfence();
        store_global(out + 1, load_workspace(out));  // missing_fence
    }
}

// One warp may tell another warp of its block in the same way.
__global__ void message_of_a_warp(float* out, unsigned* flag) {
    if (threadIdx.x < 32) {
        store_global(out + threadIdx.x, 1.0f);
        __threadfence();
        __syncwarp();
        if (threadIdx.x == 0) atomicAdd(flag, 1);
        return;
    }
    if (threadIdx.x == 32)
        while (atomicAdd(flag, 0) == 0) emulator::yield();
    __syncwarp();
    __threadfence();
    store_global(out + threadIdx.x, load_workspace(out + threadIdx.x - 32));
}

// One thread may fence for its block if a barrier comes before.
__global__ void missing_barrier_before_fence(float* out, unsigned* flag, bool barrier) {
    if (blockIdx.x == 0) {
        store_global(out + threadIdx.x, 1.0f);
        if (barrier) __syncthreads();
        if (threadIdx.x == 0) __threadfence(), atomicAdd(flag, 1);
    } else {
        if (threadIdx.x == 0) {
            while (atomicAdd(flag, 0) == 0) emulator::yield();
            __threadfence();
        }
        __syncthreads();
        store_global(out + 64 + threadIdx.x, load_workspace(out + threadIdx.x));  // missing_barrier_before_fence
    }
}

// Some threads wait at the barrier for a lane that waits for them in a shuffle.
__global__ void deadlock() {
    if (threadIdx.x == 0)
        __shfl_sync(0xffffffffu, 1, 0);
    else
        __syncthreads();
}

__global__ void waits_forever(unsigned* flag) {
    while (atomicAdd(flag, 0) == 0) emulator::yield();
}

__global__ void too_much_static_shared() {
    KDDP_SHARED(double, memory, 6145);  // too_much_static_shared
    memory.store(0, 0);
}

__global__ void static_and_dynamic_shared() {
    KDDP_SHARED(double, memory, 2048);  // static_and_dynamic_shared
    memory.store(0, 0);
}

// Runs the kernel of this name, or a variant of it without the fault.
extern "C" const char* run_fault(const char* name, float* out, const float* in, int64_t count) {
    auto* integers = reinterpret_cast<int*>(out);
    auto* flag = reinterpret_cast<unsigned*>(out + 200);
    *flag = 0;
    const std::pair<const char*, std::function<void()>> runs[] = {
        {"missing_barrier", [&] { EMULATOR_LAUNCH(missing_barrier, 2, 64, 0, nullptr, out); }},
        {"missing_second_barrier", [&] { EMULATOR_LAUNCH(missing_second_barrier, 2, 64, 0, nullptr, out); }},
        {"missing_syncwarp", [&] { EMULATOR_LAUNCH(missing_syncwarp, 2, 32, 0, nullptr, out, false); }},
        {"divergent_barrier", [&] { EMULATOR_LAUNCH(divergent_barrier, 2, 64, 0, nullptr, out); }},
        {"two_barriers", [&] { EMULATOR_LAUNCH(two_barriers, 2, 64, 0, nullptr, out); }},
        {"mask_without_caller", [&] { EMULATOR_LAUNCH(mask_without_caller, 2, 32, 0, nullptr, integers); }},
        {"source_outside_mask", [&] { EMULATOR_LAUNCH(source_outside_mask, 2, 32, 0, nullptr, integers); }},
        {"source_has_exited", [&] { EMULATOR_LAUNCH(source_has_exited, 2, 32, 0, nullptr, integers); }},
        {"two_shuffles", [&] { EMULATOR_LAUNCH(two_shuffles, 2, 32, 0, nullptr, integers); }},
        {"masks_differ", [&] { EMULATOR_LAUNCH(masks_differ, 2, 32, 0, nullptr, integers); }},
        {"one_too_far", [&] { EMULATOR_LAUNCH(one_too_far, 1, 64, 0, nullptr, out, int(count)); }},
        {"writes_input", [&] { EMULATOR_LAUNCH(writes_input, 1, 32, 0, nullptr, in); }},
        {"unwritten", [&] { EMULATOR_LAUNCH(unwritten, 2, 32, 0, nullptr, out); }},
        {"past_the_end_of_shared", [&] { EMULATOR_LAUNCH(past_the_end_of_shared, 2, 32, 0, nullptr, out); }},
        {"missing_tail", [&] { EMULATOR_LAUNCH(missing_tail, 1, 32, 0, nullptr, in, out, int(count)); }},
        {"misaligned", [&] { EMULATOR_LAUNCH(misaligned, 1, 8, 0, nullptr, in); }},
        {"race_in_global", [&] { EMULATOR_LAUNCH(race_in_global, 1, 64, 0, nullptr, out); }},
        {"two_writers", [&] { EMULATOR_LAUNCH(two_writers, 2, 32, 0, nullptr, out); }},
        {"missing_fence", [&] { EMULATOR_LAUNCH_COOPERATIVE(missing_fence, 2, 32, 0, nullptr, out, flag, false); }},
        {"missing_barrier_before_fence",
         [&] { EMULATOR_LAUNCH_COOPERATIVE(missing_barrier_before_fence, 2, 64, 0, nullptr, out, flag, false); }},
        {"deadlock", [&] { EMULATOR_LAUNCH(deadlock, 1, 32, 0, nullptr); }},
        {"waits_forever", [&] { EMULATOR_LAUNCH(waits_forever, 1, 32, 0, nullptr, flag); }},
        {"too_much_static_shared", [&] { EMULATOR_LAUNCH(too_much_static_shared, 1, 32, 0, nullptr); }},
        {"static_and_dynamic_shared", [&] { EMULATOR_LAUNCH(static_and_dynamic_shared, 1, 32, 40 << 10, nullptr); }},
        {"correct syncwarp", [&] { EMULATOR_LAUNCH(missing_syncwarp, 2, 32, 0, nullptr, out, true); }},
        {"correct fence", [&] { EMULATOR_LAUNCH_COOPERATIVE(missing_fence, 2, 32, 0, nullptr, out, flag, true); }},
        {"correct barrier before fence",
         [&] { EMULATOR_LAUNCH_COOPERATIVE(missing_barrier_before_fence, 2, 64, 0, nullptr, out, flag, true); }},
        {"correct message of a warp", [&] { EMULATOR_LAUNCH(message_of_a_warp, 1, 64, 0, nullptr, out, flag); }},
    };
    for (const auto& [known, run] : runs)
        if (!std::strcmp(known, name)) return emulator::guarded(run);
    return "there is no such fault";
}

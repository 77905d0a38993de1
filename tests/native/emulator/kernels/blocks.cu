// Blocks that work together: by waiting for each other, or by letting the last one finish.
#include "checked_memory.h"

// Every block writes its number, waits for all, and reads its neighbour's.
__global__ void exchange_with_neighbour(int* numbers, int* seen, unsigned* arrived) {
    if (threadIdx.x == 0) {
        checked::store(numbers + blockIdx.x, int(blockIdx.x) + 1);
        __threadfence();
        atomicAdd(arrived, 1);
        while (atomicAdd(arrived, 0) < gridDim.x) __nanosleep(64);
        __threadfence();
    }
    __syncthreads();
    if (threadIdx.x == 1) checked::store(seen + blockIdx.x, checked::load(numbers + (blockIdx.x + 1) % gridDim.x));
}

// The sum of 1 for every thread, by way of each block's.
__global__ void count_threads(int* partial, int* total, unsigned* tickets) {
    CHECKED_SHARED(int, is_last, 1);
    const int count = __syncthreads_count(1);
    if (threadIdx.x == 0) {
        checked::store(partial + blockIdx.x, count);
        __threadfence();
        is_last.store(0, atomicInc(tickets, gridDim.x - 1) == gridDim.x - 1);
    }
    __syncthreads();
    if (!is_last.load(0) || threadIdx.x != 0) return;
    __threadfence();
    int sum = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) sum += checked::load(partial + i);
    checked::store(total, sum);
}

// A histogram in shared memory, added to one in global memory.
__global__ void histogram(const int* values, int count, int* bins) {
    CHECKED_SHARED(int, own, 16);
    if (threadIdx.x < 16) own.store(threadIdx.x, 0);
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
        atomicAdd(own.data + checked::load(values + i), 1);
    __syncthreads();
    if (threadIdx.x < 16) atomicAdd(bins + threadIdx.x, own.load(threadIdx.x));
}

// In which order threads come to one counter.
__global__ void take_turns(unsigned* counter, unsigned* turns) {
    checked::store(turns + blockIdx.x * blockDim.x + threadIdx.x, atomicAdd(counter, 1));
}

extern "C" {
const char* run_exchange(int* numbers, int* seen, unsigned* arrived, int blocks, int cooperative) {
    return emulator::guarded([&] {
        if (cooperative)
            EMULATOR_LAUNCH_COOPERATIVE(exchange_with_neighbour, blocks, 64, 0, nullptr, numbers, seen, arrived);
        else
            EMULATOR_LAUNCH(exchange_with_neighbour, blocks, 64, 0, nullptr, numbers, seen, arrived);
    });
}
const char* run_count_threads(int* partial, int* total, unsigned* tickets, int blocks, int threads) {
    return emulator::guarded(
        [&] { CHECKED_LAUNCH(count_threads, blocks, threads, 0, nullptr, partial, total, tickets); });
}
const char* run_histogram(const int* values, int count, int* bins) {
    return emulator::guarded([&] { CHECKED_LAUNCH(histogram, 3, 96, 0, nullptr, values, count, bins); });
}
const char* run_take_turns(unsigned* counter, unsigned* turns, int blocks, int threads) {
    return emulator::guarded([&] { CHECKED_LAUNCH(take_turns, blocks, threads, 0, nullptr, counter, turns); });
}
}

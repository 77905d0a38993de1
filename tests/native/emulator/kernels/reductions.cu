// Sums over warps and blocks.
#include "checked_memory.h"

__global__ void sum_of_warp(const float* values, float* sums) {
    float sum = checked::load(values + threadIdx.x);
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(0xffffffffu, sum, distance);
    if (threadIdx.x % 32 == 0) checked::store(sums + threadIdx.x / 32, sum);
}

// One block a row.
__global__ void sum_of_block(const float* values, float* sums, int columns) {
    CHECKED_SHARED(float, of_warps, 32);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float sum = 0;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) sum += checked::load(values + blockIdx.x * columns + i);
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (lane == 0) of_warps.store(warp, sum);
    __syncthreads();
    sum = lane < int(blockDim.x) / 32 ? of_warps.load(lane) : 0;
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (threadIdx.x == 0) checked::store(sums + blockIdx.x, sum);
}

// The same in a tree through dynamic shared memory.
__global__ void sum_by_tree(const float* values, float* sums, int columns) {
    CHECKED_DYNAMIC_SHARED(float, tree);
    const int i = threadIdx.x;
    tree.store(i, i < columns ? checked::load(values + blockIdx.x * columns + i) : 0);
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (i < half) tree.store(i, tree.load(i) + tree.load(i + half));
    }
    if (i == 0) checked::store(sums + blockIdx.x, tree.load(0));
}

extern "C" const char* run_sum_of_warp(const float* values, float* sums, int threads) {
    return emulator::guarded([&] { CHECKED_LAUNCH(sum_of_warp, 1, threads, 0, nullptr, values, sums); });
}
extern "C" const char* run_sum_of_block(const float* values, float* sums, int rows, int columns, int threads) {
    return emulator::guarded([&] { CHECKED_LAUNCH(sum_of_block, rows, threads, 0, nullptr, values, sums, columns); });
}
extern "C" const char* run_sum_by_tree(const float* values, float* sums, int rows, int columns, int threads) {
    return emulator::guarded(
        [&] { CHECKED_LAUNCH(sum_by_tree, rows, threads, threads * sizeof(float), nullptr, values, sums, columns); });
}

// Copies whose sectors and bank conflicts one can count by hand.
#include "checked_memory.h"

template <class T>
__global__ void copy(const T* from, T* to, int count, int stride) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) checked::store(to + i, checked::load(from + i * stride));
}

// A tile of 32 rows and columns a block, of 256 threads; `pitch` words lie between the rows of the tile.
__global__ void transpose(const float* from, float* to, int rows, int columns, int pitch) {
    CHECKED_SHARED(float, tile, 32 * 33);
    const int x = threadIdx.x, first_row = blockIdx.y * 32, first_column = blockIdx.x * 32;
    for (int y = threadIdx.y; y < 32; y += blockDim.y)
        if (first_row + y < rows && first_column + x < columns)
            tile.store(y * pitch + x, checked::load(from + (first_row + y) * columns + first_column + x));
    __syncthreads();
    for (int y = threadIdx.y; y < 32; y += blockDim.y)
        if (first_column + y < columns && first_row + x < rows)
            checked::store(to + (first_column + y) * rows + first_row + x, tile.load(x * pitch + y));
}

// Each of 32 lanes stores and loads a value of T, `stride` of T apart.
template <class T>
__global__ void pass_through_shared(int stride) {
    CHECKED_DYNAMIC_SHARED(T, memory);
    memory.store(threadIdx.x * stride, T());
    memory.load(threadIdx.x * stride);
}

extern "C" {
const char* run_copy(const float* from, float* to, int count, int stride) {
    return emulator::guarded(
        [&] { CHECKED_LAUNCH(copy<float>, (count + 63) / 64, 64, 0, nullptr, from, to, count, stride); });
}
const char* run_copy_of_vectors(const float4* from, float4* to, int count, int stride) {
    return emulator::guarded(
        [&] { CHECKED_LAUNCH(copy<float4>, (count + 63) / 64, 64, 0, nullptr, from, to, count, stride); });
}
// Without a block for the last elements.
const char* run_copy_with_too_few_blocks(const float* from, float* to, int count) {
    return emulator::guarded([&] { CHECKED_LAUNCH(copy<float>, count / 64, 64, 0, nullptr, from, to, count, 1); });
}
const char* run_transpose(const float* from, float* to, int rows, int columns, int pitch) {
    return emulator::guarded([&] {
        const dim3 grid((columns + 31) / 32, (rows + 31) / 32), block(32, 8);
        CHECKED_LAUNCH(transpose, grid, block, 0, nullptr, from, to, rows, columns, pitch);
    });
}
const char* run_pass_through_shared(int bytes, int stride) {
    const size_t all = size_t(bytes) * stride * 32;
    return emulator::guarded([&] {
        if (bytes == 1) CHECKED_LAUNCH(pass_through_shared<char>, 1, 32, all, nullptr, stride);
        if (bytes == 4) CHECKED_LAUNCH(pass_through_shared<float>, 1, 32, all, nullptr, stride);
        if (bytes == 8) CHECKED_LAUNCH(pass_through_shared<double>, 1, 32, all, nullptr, stride);
        if (bytes == 16) CHECKED_LAUNCH(pass_through_shared<float4>, 1, 32, all, nullptr, stride);
    });
}
}

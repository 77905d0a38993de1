// Kernels without faults, whose results, sectors and bank conflicts can be worked out by hand.
#include "kernels.h"

__global__ void copy(const float* from, float* to, int count, int stride) {
    const int i = own_index();
    if (i < count) store_global(to + i, load_global(from + i * stride));
}

// 16 bytes per thread.
__global__ void copy_vectors(const float* from, float* to, int stride) {
    kddp::store_words<16>(to + 4 * own_index(), load_input<16>(from + 4 * own_index() * stride));
}

// Each of 32 lanes stores and loads a value of T, at a distance of `stride` of T.
template <class T>
__global__ void pass_through_shared(int stride) {
    KDDP_DYNAMIC_SHARED(T, memory);
    memory.store(threadIdx.x * stride, T());
    memory.load(threadIdx.x * stride);
}

// One block per row.
__global__ void sum_of_block(const float* values, float* sums, int columns) {
    KDDP_SHARED(float, warp_sums, 32);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float sum = 0;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) sum += load_global(values + blockIdx.x * columns + i);
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (lane == 0) warp_sums.store(warp, sum);
    __syncthreads();
    sum = lane < int(blockDim.x) / 32 ? warp_sums.load(lane) : 0;
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (threadIdx.x == 0) store_global(sums + blockIdx.x, sum);
}

// Each block writes its number, waits for all blocks, and reads its neighbour's number.
__global__ void exchange_with_neighbour(int* numbers, int* seen, unsigned* arrived) {
    if (threadIdx.x == 0) {
        store_global(numbers + blockIdx.x, int(blockIdx.x) + 1);
        __threadfence();
        atomicAdd(arrived, 1);
        while (atomicAdd(arrived, 0) < gridDim.x) emulator::yield();
        __threadfence();
    }
    __syncthreads();
    if (threadIdx.x == 1) store_global(seen + blockIdx.x, load_workspace(numbers + (blockIdx.x + 1) % gridDim.x));
}

// In which order the threads arrive at a counter.
__global__ void take_turns(unsigned* counter, unsigned* turns) {
    store_global(turns + own_index(), atomicAdd(counter, 1));
}

namespace {

// Accesses that only the sanitizers see.
__global__ void read_beyond(const float* values, float* out, int count) {
    if (int(threadIdx.x) <= count) store_global(out + threadIdx.x, values[threadIdx.x]);
}
__global__ void use_local_array(float* out, int index) {
    const float local[8] = {};
    __syncthreads();
    store_global(out + threadIdx.x, local[index]);
}

}  // namespace

extern "C" {
int launch_copy(int64_t grid, int64_t block, int64_t shared, int64_t cooperative) {
    if (cooperative)
        EMULATOR_LAUNCH_COOPERATIVE(copy, unsigned(grid), unsigned(block), size_t(shared), nullptr, nullptr, nullptr, 0,
                                    1);
    else
        EMULATOR_LAUNCH(copy, unsigned(grid), unsigned(block), size_t(shared), nullptr, nullptr, nullptr, 0, 1);
    return cudaGetLastError();
}
const char* run_copy(const float* from, float* to, int64_t count, int64_t stride, int64_t blocks) {
    return emulator::guarded(
        [&] { EMULATOR_LAUNCH(copy, unsigned(blocks), 64, 0, nullptr, from, to, int(count), int(stride)); });
}
const char* run_copy_vectors(const float* from, float* to, int64_t count, int64_t stride) {
    return emulator::guarded(
        [&] { EMULATOR_LAUNCH(copy_vectors, unsigned(count / 64), 64, 0, nullptr, from, to, int(stride)); });
}
const char* run_pass_through_shared(int64_t bytes, int64_t stride) {
    const size_t all = size_t(bytes * stride * 32);
    return emulator::guarded([&] {
        if (bytes == 1) EMULATOR_LAUNCH(pass_through_shared<char>, 1, 32, all, nullptr, int(stride));
        if (bytes == 4) EMULATOR_LAUNCH(pass_through_shared<float>, 1, 32, all, nullptr, int(stride));
        if (bytes == 8) EMULATOR_LAUNCH(pass_through_shared<double>, 1, 32, all, nullptr, int(stride));
        if (bytes == 16) EMULATOR_LAUNCH(pass_through_shared<uint4>, 1, 32, all, nullptr, int(stride));
    });
}
const char* run_sum_of_block(const float* values, float* sums, int64_t rows, int64_t columns, int64_t threads) {
    return emulator::guarded([&] {
        EMULATOR_LAUNCH(sum_of_block, unsigned(rows), unsigned(threads), 0, nullptr, values, sums, int(columns));
    });
}
const char* run_exchange(int* numbers, int* seen, unsigned* arrived, int64_t blocks, int64_t cooperative) {
    return emulator::guarded([&] {
        if (cooperative)
            EMULATOR_LAUNCH_COOPERATIVE(exchange_with_neighbour, unsigned(blocks), 64, 0, nullptr, numbers, seen,
                                        arrived);
        else
            EMULATOR_LAUNCH(exchange_with_neighbour, unsigned(blocks), 64, 0, nullptr, numbers, seen, arrived);
    });
}
const char* run_take_turns(unsigned* counter, unsigned* turns, int64_t blocks, int64_t threads) {
    return emulator::guarded(
        [&] { EMULATOR_LAUNCH(take_turns, unsigned(blocks), unsigned(threads), 0, nullptr, counter, turns); });
}
const char* run_read_beyond(const float* values, float* out, int64_t count) {
    return emulator::guarded([&] { EMULATOR_LAUNCH(read_beyond, 1, 32, 0, nullptr, values, out, int(count)); });
}
const char* run_use_local_array(float* out, int64_t index) {
    return emulator::guarded([&] { EMULATOR_LAUNCH(use_local_array, 1, 32, 0, nullptr, out, int(index)); });
}
// These return null like the others, although they cannot fail.
const char* to_16_bits(const float* from, uint16_t* to, int64_t count, int64_t is_bfloat16) {
    for (int64_t i = 0; i < count; ++i)
        to[i] = is_bfloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(from[i]))
                            : __half_as_ushort(__float2half_rn(from[i]));
    return nullptr;
}
const char* from_float16(const uint16_t* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = __half2float(__ushort_as_half(from[i]));
    return nullptr;
}
}

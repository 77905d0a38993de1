// Sums and maxima over the threads of a warp, a team or a block. The order is fixed, so results are reproducible, and
// every thread gets the same one.
#pragma once

#include "cuda/memory.cuh"

namespace kddp {

constexpr unsigned all_lanes = 0xffffffffu;

// Over a warp, or over each of its groups of `lanes` lanes.
template <int lanes, class T>
KDDP_DEVICE T sum_of_lanes(T value) {
#pragma unroll
    for (int distance = lanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(all_lanes, value, distance);
    return value;
}

// Ignores NaN.
template <class T>
KDDP_DEVICE T larger(T a, T b) {
    if constexpr (sizeof(T) == 4)
        return fmaxf(a, b);
    else
        return fmax(a, b);
}

template <class T>
KDDP_DEVICE T magnitude(T a) {
    return a < 0 ? -a : a;
}

template <int lanes, class T>
KDDP_DEVICE T max_of_lanes(T value) {
#pragma unroll
    for (int distance = lanes / 2; distance > 0; distance /= 2)
        value = larger(value, __shfl_xor_sync(all_lanes, value, distance));
    return value;
}

// Over a block of up to 1024 threads; `scratch` holds 32 numbers.
template <class Scratch>
KDDP_DEVICE double sum_of_block(double value, Scratch scratch) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    value = sum_of_lanes<32>(value);
    __syncthreads();
    if (lane == 0) scratch.store(warp, value);
    __syncthreads();
    value = lane < static_cast<int>(blockDim.x / 32) ? scratch.load(lane) : 0;
    return sum_of_lanes<32>(value);
}

constexpr int whole_block = 1024;  // `lanes` of a team that is a whole block, whatever its size
constexpr int max_warps = 32, max_sums = 8;

// The threads that share a row of logits: 8 lanes, a warp or a whole block.
template <int lanes>
struct Team {
    static constexpr bool is_block = lanes == whole_block;
    static constexpr int lanes_in_warp = lanes < 32 ? lanes : 32;

    static KDDP_DEVICE int size() { return is_block ? static_cast<int>(blockDim.x) : lanes; }
    // The team's number in its block, and the thread's rank in its team.
    static KDDP_DEVICE int number() { return is_block ? 0 : opaque_thread() / lanes; }
    static KDDP_DEVICE int rank() { return is_block ? opaque_thread() : opaque_thread() % lanes; }
    static KDDP_DEVICE void sync() {
        if constexpr (is_block)
            __syncthreads();
        else
            __syncwarp();
    }
};

template <class T>
struct TeamRecord;

// Shared memory of a block's teams. Teams within a warp use their record only.
template <class T>
struct TeamScratch {
    SharedArray<T> maxima;     // 2 per warp
    SharedArray<double> sums;  // max_sums per warp
    SharedArray<double> valid_rows;
    TeamRecord<T>* records;  // 1 per team
};

template <int lanes, class T>
KDDP_DEVICE void maxima_of_team(T& first, T& second, const TeamScratch<T>& scratch) {
    first = max_of_lanes<Team<lanes>::lanes_in_warp>(first);
    second = max_of_lanes<Team<lanes>::lanes_in_warp>(second);
    if constexpr (Team<lanes>::is_block) {
        const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
        if (lane == 0) scratch.maxima.store(warp, first), scratch.maxima.store(max_warps + warp, second);
        __syncthreads();
        const int other = lane < static_cast<int>(blockDim.x / 32) ? lane : 0;
        first = max_of_lanes<32>(scratch.maxima.load(other));
        second = max_of_lanes<32>(scratch.maxima.load(max_warps + other));
    }
}

// The first warp of a team gets the sums; with `broadcast`, every thread does. A warp adds the first `double_count`
// values in double and the others in their own type. Two calls need a barrier between them.
template <int lanes, int count, class Value, class T>
KDDP_DEVICE void sums_of_team(const Value (&values)[count], double (&sums)[count], bool broadcast,
                              const TeamScratch<T>& scratch, int double_count = 0) {
    static_assert(count <= max_sums, "the scratch holds max_sums per warp");
#pragma unroll
    for (int i = 0; i < count; ++i)
        sums[i] = i < double_count ? sum_of_lanes<Team<lanes>::lanes_in_warp>(double(values[i]))
                                   : sum_of_lanes<Team<lanes>::lanes_in_warp>(values[i]);
    if constexpr (Team<lanes>::is_block) {
        const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
        if (lane == 0) {
#pragma unroll
            for (int i = 0; i < count; ++i) scratch.sums.store(i * max_warps + warp, sums[i]);
        }
        __syncthreads();
        if (warp != 0 && !broadcast) return;
        const bool present = lane < static_cast<int>(blockDim.x / 32);
#pragma unroll
        for (int i = 0; i < count; ++i)
            sums[i] = sum_of_lanes<32>(present ? scratch.sums.load(i * max_warps + (present ? lane : 0)) : 0.0);
    }
}

}  // namespace kddp

// The threads that share a row: 8 or 32 of a warp, or a whole block; and what they find out together.
#pragma once

#include "cuda/row_elements.cuh"
#include "cuda/warp.cuh"

namespace kddp {

constexpr int whole_block = 1024;  // stands for a team of a block's threads, however many
constexpr int most_warps = 32, most_sums = 8;

template <int lanes>
struct Team {
    static constexpr bool is_block = lanes == whole_block;
    static constexpr int lanes_in_warp = lanes < 32 ? lanes : 32;

    static __device__ __forceinline__ int size() { return is_block ? static_cast<int>(blockDim.x) : lanes; }
    // Of the teams of a block.
    static __device__ __forceinline__ int number() { return is_block ? 0 : thread_of_block() / lanes; }
    static __device__ __forceinline__ int rank() { return is_block ? thread_of_block() : thread_of_block() % lanes; }
    static __device__ __forceinline__ void wait() {
        if constexpr (is_block)
            __syncthreads();
        else
            __syncwarp();
    }
};

// A team's row where its sums are complete: one thread makes its terms and its gradient's coefficients of them. In
// shared memory, for in registers there is no room for so many doubles.
struct alignas(16) TeamRecord {  // of two doubles at once
    ChunkSums sums;
    MixtureSums mixture;
    Moments student;
    TargetMargins target;
    double label_logit, inverse_rows;
    RowGradient gradient;
    RowTerms terms;  // of all rows so far
    Tempering<double> by;
    int64_t row, label;
    int64_t place;  // the row, though it may be none that is computed
    int count, turn;
    bool computed, beaten;
    bool sliced, counts;  // whether its references are others than the row's; whether it adds to the terms
};

// Where the warps of a block leave for one another what each has found. Teams within a warp use the record alone.
template <class T>
struct TeamScratch {
    SharedArray<T> highest;    // 2 of each warp
    SharedArray<double> sums;  // most_sums of each warp
    TeamRecord* records;       // one of each team
};

// The maxima over a team, for every thread.
template <int lanes, class T>
__device__ __forceinline__ void maxima_of_team(T& first, T& second, const TeamScratch<T>& scratch) {
    first = maximum_of_lanes<Team<lanes>::lanes_in_warp>(first);
    second = maximum_of_lanes<Team<lanes>::lanes_in_warp>(second);
    if constexpr (Team<lanes>::is_block) {
        const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
        if (lane == 0) scratch.highest.store(warp, first), scratch.highest.store(most_warps + warp, second);
        __syncthreads();
        const int other = lane < static_cast<int>(blockDim.x / 32) ? lane : 0;
        first = maximum_of_lanes<32>(scratch.highest.load(other));
        second = maximum_of_lanes<32>(scratch.highest.load(most_warps + other));
    }
}

// Sums over a team: for its first warp, and where `everywhere`, for every thread. Between two calls there has to be
// a barrier. A warp adds up the first `in_double` values in double, the others as they are.
template <int lanes, int count, class Value, class T>
__device__ __forceinline__ void sums_of_team(const Value (&values)[count], double (&sums)[count], bool everywhere,
                                             const TeamScratch<T>& scratch, int in_double = 0) {
    static_assert(count <= most_sums, "there is room for so many");
#pragma unroll
    for (int i = 0; i < count; ++i)
        sums[i] = i < in_double ? sum_of_lanes<Team<lanes>::lanes_in_warp>(double(values[i]))
                                : sum_of_lanes<Team<lanes>::lanes_in_warp>(values[i]);
    if constexpr (Team<lanes>::is_block) {
        const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
        if (lane == 0) {
#pragma unroll
            for (int i = 0; i < count; ++i) scratch.sums.store(i * most_warps + warp, sums[i]);
        }
        __syncthreads();
        if (warp != 0 && !everywhere) return;
        const bool present = lane < static_cast<int>(blockDim.x / 32);
#pragma unroll
        for (int i = 0; i < count; ++i)
            sums[i] = sum_of_lanes<32>(present ? scratch.sums.load(i * most_warps + (present ? lane : 0)) : 0.0);
    }
}

}  // namespace kddp

// The sums of activations times their gradients: one launch.
//
// A team of threads sums one entry of one sample: some lanes of a warp, or the same lanes of all warps of a block. A
// thread reads units of 16 bytes if all of an entry's runs are aligned, else single elements. Neighbouring teams have
// neighbouring entries, so a warp reads contiguous memory even if each entry is a single element.
#include <algorithm>

#include "cuda/backend.h"
#include "cuda/elements.cuh"
#include "cuda/reductions.cuh"

namespace kddp {
namespace {

constexpr int threads = 256, warps_of_block = threads / 32;

// Units whose terms a thread sums before the sum moves to double.
constexpr int units_in_float = 16;

struct ProductsLaunch {
    GradientProducts job;
    int64_t groups;       // of 32 / lanes entries
    int64_t run_units;    // units of the `after` elements of a run
    int64_t total_units;  // of an entry
    int lanes, warps;     // of a team: a power of two up to 32, and 1 or all of a block
    bool vectors;         // a unit has 16 bytes
};

// One thread's part of the sum of an entry.
template <ElementType type, int n>
KDDP_DEVICE double sum_units(const ProductsLaunch& launch, int64_t sample, int64_t entry, int rank, int size) {
    using T = std::conditional_t<type == ElementType::float64, double, float>;
    constexpr int unit_bytes = n * static_cast<int>(size_of(type));
    const GradientProducts& job = launch.job;
    const T mean = job.mean ? T(load_global(job.mean + entry)) : T(0);
    const int64_t start = (sample * job.before * job.entries + entry) * launch.run_units;
    const char* activation = static_cast<const char*>(job.activation) + start * unit_bytes;
    const char* gradient = static_cast<const char*>(job.gradient) + start * unit_bytes;
    // Unit `unit` of run `run`; the next one is `size` units behind it.
    const int64_t stride = job.entries * launch.run_units, runs = size / launch.run_units;
    const int64_t step = size - runs * launch.run_units;
    int64_t run = rank / launch.run_units, unit = rank - run * launch.run_units, left = launch.total_units - rank;
    double total = 0;
    while (left > 0) {
        T sum = 0;
#pragma unroll 4
        for (int k = 0; k < units_in_float; ++k) {
            if (left <= 0) break;
            const int64_t offset = (run * stride + unit) * unit_bytes;
            T a[n], g[n];
            load_run<T, type, n>(activation + offset, a);
            load_run<T, type, n>(gradient + offset, g);
#pragma unroll
            for (int i = 0; i < n; ++i) sum += (a[i] - mean) * g[i];  // NOLINT(*-core.*): load_run set them
            left -= size, run += runs, unit += step;
            if (unit >= launch.run_units) unit -= launch.run_units, ++run;
        }
        total += double(sum);
    }
    return total;
}

template <ElementType type>
KDDP_DEVICE double sum_elements(const ProductsLaunch& launch, int64_t sample, int64_t entry, int rank, int size) {
    constexpr int n = 16 / static_cast<int>(size_of(type));
    return launch.vectors ? sum_units<type, n>(launch, sample, entry, rank, size)
                          : sum_units<type, 1>(launch, sample, entry, rank, size);
}

__global__ void __launch_bounds__(threads, 4) sum_products(const __grid_constant__ ProductsLaunch launch) {
    KDDP_SHARED(double, of_warps, threads);
    const GradientProducts& job = launch.job;
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const int teams = warps_of_block / launch.warps, warp_of_team = warp % launch.warps;
    const int rank = warp_of_team * launch.lanes + lane % launch.lanes, size = launch.warps * launch.lanes;
    for (int64_t first = int64_t(blockIdx.x) * teams; first < launch.groups; first += int64_t(gridDim.x) * teams) {
        const int64_t group = first + warp / launch.warps;
        const int64_t product = group * (32 / launch.lanes) + lane / launch.lanes;
        const bool exists = group < launch.groups && product < job.samples * job.entries;
        double sum = 0;
        if (exists) {
            const int64_t sample = product / job.entries, entry = product - sample * job.entries;
            with_type<double>(job.type,
                              [&](auto type) { sum = sum_elements<type.value>(launch, sample, entry, rank, size); });
        }
        for (int distance = launch.lanes / 2; distance > 0; distance /= 2)
            sum += __shfl_xor_sync(all_lanes, sum, distance);
        if (launch.warps > 1) {
            __syncthreads();  // of_warps has been read
            of_warps.store(static_cast<int>(threadIdx.x), sum);
            __syncthreads();
            for (int i = 1; warp == 0 && i < warps_of_block; ++i) sum += of_warps.load(i * 32 + lane);
        }
        if (!exists || rank != 0) continue;
        if (job.type == ElementType::float64)
            store_global(static_cast<double*>(job.products) + product, sum);
        else
            store_global(static_cast<float*>(job.products) + product, float(sum));
    }
}

ProductsLaunch plan(const GradientProducts& job) {
    ProductsLaunch launch{};
    launch.job = job;
    const auto addresses = reinterpret_cast<uintptr_t>(job.activation) | reinterpret_cast<uintptr_t>(job.gradient);
    launch.vectors = (static_cast<int64_t>(addresses) | job.after * size_of(job.type)) % 16 == 0;
    launch.run_units = launch.vectors ? job.after * size_of(job.type) / 16 : job.after;
    launch.total_units = job.before * launch.run_units;
    if (launch.run_units == 0) launch.run_units = 1;  // a divisor; no unit is read
    for (launch.lanes = 1; launch.lanes < 32 && 2 * launch.lanes <= launch.run_units;) launch.lanes *= 2;
    launch.warps = launch.total_units < int64_t(32) * launch.lanes ? 1 : warps_of_block;
    const int64_t of_group = 32 / launch.lanes;
    launch.groups = (job.samples * job.entries + of_group - 1) / of_group;
    return launch;
}

}  // namespace

void cuda_gradient_products(const GradientProducts& job, const LaunchContext& context) {
    if (job.samples * job.entries == 0) return;
    const ProductsLaunch launch = plan(job);
    const int64_t teams = warps_of_block / launch.warps, blocks = (launch.groups + teams - 1) / teams;
    const int resident = resident_blocks(reinterpret_cast<const void*>(&sum_products), threads, 0);
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>(blocks, resident)));
    KDDP_LAUNCH(sum_products, grid, dim3(threads), 0, context.stream, launch);
}

}  // namespace kddp

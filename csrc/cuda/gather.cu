// The gather of a compaction: one launch for all tensors of a layer and for the contribution of the pruned columns.
//
// A unit is the part of a column that a thread moves in one access. A warp takes 32 neighbouring units of the kept
// columns down a run of kept rows, so that it reads each index only once. A warp also sums the pruned columns of a row.
#include <algorithm>

#include "cuda/backend.h"
#include "cuda/elements.cuh"
#include "cuda/reductions.cuh"

namespace kddp {
namespace {

constexpr int blocks_per_launch = 24, threads = 256, rows_per_item = 16;

struct BlockLaunch {
    const char* source;
    char* target;
    int64_t row_stride;
    int64_t units_per_row;  // of the target
    int64_t first_item;
    int units_per_column, unit_bytes, column_parts;
};

struct GatherLaunch {
    BlockLaunch blocks[blocks_per_launch];
    int count;
    const int64_t* keep_rows;
    const int64_t* keep_columns;
    int64_t kept_rows, items;
    // The contribution of the pruned columns, which concerns the first block; none if contribution_items is 0.
    Compensation compensation;
    int64_t contribution_items, row_stride;
    int elements_per_column;
    const char* source;
};

// Moves the units of an item, if they have this many bytes, or else half as many, and so on.
template <int bytes>
KDDP_DEVICE void move_units(const GatherLaunch& launch, const BlockLaunch& block, int64_t item) {
    if constexpr (bytes > 1)
        if (block.unit_bytes < bytes) return move_units<bytes / 2>(launch, block, item);
    const int64_t unit = item % block.column_parts * 32 + threadIdx.x % 32;
    if (unit >= block.units_per_row) return;
    int64_t offset = unit;
    if (launch.keep_columns) {
        const int64_t column = block.units_per_column == 1 ? unit : unit / block.units_per_column;
        offset = load_global(launch.keep_columns + column) * block.units_per_column +
                 (unit - column * block.units_per_column);
    }
    const int64_t first = item / block.column_parts * rows_per_item;
    const int64_t end = first + rows_per_item < launch.kept_rows ? first + rows_per_item : launch.kept_rows;
#pragma unroll 4
    for (int64_t row = first; row < end; ++row) {
        const int64_t from = launch.keep_rows ? load_global(launch.keep_rows + row) : row;
        const auto value = load_input<bytes>(block.source + from * block.row_stride + offset * bytes);
        store_words<bytes>(block.target + (row * block.units_per_row + unit) * bytes, value);
    }
}

template <ElementType type>
KDDP_DEVICE void sum_contribution(const GatherLaunch& launch, int64_t row) {
    using T = std::conditional_t<type == ElementType::float64, double, float>;
    constexpr int bytes = static_cast<int>(size_of(type));
    const Compensation& compensation = launch.compensation;
    const char* from =
        launch.source + (launch.keep_rows ? load_global(launch.keep_rows + row) : row) * launch.row_stride;
    const int64_t width = launch.elements_per_column;
    double sum = 0;
    for (int64_t i = threadIdx.x % 32; i < compensation.pruned_count * width; i += 32) {
        const int64_t pruned = width == 1 ? i : i / width;
        const int64_t element = load_global(compensation.pruned_columns + pruned) * width + (i - pruned * width);
        sum += double(load_element<T, type>(from + element * bytes)) * load_global(compensation.means + pruned);
    }
    sum = sum_of_lanes<32>(sum);
    if (threadIdx.x % 32 == 0) store_global(compensation.shift + row, sum);
}

// At least 4 blocks per multiprocessor: without a bound the compiler spills registers to make room for 5.
__global__ void __launch_bounds__(threads, 4) gather_layer(const __grid_constant__ GatherLaunch launch) {
    const int64_t warps = int64_t(gridDim.x) * (threads / 32);
    int index = 0;
    for (int64_t item = int64_t(blockIdx.x) * (threads / 32) + threadIdx.x / 32;
         item < launch.items + launch.contribution_items; item += warps) {
        if (item >= launch.items) {
            with_type<double>(launch.compensation.type,
                              [&](auto type) { sum_contribution<type.value>(launch, item - launch.items); });
            continue;
        }
        while (index + 1 < launch.count && item >= launch.blocks[index + 1].first_item) ++index;
        const BlockLaunch& block = launch.blocks[index];
        move_units<16>(launch, block, item - block.first_item);
    }
}

BlockLaunch block_launch(const GatherSlices& job, const Block& block) {
    // If all columns are kept, a row is one wide column.
    const int64_t columns = job.keep_columns ? job.kept_columns : 1;
    const int64_t column_bytes = job.keep_columns ? block.column_bytes : block.column_bytes * job.kept_columns;
    const auto addresses = reinterpret_cast<uintptr_t>(block.source) | reinterpret_cast<uintptr_t>(block.target);
    const int64_t alignment = static_cast<int64_t>(addresses) | block.row_stride | column_bytes;
    int unit = 16;
    while (alignment % unit) unit /= 2;
    BlockLaunch launch{};
    launch.source = static_cast<const char*>(block.source), launch.target = static_cast<char*>(block.target);
    launch.row_stride = block.row_stride;
    launch.units_per_column = static_cast<int>(column_bytes / unit), launch.unit_bytes = unit;
    launch.units_per_row = columns * (column_bytes / unit);
    launch.column_parts = static_cast<int>((launch.units_per_row + 31) / 32);
    return launch;
}

}  // namespace

void cuda_gather_slices(const GatherSlices& job, const LaunchContext& context) {
    for (int64_t first = 0; first < job.block_count; first += blocks_per_launch) {
        GatherLaunch launch{};
        launch.count = static_cast<int>(std::min<int64_t>(job.block_count - first, blocks_per_launch));
        launch.keep_rows = job.keep_rows, launch.keep_columns = job.keep_columns, launch.kept_rows = job.kept_rows;
        for (int i = 0; i < launch.count; ++i) {
            BlockLaunch& block = launch.blocks[i];
            block = block_launch(job, job.blocks[first + i]);
            block.first_item = launch.items;
            launch.items += block.column_parts * ((job.kept_rows + rows_per_item - 1) / rows_per_item);
        }
        if (first == 0 && job.compensation.pruned_columns) {
            launch.compensation = job.compensation;
            launch.contribution_items = job.kept_rows;
            launch.source = launch.blocks[0].source, launch.row_stride = job.blocks[0].row_stride;
            launch.elements_per_column = static_cast<int>(job.blocks[0].column_bytes / size_of(job.compensation.type));
        }
        const int64_t blocks = (launch.items + launch.contribution_items + threads / 32 - 1) / (threads / 32);
        if (blocks == 0) continue;
        const int resident = resident_blocks(reinterpret_cast<const void*>(&gather_layer), threads, 0);
        const dim3 grid(static_cast<unsigned>(std::min<int64_t>(blocks, resident)));
        KDDP_LAUNCH(gather_layer, grid, dim3(threads), 0, context.stream, launch);
    }
}

}  // namespace kddp

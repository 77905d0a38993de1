// The compaction on a GPU: one launch for all tensors of a layer and for what the pruned columns contributed.
//
// A warp takes 32 neighbouring units of the kept columns (a unit is what of a column one thread can move at once) and
// goes down a run of kept rows with them, so that an index is read once for all of these. The pruned columns of a row
// are summed by a warp.
#include "cuda/compaction.h"
#include "cuda/elements.cuh"
#include "cuda/occupancy.h"
#include "cuda/warp.cuh"

namespace kddp {
namespace {

constexpr int blocks_of_launch = 24, threads = 256, rows_of_item = 16;

struct BlockLaunch {
    const char* source;
    char* target;
    int64_t row_stride;
    int64_t units_of_row;  // of the target
    int64_t first_item;
    int units_of_column, unit_bytes, column_parts;
};

struct CompactionLaunch {
    BlockLaunch blocks[blocks_of_launch];
    int count;
    const int64_t* keep_rows;
    const int64_t* keep_columns;
    int64_t kept_rows, items;
    // Of the first block; `contribution_items` 0: none wanted.
    Compensation compensation;
    int64_t contribution_items, row_stride;
    int elements_of_column;
    const char* source;
};

template <int bytes>
__device__ __forceinline__ void move_units(const CompactionLaunch& launch, const BlockLaunch& block, int64_t item) {
    const int64_t unit = item % block.column_parts * 32 + threadIdx.x % 32;
    if (unit >= block.units_of_row) return;
    int64_t offset = unit;
    if (launch.keep_columns) {
        const int64_t column = block.units_of_column == 1 ? unit : unit / block.units_of_column;
        offset =
            load_global(launch.keep_columns + column) * block.units_of_column + (unit - column * block.units_of_column);
    }
    const int64_t first = item / block.column_parts * rows_of_item;
    const int64_t end = first + rows_of_item < launch.kept_rows ? first + rows_of_item : launch.kept_rows;
#pragma unroll 4
    for (int64_t row = first; row < end; ++row) {
        const int64_t from = launch.keep_rows ? load_global(launch.keep_rows + row) : row;
        const auto value = load_input<bytes>(block.source + from * block.row_stride + offset * bytes);
        store_words<bytes>(block.target + (row * block.units_of_row + unit) * bytes, value);
    }
}

template <ElementType type>
__device__ __forceinline__ void contribution(const CompactionLaunch& launch, int64_t row) {
    using T = std::conditional_t<type == ElementType::float64, double, float>;
    constexpr int bytes = static_cast<int>(size_of(type));
    const Compensation& wanted = launch.compensation;
    const char* from =
        launch.source + (launch.keep_rows ? load_global(launch.keep_rows + row) : row) * launch.row_stride;
    const int64_t of_column = launch.elements_of_column;
    double sum = 0;
    for (int64_t i = threadIdx.x % 32; i < wanted.pruned_count * of_column; i += 32) {
        const int64_t pruned = of_column == 1 ? i : i / of_column;
        const int64_t element = load_global(wanted.pruned_columns + pruned) * of_column + (i - pruned * of_column);
        sum += double(load_element<T, type>(from + element * bytes)) * load_global(wanted.means + pruned);
    }
    sum = sum_of_lanes<32>(sum);
    if (threadIdx.x % 32 == 0) store_global(wanted.shift + row, sum);
}

__device__ __forceinline__ void contribution(const CompactionLaunch& launch, int64_t row) {
    switch (launch.compensation.type) {
        case ElementType::float64:
            return contribution<ElementType::float64>(launch, row);
        case ElementType::bfloat16:
            return contribution<ElementType::bfloat16>(launch, row);
        case ElementType::float16:
            return contribution<ElementType::float16>(launch, row);
        default:
            return contribution<ElementType::float32>(launch, row);
    }
}

// 4 blocks of a multiprocessor: asked for none, the compiler spills to make room for 5.
__global__ void __launch_bounds__(threads, 4) compact_layer(const __grid_constant__ CompactionLaunch launch) {
    const int64_t warps = int64_t(gridDim.x) * (threads / 32);
    int index = 0;
    for (int64_t item = int64_t(blockIdx.x) * (threads / 32) + threadIdx.x / 32;
         item < launch.items + launch.contribution_items; item += warps) {
        if (item >= launch.items) {
            contribution(launch, item - launch.items);
            continue;
        }
        while (index + 1 < launch.count && item >= launch.blocks[index + 1].first_item) ++index;
        const BlockLaunch& block = launch.blocks[index];
        const int64_t within = item - block.first_item;
        switch (block.unit_bytes) {
            case 16:
                move_units<16>(launch, block, within);
                break;
            case 8:
                move_units<8>(launch, block, within);
                break;
            case 4:
                move_units<4>(launch, block, within);
                break;
            case 2:
                move_units<2>(launch, block, within);
                break;
            default:
                move_units<1>(launch, block, within);
        }
    }
}

BlockLaunch block_launch(const GatherSlices& job, const Block& block) {
    // Where all columns are kept they are one.
    const int64_t columns = job.keep_columns ? job.kept_columns : 1;
    const int64_t column_bytes = job.keep_columns ? block.column_bytes : block.column_bytes * job.kept_columns;
    const auto addresses = reinterpret_cast<uintptr_t>(block.source) | reinterpret_cast<uintptr_t>(block.target);
    const int64_t all = static_cast<int64_t>(addresses) | block.row_stride | column_bytes;
    int unit = 16;
    while (all % unit) unit /= 2;
    BlockLaunch launch{};
    launch.source = static_cast<const char*>(block.source), launch.target = static_cast<char*>(block.target);
    launch.row_stride = block.row_stride;
    launch.units_of_column = static_cast<int>(column_bytes / unit), launch.unit_bytes = unit;
    launch.units_of_row = columns * (column_bytes / unit);
    launch.column_parts = static_cast<int>((launch.units_of_row + 31) / 32);
    return launch;
}

}  // namespace

void cuda_gather_slices(const GatherSlices& job, const CudaPlace& place) {
    for (int64_t first = 0; first < job.block_count; first += blocks_of_launch) {
        CompactionLaunch launch{};
        const int64_t left = job.block_count - first;
        launch.count = static_cast<int>(left < blocks_of_launch ? left : blocks_of_launch);
        launch.keep_rows = job.keep_rows, launch.keep_columns = job.keep_columns, launch.kept_rows = job.kept_rows;
        for (int i = 0; i < launch.count; ++i) {
            BlockLaunch& block = launch.blocks[i];
            block = block_launch(job, job.blocks[first + i]);
            block.first_item = launch.items;
            launch.items += block.column_parts * ((job.kept_rows + rows_of_item - 1) / rows_of_item);
        }
        if (first == 0 && job.compensation.pruned_columns) {
            launch.compensation = job.compensation;
            launch.contribution_items = job.kept_rows;
            launch.source = launch.blocks[0].source, launch.row_stride = job.blocks[0].row_stride;
            launch.elements_of_column = static_cast<int>(job.blocks[0].column_bytes / size_of(job.compensation.type));
        }
        const int64_t blocks = (launch.items + launch.contribution_items + threads / 32 - 1) / (threads / 32);
        if (blocks == 0) continue;
        const int resident = resident_blocks(reinterpret_cast<const void*>(&compact_layer), threads, 0);
        const dim3 grid(static_cast<unsigned>(blocks < resident ? blocks : resident));
        KDDP_LAUNCH(compact_layer, grid, dim3(threads), 0, place.stream, launch);
    }
}

}  // namespace kddp

// Units of activations, a warp each: their share of the L1 penalty, its gradient, and the neurons' statistics.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/loss_launch.cuh"

namespace kddp {

// With statistics, a thread sums so many neighbouring columns.
constexpr int statistics_columns = 2;

struct Unit {
    int64_t first_row, last_row, first_column, last_column;
    int part, column_part;
};

__device__ __forceinline__ Unit unit_of(const LayerLaunch& layer, int64_t number) {
    Unit unit;
    unit.part = static_cast<int>(number / layer.column_parts);
    unit.column_part = static_cast<int>(number % layer.column_parts);
    unit.first_row = unit.part * layer.unit_rows, unit.first_column = unit.column_part * layer.unit_columns;
    unit.last_row = unit.first_row + layer.unit_rows < layer.rows ? unit.first_row + layer.unit_rows : layer.rows;
    const int64_t end = unit.first_column + layer.unit_columns;
    unit.last_column = end < layer.columns ? end : layer.columns;
    return unit;
}

// scale * sign(a), 0 where a is 0 or not a number.
template <class T>
__device__ __forceinline__ T scaled_sign(T a, T scale) {
    return a > 0 ? scale : a < 0 ? -scale : T(0);
}

template <class T>
__device__ __forceinline__ T magnitude(T a) {
    return a < 0 ? -a : a;
}

// Columns between a thread's elements: neighbours where they are read at once, else a warp's width, so that what the
// warp reads at once are neighbours.
__device__ __forceinline__ int step_of(const LayerLaunch& layer) { return layer.aligned ? 1 : 32; }

// Reads n elements of a row, `step` columns apart, and writes their gradient; what is not within the `left` columns to
// the row's end is 0.
template <class T, ElementType type, int n>
__device__ __forceinline__ void read_activations(const char* from, char* to, int step, int left, T scale,
                                                 T (&values)[n]) {
    constexpr int bytes = static_cast<int>(size_of(type));
    if (step == 1 && left >= n) {
        load_run<T, type, n>(from, values);
        if (!to) return;
        T gradient[n];
#pragma unroll
        for (int i = 0; i < n; ++i) gradient[i] = scaled_sign(values[i], scale);
        store_run<T, type, n>(to, gradient);
        return;
    }
#pragma unroll
    for (int i = 0; i < n; ++i) {
        values[i] = 0;
        if (i * step >= left) continue;
        values[i] = load_element<T, type>(from + i * step * bytes);
        if (to) store_element<T, type>(to + i * step * bytes, scaled_sign(values[i], scale));
    }
}

// Sum of |a| of one thread. Runs of a row are summed in T, short enough that float adds them up well.
template <class T, ElementType type>
__device__ __forceinline__ double sum_of_unit(const LayerLaunch& layer, const Unit& unit) {
    constexpr int bytes = static_cast<int>(size_of(type)), n = 16 / bytes, longest_run = 16;
    const int width = static_cast<int>(unit.last_column - unit.first_column);
    const int step = step_of(layer), lane = static_cast<int>(threadIdx.x % 32);
    int rows = static_cast<int>(unit.last_row - unit.first_row);
    const char* from = layer.data + (unit.first_row * layer.row_stride + unit.first_column) * bytes;
    char* to = layer.gradient ? layer.gradient + (unit.first_row * layer.columns + unit.first_column) * bytes : nullptr;
    double total = 0;
#pragma unroll 1
    for (; rows > 0; --rows) {
        T sum = 0;
        int run = 0;
#pragma unroll 1
        for (int column = step == 1 ? lane * n : lane; column < width; column += 32 * n) {
            T values[n];
            read_activations<T, type, n>(from + int64_t(column) * bytes, to ? to + int64_t(column) * bytes : nullptr,
                                         step, width - column, T(layer.scale), values);
            T of_vector = 0;
#pragma unroll
            for (int i = 0; i < n; ++i) of_vector += magnitude(values[i]);
            sum += of_vector;
            if (++run < longest_run) continue;
            total += double(sum);
            sum = 0, run = 0;
        }
        total += double(sum);
        from += layer.row_stride * bytes;
        if (to) to += layer.columns * bytes;
        __syncwarp();  // lanes of different rows would touch more sectors
    }
    return total;
}

// What a thread adds up of one column. The sums that a variance is made of are in double: a constant neuron's is 0.
template <class T>
struct ColumnSums {
    double absolute = 0, sum = 0, squares = 0;
    T run = 0, highest = 0;
    int nonzero = 0;

    __device__ __forceinline__ void add(T a) {
        const double exact = double(a);
        run += magnitude(a);
        sum += exact, squares += exact * exact;
        nonzero += a != 0;
        highest = larger(highest, magnitude(a));
    }
    __device__ __forceinline__ void end_run() { absolute += double(run), run = 0; }
};

constexpr int rows_of_statistics = static_cast<int>(statistics_rows);

__device__ __forceinline__ double* statistic(double* block, int64_t stride, int row, int64_t column) {
    return block + row * stride + column;
}

// The last unit of a run of columns adds up, in order, what the parts of the rows have left for it.
__device__ __forceinline__ void combine_parts(const LossLaunch& launch, const LayerLaunch& layer, const Unit& unit) {
    unsigned ticket = 0;
    __threadfence();
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        ticket = atomicInc(launch.counters + layer.first_counter + unit.column_part, layer.row_parts - 1);
    ticket = __shfl_sync(all_lanes, ticket, 0);
    if (static_cast<int>(ticket) != layer.row_parts - 1) return;
    __threadfence();
    for (int64_t column = unit.first_column + threadIdx.x % 32; column < unit.last_column; column += 32) {
        for (int k = 0; k < statistics_rows; ++k) {
            double value = 0;
            for (int part = 0; part < layer.row_parts; ++part) {
                const double other =
                    load_workspace(statistic(layer.partial, layer.columns, part * rows_of_statistics + k, column));
                value = k == statistics_rows - 1 ? (other > value ? other : value) : value + other;
            }
            store_global(statistic(layer.statistics, launch.statistics_stride, k, column), value);
        }
    }
}

template <class T>
__device__ __forceinline__ void read_column_sums(const LayerLaunch& layer, const Unit& unit, int column, int left,
                                                 ColumnSums<T> (&sums)[statistics_columns]) {
    constexpr int n = statistics_columns, rows_in_run = 8;
    const int bytes = static_cast<int>(size_of(layer.type));
    const int step = step_of(layer);
    const int64_t first = unit.first_column + column;
    const char* from = layer.data + (unit.first_row * layer.row_stride + first) * bytes;
    char* to = layer.gradient ? layer.gradient + (unit.first_row * layer.columns + first) * bytes : nullptr;
#pragma unroll 1
    for (int rows = static_cast<int>(unit.last_row - unit.first_row); rows > 0; --rows) {
        T values[n];
        const T scale = T(layer.scale);
        if constexpr (sizeof(T) == 8) {
            read_activations<T, ElementType::float64, n>(from, to, step, left, scale, values);
        } else if (layer.type == ElementType::float32) {
            read_activations<T, ElementType::float32, n>(from, to, step, left, scale, values);
        } else if (layer.type == ElementType::bfloat16) {
            read_activations<T, ElementType::bfloat16, n>(from, to, step, left, scale, values);
        } else {
            read_activations<T, ElementType::float16, n>(from, to, step, left, scale, values);
        }
#pragma unroll
        for (int i = 0; i < n; ++i) {
            sums[i].add(values[i]);
            if (rows % rows_in_run == 1) sums[i].end_run();
        }
        from += layer.row_stride * bytes;
        if (to) to += layer.columns * bytes;
        __syncwarp();  // as above
    }
}

// Row k of the statistics of a thread's columns.
template <class Values>
__device__ __forceinline__ void store_statistic(double* row, int step, int left, Values values) {
    constexpr int n = statistics_columns;
    if (step == 1 && left >= n && reinterpret_cast<uintptr_t>(row) % 16 == 0) {
        double pair[n];
#pragma unroll
        for (int i = 0; i < n; ++i) pair[i] = values(i);
        store_run<double, ElementType::float64, n>(reinterpret_cast<char*>(row), pair);
        return;
    }
#pragma unroll
    for (int i = 0; i < n; ++i)
        if (i * step < left) store_global(row + i * step, values(i));
}

// Of one unit; gives the thread's share of the penalty.
template <class T>
__device__ __forceinline__ double statistics_of_unit(const LossLaunch& launch, int index, int64_t number) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    ColumnSums<T> sums[statistics_columns];
    {
        const LayerLaunch& layer = launch.layers[index];
        const Unit unit = unit_of(layer, number);
        const int column = layer.aligned ? lane * statistics_columns : lane;
        const int left = static_cast<int>(unit.last_column - unit.first_column) - column;
        read_column_sums(layer, unit, column, left, sums);
    }
    const LayerLaunch& layer = again(launch).layers[index];
    const Unit unit = unit_of(layer, number);
    const bool parts = layer.row_parts > 1;
    double* block =
        parts ? statistic(layer.partial, layer.columns, unit.part * rows_of_statistics, 0) : layer.statistics;
    const int64_t stride = parts ? layer.columns : launch.statistics_stride;
    const int column = layer.aligned ? lane * statistics_columns : lane, step = step_of(layer);
    const int left = static_cast<int>(unit.last_column - unit.first_column) - column;
    double total = 0;
    if (left > 0) {
        double* const first = block + unit.first_column + column;
        store_statistic(first, step, left, [&](int i) { return sums[i].absolute; });
        store_statistic(first + stride, step, left, [&](int i) { return sums[i].sum; });
        store_statistic(first + 2 * stride, step, left, [&](int i) { return sums[i].squares; });
        store_statistic(first + 3 * stride, step, left, [&](int i) { return double(sums[i].nonzero); });
        store_statistic(first + 4 * stride, step, left, [&](int i) { return double(sums[i].highest); });
#pragma unroll
        for (const ColumnSums<T>& of_column : sums) total += of_column.absolute;  // 0 of what is behind the row
    }
    if (parts) combine_parts(launch, layer, unit);
    return total;
}

// `number`: of the layer's units.
__device__ __forceinline__ double run_unit(const LossLaunch& launch, int index, int64_t number) {
    const LayerLaunch& layer = launch.layers[index];
    const bool in_double = layer.type == ElementType::float64;
    if (layer.statistics)
        return in_double ? statistics_of_unit<double>(launch, index, number)
                         : statistics_of_unit<float>(launch, index, number);
    const Unit unit = unit_of(layer, number);
    if (in_double) return sum_of_unit<double, ElementType::float64>(layer, unit);
    double sum = 0;
    with_type<float>(layer.type, [&](auto type) { sum = sum_of_unit<float, type.value>(layer, unit); });
    return sum;
}

// Every warp of the launch takes units in turn.
__device__ __forceinline__ void run_activations(const LossLaunch& launch) {
    const int64_t warps = blockDim.x / 32;
    int index = 0;
#pragma unroll 1
    for (int64_t number = blockIdx.x * warps + threadIdx.x / 32; number < launch.units; number += gridDim.x * warps) {
        while (index + 1 < launch.layer_count && number >= launch.layers[index + 1].first_unit) ++index;
        const double of_thread = run_unit(again(launch), index, number - launch.layers[index].first_unit);
        const double sum = sum_of_lanes<32>(of_thread);
        if (threadIdx.x % 32 == 0) store_global(launch.unit_sums + number, sum);
    }
}

}  // namespace kddp

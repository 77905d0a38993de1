// Units of activations, one warp each: their share of the L1 penalty, its gradient, and the neurons' statistics.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/loss_launch.cuh"

namespace kddp {

constexpr int statistics_columns = 2;  // neighbouring columns that a thread sums, with statistics

struct Unit {
    int64_t first_row, last_row, first_column, last_column;
    int part, column_part;
};

KDDP_DEVICE Unit unit_of(const LayerLaunch& layer, int64_t number) {
    Unit unit;
    unit.part = static_cast<int>(number / layer.column_parts);
    unit.column_part = static_cast<int>(number % layer.column_parts);
    unit.first_row = unit.part * layer.unit_rows, unit.first_column = unit.column_part * layer.unit_columns;
    unit.last_row = unit.first_row + layer.unit_rows < layer.rows ? unit.first_row + layer.unit_rows : layer.rows;
    const int64_t end = unit.first_column + layer.unit_columns;
    unit.last_column = end < layer.columns ? end : layer.columns;
    return unit;
}

// scale * sign(a); 0 where a is 0 or NaN.
template <class T>
KDDP_DEVICE T scaled_sign(T a, T scale) {
    return a > 0 ? scale : a < 0 ? -scale : T(0);
}

// The distance between a thread's columns: 1 where it loads them in one access, else a warp's width, so that the lanes
// of a warp load neighbouring columns.
KDDP_DEVICE int step_of(const LayerLaunch& layer) { return layer.aligned ? 1 : 32; }

// Reads n elements of a row, `step` columns from one another, and writes their gradient. Elements behind the `left`
// columns to the row's end are 0.
template <class T, ElementType type, int n>
KDDP_DEVICE void read_activations(const char* from, char* to, int step, int left, T scale, T (&values)[n]) {
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

// A thread's sum of |a|. It sums runs of a row in T, short enough for float to be accurate, and the runs in double.
template <class T, ElementType type>
KDDP_DEVICE double sum_of_unit(const LayerLaunch& layer, const Unit& unit) {
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
            T vector_sum = 0;
#pragma unroll
            for (int i = 0; i < n; ++i) vector_sum += magnitude(values[i]);
            sum += vector_sum;
            if (++run < longest_run) continue;
            total += double(sum);
            sum = 0, run = 0;
        }
        total += double(sum);
        from += layer.row_stride * bytes;
        if (to) to += layer.columns * bytes;
        __syncwarp();  // lanes in different rows would touch more sectors
    }
    return total;
}

// A thread's sums of one column. The sums of a variance are in double, so that a constant neuron has a variance of 0.
template <class T>
struct ColumnSums {
    double absolute = 0, sum = 0, squares = 0;
    T run = 0, highest = 0;
    int nonzero = 0;

    KDDP_DEVICE void add(T a) {
        const double exact = double(a);
        run += magnitude(a);
        sum += exact, squares += exact * exact;
        nonzero += a != 0;
        highest = larger(highest, magnitude(a));
    }
    KDDP_DEVICE void end_run() { absolute += double(run), run = 0; }
};

constexpr int statistic_count = static_cast<int>(statistics_rows);

KDDP_DEVICE double* statistic(double* block, int64_t stride, int row, int64_t column) {
    return block + row * stride + column;
}

// The last unit of a column part adds up, in order, the statistics that the row parts have left.
KDDP_DEVICE void combine_parts(const LossLaunch& launch, const LayerLaunch& layer, const Unit& unit) {
    unsigned ticket = 0;
    __threadfence();
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        ticket = atomicInc(launch.counters + layer.first_counter + unit.column_part, layer.row_parts - 1);
    ticket = __shfl_sync(all_lanes, ticket, 0);
    if (static_cast<int>(ticket) != layer.row_parts - 1) return;
    __threadfence();
    for (int64_t column = unit.first_column + threadIdx.x % 32; column < unit.last_column; column += 32) {
#pragma unroll 1
        for (int k = 0; k < statistic_count; ++k) {
            double value = 0;
#pragma unroll 1
            for (int part = 0; part < layer.row_parts; ++part) {
                const double other =
                    load_workspace(statistic(layer.partial, layer.columns, part * statistic_count + k, column));
                value = k == statistic_count - 1 ? (other > value ? other : value) : value + other;
            }
            store_global(statistic(layer.statistics, launch.activations.statistics_stride, k, column), value);
        }
    }
}

template <class T>
KDDP_DEVICE void read_column_sums(const LayerLaunch& layer, const Unit& unit, int column, int left,
                                  ColumnSums<T> (&sums)[statistics_columns]) {
    constexpr int n = statistics_columns, rows_per_run = 8;
    const int bytes = static_cast<int>(size_of(layer.type));
    const int step = step_of(layer);
    const int64_t first = unit.first_column + column;
    const char* from = layer.data + (unit.first_row * layer.row_stride + first) * bytes;
    char* to = layer.gradient ? layer.gradient + (unit.first_row * layer.columns + first) * bytes : nullptr;
#pragma unroll 1
    for (int rows = static_cast<int>(unit.last_row - unit.first_row); rows > 0; --rows) {
        T values[n];
        const T scale = T(layer.scale);
        if constexpr (sizeof(T) == 8)
            read_activations<T, ElementType::float64, n>(from, to, step, left, scale, values);
        else
            with_type<T>(layer.type,
                         [&](auto type) { read_activations<T, type.value, n>(from, to, step, left, scale, values); });
#pragma unroll
        for (int i = 0; i < n; ++i) {
            sums[i].add(values[i]);
            if (rows % rows_per_run == 1) sums[i].end_run();
        }
        from += layer.row_stride * bytes;
        if (to) to += layer.columns * bytes;
        __syncwarp();  // as in sum_of_unit
    }
}

// Stores one statistic of a thread's columns.
template <class Values>
KDDP_DEVICE void store_statistic(double* row, int step, int left, Values values) {
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

// Computes the statistics of a unit and returns the thread's sum of |a|.
template <class T>
KDDP_DEVICE double statistics_of_unit(const LossLaunch& launch, int index, int64_t number) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    ColumnSums<T> sums[statistics_columns];
    {
        const LayerLaunch& layer = launch.layers[index];
        const Unit unit = unit_of(layer, number);
        const int column = layer.aligned ? lane * statistics_columns : lane;
        const int left = static_cast<int>(unit.last_column - unit.first_column) - column;
        read_column_sums(layer, unit, column, left, sums);
    }
    const LayerLaunch& layer = opaque(launch).layers[index];
    const Unit unit = unit_of(layer, number);
    const bool has_parts = layer.row_parts > 1;
    double* block =
        has_parts ? statistic(layer.partial, layer.columns, unit.part * statistic_count, 0) : layer.statistics;
    const int64_t stride = has_parts ? layer.columns : launch.activations.statistics_stride;
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
        for (const ColumnSums<T>& column_sums : sums) total += column_sums.absolute;  // 0 behind the row's end
    }
    if (has_parts) combine_parts(launch, layer, unit);
    return total;
}

// Runs unit `number` of a layer and returns the thread's sum of |a|.
KDDP_DEVICE double run_unit(const LossLaunch& launch, int index, int64_t number) {
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

// The warps of the launch take units in turn.
KDDP_DEVICE_CALL void run_activations(const LossLaunch& launch) {
    const int64_t warps = blockDim.x / 32;
    int index = 0;
#pragma unroll 1
    for (int64_t number = blockIdx.x * warps + threadIdx.x / 32; number < launch.units; number += gridDim.x * warps) {
        while (index + 1 < launch.layer_count && number >= launch.layers[index + 1].first_unit) ++index;
        const double thread_sum = run_unit(opaque(launch), index, number - launch.layers[index].first_unit);
        const double sum = sum_of_lanes<32>(thread_sum);
        if (threadIdx.x % 32 == 0) store_global(launch.unit_sums + number, sum);
    }
}

}  // namespace kddp

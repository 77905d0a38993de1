// A tile of one layer's activations: its share of the L1 penalty, the penalty's gradient, the neurons'
// statistics.
#pragma once

#include "cpu/pieces.h"
#include "kddp/activation_l1.h"

namespace kddp {
namespace {

// With statistics, a tile is at most so wide: its accumulators stay in the second-level cache.
constexpr int64_t tile_columns = 1024;

// With statistics, so many rows are read together before the accumulators are touched.
constexpr int64_t rows_in_group = 8;

struct Tile {
    int64_t first_row, last_row, first_column, last_column;
};

// Sums over the tile's rows, a column each, in double: pruning wants the variance of a constant neuron to be
// 0.
struct alignas(64) TileSums {
    double of[statistics_rows][tile_columns];
};

// Adds a vector to as many doubles.
template <class T>
inline void accumulate(double* to, Vector<T> v) {
    Vector<double> half[2];
    widen(v, half[0], half[1]);
    for (int i = 0; i < lanes<T> / lanes<double>; ++i)
        store<double>(to + i * lanes<double>, load<double>(to + i * lanes<double>) + half[i]);
}

// What one vector of columns adds up over a group of rows.
template <class T>
struct ColumnSums {
    static constexpr int halves = lanes<T> / lanes<double>;
    Vector<T> absolute{}, nonzero{}, highest{};
    Vector<double> sum[2]{}, squares[2]{};

    void add(Vector<T> a, Vector<T> magnitude) {
        absolute += magnitude;
        nonzero += a != 0 ? broadcast<T>(1) : Vector<T>{};
        highest = maximum<T>(magnitude, highest);
        Vector<double> half[2];
        widen(a, half[0], half[1]);
        for (int i = 0; i < halves; ++i) sum[i] += half[i], squares[i] += half[i] * half[i];
    }

    void add_to(TileSums& sums, int64_t column) const {
        accumulate<T>(sums.of[0] + column, absolute);
        accumulate<T>(sums.of[3] + column, nonzero);
        Vector<double> most[2];
        widen(highest, most[0], most[1]);
        for (int i = 0; i < halves; ++i) {
            const int64_t at = column + i * lanes<double>;
            accumulate<double>(sums.of[1] + at, sum[i]);
            accumulate<double>(sums.of[2] + at, squares[i]);
            store<double>(sums.of[4] + at, maximum<double>(load<double>(sums.of[4] + at), most[i]));
        }
    }
};

// scale * sign(a): the scale with a's sign, or 0 where a is 0 or not a number.
template <class T>
inline Vector<T> scaled_sign(Vector<T> a, T scale) {
    using Bits = typename VectorTraits<T>::Bits;
    const BitsVector<T> sign = (BitsVector<T>)a & (Bits(1) << (8 * sizeof(T) - 1));
    const Vector<T> signed_scale = (Vector<T>)((BitsVector<T>)broadcast<T>(scale) | sign);
    return absolute<T>(a) > 0 ? signed_scale : Vector<T>{};
}

// What a layer's loops need of it.
template <class T, class Element>
struct ActivationRows {
    const Element* activation;
    Element* gradient;
    int64_t row_stride, neurons;
    T scale;           // the gradient's magnitude
    bool past_caches;  // every whole vector of the gradient is aligned then
};

template <class T, class Element>
inline void write_gradient(const ActivationRows<T, Element>& rows, Element* to, Vector<T> a) {
    const Vector<T> gradient = scaled_sign<T>(a, rows.scale);
    rows.past_caches ? stream_elements<T>(to, gradient) : store_elements<T>(to, gradient);
}

// Sum of |a| over activations that lie side by side, from `first` on.
template <class T, class Element, bool with_gradient>
double activation_run(const ActivationRows<T, Element> rows, const Element* from, Element* to, int64_t count) {
    constexpr int64_t vector_bytes = lanes<T> * sizeof(Element);
    const int64_t head =
        rows.past_caches ? int64_t(reinterpret_cast<uintptr_t>(to) % vector_bytes / sizeof(Element)) : 0;
    Vector<T> sum{};
    over_vectors<T>(
        Piece{0, count, head},
        [&](int64_t i) {
            const Vector<T> a = load_elements<T>(from - head + i);
            sum += absolute<T>(a);
            if constexpr (with_gradient) write_gradient<T>(rows, to - head + i, a);
        },
        [&](int64_t i, int64_t first, int64_t last) {
            const Vector<T> a = load_partial<T>(from - head + i, first, last, T(0));
            sum += absolute<T>(a);
            if constexpr (with_gradient) store_partial<T>(to - head + i, scaled_sign<T>(a, rows.scale), first, last);
        });
    return sum_of_lanes<T>(sum);
}

// Runs are short enough that float adds them up well.
template <class T>
constexpr int64_t longest_run = 128 * lanes<T>;

template <class T, class Element, bool with_gradient>
double activation_tile_alone(const ActivationRows<T, Element>& rows, Tile tile) {
    int64_t row_length = tile.last_column - tile.first_column, row_count = tile.last_row - tile.first_row;
    if (rows.row_stride == rows.neurons && row_length == rows.neurons) row_length *= row_count, row_count = 1;
    double total = 0;
    for (int64_t row = tile.first_row; row < tile.first_row + row_count; ++row) {
        for (int64_t start = 0; start < row_length; start += longest_run<T>) {
            const int64_t count = start + longest_run<T> < row_length ? longest_run<T> : row_length - start;
            const int64_t column = tile.first_column + start;
            total += activation_run<T, Element, with_gradient>(
                rows, rows.activation + row * rows.row_stride + column,
                with_gradient ? rows.gradient + row * rows.neurons + column : nullptr, count);
        }
    }
    return total;
}

// One vector of columns of a group of rows; `count` columns of it where `partial`.
template <class T, class Element, bool with_gradient, bool partial>
inline ColumnSums<T> activation_columns(const ActivationRows<T, Element>& rows, int64_t first_row, int64_t last_row,
                                        int64_t column, int64_t count) {
    ColumnSums<T> columns;
    for (int64_t row = first_row; row < last_row; ++row) {
        const Element* from = rows.activation + row * rows.row_stride + column;
        const Vector<T> a = partial ? load_partial<T>(from, 0, count, T(0)) : load_elements<T>(from);
        columns.add(a, absolute<T>(a));
        if constexpr (with_gradient) {
            Element* to = rows.gradient + row * rows.neurons + column;
            if constexpr (partial)
                store_partial<T>(to, scaled_sign<T>(a, rows.scale), 0, count);
            else
                write_gradient<T>(rows, to, a);
        }
    }
    return columns;
}

template <class T, class Element, bool with_gradient>
double activation_tile_with_statistics(const ActivationRows<T, Element> rows, Tile tile, TileSums& sums) {
    const int64_t whole = tile.first_column + (tile.last_column - tile.first_column) / lanes<T> * lanes<T>;
    double total = 0;
    for (int64_t row = tile.first_row; row < tile.last_row; row += rows_in_group) {
        const int64_t end = row + rows_in_group < tile.last_row ? row + rows_in_group : tile.last_row;
        Vector<T> group_sum{};
        int64_t column = tile.first_column;
        for (; column < whole; column += lanes<T>) {
            const auto columns = activation_columns<T, Element, with_gradient, false>(rows, row, end, column, lanes<T>);
            group_sum += columns.absolute;
            columns.add_to(sums, column - tile.first_column);
        }
        if (column < tile.last_column) {
            const auto columns =
                activation_columns<T, Element, with_gradient, true>(rows, row, end, column, tile.last_column - column);
            group_sum += columns.absolute;
            columns.add_to(sums, column - tile.first_column);
        }
        total += sum_of_lanes<T>(group_sum);
    }
    return total;
}

template <class T, class Element>
double choose_outputs(const ActivationLayer& layer, Tile tile, double scale, bool large, TileSums& sums) {
    constexpr int64_t vector_bytes = lanes<T> * sizeof(Element);
    const bool aligned_rows =
        reinterpret_cast<uintptr_t>(layer.gradient) % vector_bytes == 0 && layer.neurons % lanes<T> == 0;
    const ActivationRows<T, Element> rows{static_cast<const Element*>(layer.activation.data),
                                          static_cast<Element*>(layer.gradient),
                                          layer.activation.row_stride,
                                          layer.neurons,
                                          T(scale),
                                          large && (aligned_rows || !layer.statistics)};
    if (layer.gradient && layer.statistics) return activation_tile_with_statistics<T, Element, true>(rows, tile, sums);
    if (layer.gradient) return activation_tile_alone<T, Element, true>(rows, tile);
    if (layer.statistics) return activation_tile_with_statistics<T, Element, false>(rows, tile, sums);
    return activation_tile_alone<T, Element, false>(rows, tile);
}

// Of any element type. `scale` is the gradient's magnitude; a `large` gradient is written past the caches; `sums` must
// be zero.
inline double activation_tile(const ActivationLayer& layer, Tile tile, double scale, bool large, TileSums& sums) {
    switch (layer.activation.type) {
        case ElementType::float64:
            return choose_outputs<double, double>(layer, tile, scale, large, sums);
        case ElementType::bfloat16:
            return choose_outputs<float, BFloat16>(layer, tile, scale, large, sums);
        case ElementType::float16:
            return choose_outputs<float, Float16>(layer, tile, scale, large, sums);
        default:
            return choose_outputs<float, float>(layer, tile, scale, large, sums);
    }
}

}  // namespace
}  // namespace kddp

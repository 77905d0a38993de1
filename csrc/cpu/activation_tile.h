// A tile of one layer's activations: its share of the L1 penalty, the penalty's gradient, the neurons'
// statistics.
#pragma once

#include "cpu/elements.h"
#include "kddp/activation_l1.h"

namespace kddp {
namespace {

// With statistics, a tile is at most so wide: its accumulators stay in the second-level cache.
constexpr int64_t tile_columns = 1024;

// With statistics, so many rows are read together before the accumulators are touched. Without, row follows row.
template <bool with_statistics>
constexpr int64_t rows_in_group = with_statistics ? 8 : 1;

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

// One vector of columns of a group of rows; `count` columns of it where `partial`.
template <class T, class Element, bool with_gradient, bool with_statistics, bool partial>
inline ColumnSums<T> activation_columns(const ActivationLayer& layer, int64_t first_row, int64_t last_row,
                                        int64_t column, int64_t count, T gradient_scale) {
    ColumnSums<T> columns;
    for (int64_t row = first_row; row < last_row; ++row) {
        const Element* from =
            static_cast<const Element*>(layer.activation.data) + row * layer.activation.row_stride + column;
        const Vector<T> a = partial ? load_partial<T>(from, 0, count, T(0)) : load_elements<T>(from);
        const Vector<T> magnitude = absolute<T>(a);
        columns.absolute += magnitude;
        if constexpr (with_statistics) columns.add(a, magnitude);
        if constexpr (with_gradient) {
            Element* to = static_cast<Element*>(layer.gradient) + row * layer.neurons + column;
            const Vector<T> gradient = scaled_sign<T>(a, gradient_scale);
            partial ? store_partial<T>(to, gradient, 0, count) : store_elements<T>(to, gradient);
        }
    }
    return columns;
}

// Returns the sum of |a| over the tile.
template <class T, class Element, bool with_gradient, bool with_statistics>
double activation_tile(const ActivationLayer& layer, Tile tile, T scale, TileSums& sums) {
    constexpr int64_t group_rows = rows_in_group<with_statistics>;
    const int64_t whole = tile.first_column + (tile.last_column - tile.first_column) / lanes<T> * lanes<T>;
    double total = 0;
    for (int64_t row = tile.first_row; row < tile.last_row; row += group_rows) {
        const int64_t end = row + group_rows < tile.last_row ? row + group_rows : tile.last_row;
        Vector<T> group_sum{};
        int64_t column = tile.first_column;
        for (; column < whole; column += lanes<T>) {
            const ColumnSums<T> columns = activation_columns<T, Element, with_gradient, with_statistics, false>(
                layer, row, end, column, lanes<T>, scale);
            group_sum += columns.absolute;
            if constexpr (with_statistics) columns.add_to(sums, column - tile.first_column);
        }
        if (column < tile.last_column) {
            const ColumnSums<T> columns = activation_columns<T, Element, with_gradient, with_statistics, true>(
                layer, row, end, column, tile.last_column - column, scale);
            group_sum += columns.absolute;
            if constexpr (with_statistics) columns.add_to(sums, column - tile.first_column);
        }
        total += sum_of_lanes<T>(group_sum);
    }
    return total;
}

template <class T, class Element>
double choose_outputs(const ActivationLayer& layer, Tile tile, double scale, TileSums& sums) {
    if (layer.gradient && layer.statistics) return activation_tile<T, Element, true, true>(layer, tile, T(scale), sums);
    if (layer.gradient) return activation_tile<T, Element, true, false>(layer, tile, T(scale), sums);
    if (layer.statistics) return activation_tile<T, Element, false, true>(layer, tile, T(scale), sums);
    return activation_tile<T, Element, false, false>(layer, tile, T(scale), sums);
}

// Of any element type. `scale` is the gradient's magnitude; `sums` must be zero.
inline double activation_tile(const ActivationLayer& layer, Tile tile, double scale, TileSums& sums) {
    switch (layer.activation.type) {
        case ElementType::float64:
            return choose_outputs<double, double>(layer, tile, scale, sums);
        case ElementType::bfloat16:
            return choose_outputs<float, BFloat16>(layer, tile, scale, sums);
        case ElementType::float16:
            return choose_outputs<float, Float16>(layer, tile, scale, sums);
        default:
            return choose_outputs<float, float>(layer, tile, scale, sums);
    }
}

}  // namespace
}  // namespace kddp

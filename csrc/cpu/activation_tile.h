// A tile of one layer's activations: its share of the L1 penalty, the penalty's gradient, the neurons'
// statistics.
#pragma once

#include "cpu/elements.h"
#include "kddp/activation_l1.h"

namespace kddp {
namespace {

// A tile's accumulators stay in the first-level cache; its rows are read in groups, as so many parallel
// streams.
constexpr int64_t tile_columns = 512, rows_in_group = 8;

struct Tile {
    int64_t first_row, last_row, first_column, last_column;
};

// Sums over the tile's rows, a column each, in double: pruning wants the variance of a constant neuron to be
// 0.
struct alignas(64) TileSums {
    double of[statistics_rows][tile_columns];
};

// What one vector of columns adds up over a group of rows.
template <class T>
struct ColumnSums {
    Vector<T> absolute{}, nonzero{}, highest{};
    Vector<double> sum[2]{}, squares[2]{};

    void add(Vector<T> a, Vector<T> magnitude) {
        nonzero += a != 0 ? broadcast<T>(1) : Vector<T>{};
        highest = maximum<T>(magnitude, highest);
        Vector<double> low, high;
        widen(a, low, high);
        sum[0] += low, sum[1] += high;
        squares[0] += low * low, squares[1] += high * high;
    }

    void add_to(TileSums& sums, int64_t column) const {
        Vector<double> low, high, most_low, most_high;
        constexpr int width = lanes<double>;
        // A vector of doubles has no second half: its second vector is left out.
        constexpr bool halves = sizeof(T) < sizeof(double);
        widen(absolute, low, high);
        accumulate(sums.of[0] + column, low);
        if (halves) accumulate(sums.of[0] + column + width, high);
        accumulate(sums.of[1] + column, sum[0]);
        if (halves) accumulate(sums.of[1] + column + width, sum[1]);
        accumulate(sums.of[2] + column, squares[0]);
        if (halves) accumulate(sums.of[2] + column + width, squares[1]);
        widen(nonzero, low, high);
        accumulate(sums.of[3] + column, low);
        if (halves) accumulate(sums.of[3] + column + width, high);
        widen(highest, most_low, most_high);
        store<double>(sums.of[4] + column, maximum<double>(load<double>(sums.of[4] + column), most_low));
        if (halves)
            store<double>(sums.of[4] + column + width,
                          maximum<double>(load<double>(sums.of[4] + column + width), most_high));
    }

  private:
    static void accumulate(double* to, Vector<double> v) { store<double>(to, load<double>(to) + v); }
};

template <class T>
inline Vector<T> scaled_sign(Vector<T> a, T scale) {
    const Vector<T> positive = broadcast<T>(scale), zero{};
    return a > 0 ? positive : (a < 0 ? -positive : zero);
}

// Returns the sum of |a| over the tile.
template <class T, class Element, bool with_gradient, bool with_statistics>
double activation_tile(const ActivationLayer& layer, Tile tile, T gradient_scale, TileSums& sums) {
    const Element* activation = static_cast<const Element*>(layer.activation.data);
    Element* gradient = static_cast<Element*>(layer.gradient);
    double total = 0;
    for (int64_t group = tile.first_row; group < tile.last_row; group += rows_in_group) {
        const int64_t end = group + rows_in_group < tile.last_row ? group + rows_in_group : tile.last_row;
        Vector<T> group_sum{};
        for (int64_t column = tile.first_column; column < tile.last_column; column += lanes<T>) {
            const int64_t count = tile.last_column - column;
            ColumnSums<T> columns;
            for (int64_t row = group; row < end; ++row) {
                const Element* from = activation + row * layer.activation.row_stride + column;
                const Vector<T> a = count >= lanes<T> ? load_elements<T>(from) : load_partial<T>(from, count, T(0));
                const Vector<T> magnitude = absolute<T>(a);
                columns.absolute += magnitude;
                if (with_gradient) {
                    Element* to = gradient + row * layer.neurons + column;
                    const Vector<T> g = scaled_sign<T>(a, gradient_scale);
                    count >= lanes<T> ? store_elements<T>(to, g) : store_partial<T>(to, g, count);
                }
                if (with_statistics) columns.add(a, magnitude);
            }
            group_sum += columns.absolute;
            if (with_statistics) columns.add_to(sums, column - tile.first_column);
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

// A tile of one layer's activations: its part of the L1 penalty, the penalty's gradient, the neurons' statistics.
#pragma once

#include "cpu/simd.h"
#include "kddp/kd_l1_loss.h"

namespace kddp {
namespace {

// The widest tile with statistics, whose accumulators stay in the second-level cache.
constexpr int64_t tile_columns = 1024;

// With statistics, the rows that are summed before the accumulators are updated, and those loaded at a time.
constexpr int64_t rows_in_group = 8, rows_at_once = 4;

struct Tile {
    int64_t first_row, last_row, first_column, last_column;
};

// Sums over the tile's rows, by column.
struct alignas(64) TileSums {
    double of[statistics_rows][tile_columns];
};

// Combines doubles in memory with a vector.
template <class T, class Combine>
KDDP_ALWAYS_INLINE inline void combine_with(double* to, Vector<T> v, Combine combine) {
    Vector<double> half[2];
    widen(v, half[0], half[1]);
    for (int i = 0; i < lanes<T> / lanes<double>; ++i, to += lanes<double>)
        store<double>(to, combine(load<double>(to), half[i]));
}

// Sums of one vector of columns over a group of rows. `sum` and `squares` are those of a - origin, with one of the
// neuron's activations as the origin: rounding errors are then relative to the deviation, and 0 if that is 0.
template <class T>
struct ColumnSums {
    Vector<T> absolute{}, sum{}, squares{}, nonzero{}, highest{};

    template <int count>
    KDDP_ALWAYS_INLINE void add(const Vector<T> (&a)[count], Vector<T> origin) {
        Vector<T> magnitude[count], delta[count];
#pragma GCC unroll 4
        for (int k = 0; k < count; ++k) {
            magnitude[k] = kddp::absolute<T>(a[k]);
            nonzero += a[k] != 0 ? broadcast<T>(1) : Vector<T>{};
            highest = maximum<T>(magnitude[k], highest);
            delta[k] = a[k] - origin;
            squares += delta[k] * delta[k];
        }
        absolute += sum_in_pairs(magnitude);
        sum += sum_in_pairs(delta);
    }

    KDDP_ALWAYS_INLINE static Vector<T> sum_in_pairs(const Vector<T> (&v)[4]) { return (v[0] + v[1]) + (v[2] + v[3]); }
    KDDP_ALWAYS_INLINE static Vector<T> sum_in_pairs(const Vector<T> (&v)[1]) { return v[0]; }

    KDDP_ALWAYS_INLINE void add_to(TileSums& sums, int64_t column) const {
        const auto add = [](Vector<double> a, Vector<double> b) { return a + b; };
        combine_with<T>(sums.of[0] + column, absolute, add);
        combine_with<T>(sums.of[1] + column, sum, add);
        combine_with<T>(sums.of[2] + column, squares, add);
        combine_with<T>(sums.of[3] + column, nonzero, add);
        combine_with<T>(sums.of[4] + column, highest, maximum<double>);
    }
};

// scale * sign(a); 0 if a is 0 or NaN.
template <class T>
inline Vector<T> scaled_sign(Vector<T> a, T scale) {
    using Bits = typename VectorTraits<T>::Bits;
    const BitsVector<T> sign = (BitsVector<T>)a & (Bits(1) << (8 * sizeof(T) - 1));
    const Vector<T> signed_scale = (Vector<T>)((BitsVector<T>)broadcast<T>(scale) | sign);
    return absolute<T>(a) > 0 ? signed_scale : Vector<T>{};
}

// A layer as its loops see it.
template <class T, class Element>
struct ActivationRows {
    const Element* activation;
    Element* gradient;
    int64_t row_stride, neurons;
    T scale;           // the gradient's magnitude
    bool past_caches;  // requires whole vectors of the gradient to be aligned
};

template <class T, class Element>
KDDP_ALWAYS_INLINE inline void write_gradient(const ActivationRows<T, Element>& rows, Element* to, Vector<T> a,
                                              int64_t first, int64_t last) {
    const Vector<T> gradient = scaled_sign<T>(a, rows.scale);
    if (first != 0 || last != lanes<T>) return store_partial<T>(to, gradient, first, last);
    rows.past_caches ? stream_elements<T>(to, gradient) : store_elements<T>(to, gradient);
}

// Sum of |a| over contiguous activations.
template <class T, class Element, bool with_gradient>
double activation_run(const ActivationRows<T, Element> rows, const Element* from, Element* to, int64_t count) {
    constexpr int64_t vector_bytes = lanes<T> * sizeof(Element);
    const int64_t head =
        rows.past_caches ? int64_t(reinterpret_cast<uintptr_t>(to) % vector_bytes / sizeof(Element)) : 0;
    Vector<T> sum{};
    for_each_vector<T>(Chunk{0, count, head}, [&](int64_t i, int64_t first, int64_t last) KDDP_ALWAYS_INLINE {
        const Vector<T> a = load_lanes<T>(from - head + i, first, last, T(0));
        sum += absolute<T>(a);
        if constexpr (with_gradient) write_gradient<T>(rows, to - head + i, a, first, last);
    });
    return sum_of_lanes<T>(sum);
}

// Longer sums would lose too many digits in float.
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

// The origin of sums and squares: the smaller of a neuron's activations in two rows, if it is finite.
inline double origin_of(double first, double second) {
    const double smaller = std::abs(first) < std::abs(second) ? first : second;
    return std::isfinite(smaller) ? smaller : 0;
}

template <class T>
KDDP_ALWAYS_INLINE inline Vector<T> origin_of(Vector<T> first, Vector<T> second) {
    const Vector<T> smaller = absolute<T>(first) < absolute<T>(second) ? first : second;
    return absolute<T>(smaller) < infinity<T> ? smaller : Vector<T>{};
}

// One vector of columns in `count` rows. Only the first `columns` lanes exist.
template <class T, class Element, bool with_gradient, int count>
KDDP_ALWAYS_INLINE inline void add_rows(const ActivationRows<T, Element>& rows, int64_t row, int64_t column,
                                        int64_t columns, Vector<T> origin, ColumnSums<T>& sums) {
    Vector<T> a[count];
#pragma GCC unroll 4
    for (int k = 0; k < count; ++k) {
        const Element* from = rows.activation + (row + k) * rows.row_stride + column;
        a[k] = load_lanes<T>(from, 0, columns, T(0));
    }
    sums.add(a, origin);
    if constexpr (with_gradient) {
#pragma GCC unroll 4
        for (int k = 0; k < count; ++k) {
            Element* to = rows.gradient + (row + k) * rows.neurons + column;
            write_gradient<T>(rows, to, a[k], 0, columns);
        }
    }
}

// One vector of columns in a group of rows or in one row; only the first `columns` lanes exist. Returns Σ|a| by lane.
template <class T, class Element, bool with_gradient>
KDDP_ALWAYS_INLINE inline Vector<T> add_group(const ActivationRows<T, Element>& rows, Tile tile, int64_t row,
                                              int64_t last_row, int64_t column, int64_t columns, TileSums& sums) {
    const auto activations = [&](int64_t of_row) {
        return load_lanes<T>(rows.activation + of_row * rows.row_stride + column, 0, columns, T(0));
    };
    const Vector<T> origin = origin_of<T>(activations(tile.first_row), activations(tile.last_row - 1));
    ColumnSums<T> of_group;
    for (; row + rows_at_once <= last_row; row += rows_at_once)
        add_rows<T, Element, with_gradient, rows_at_once>(rows, row, column, columns, origin, of_group);
    for (; row < last_row; ++row) add_rows<T, Element, with_gradient, 1>(rows, row, column, columns, origin, of_group);
    of_group.add_to(sums, column - tile.first_column);
    return of_group.absolute;
}

// Turns sums and squares of a - origin into those of a.
template <class T, class Element>
void undo_origin(const ActivationRows<T, Element>& rows, Tile tile, TileSums& sums) {
    const int64_t count = tile.last_row - tile.first_row;
    if (count == 0) return;
    for (int64_t column = tile.first_column; column < tile.last_column; ++column) {
        const Element* from = rows.activation + tile.first_row * rows.row_stride + column;
        const auto activation = [&](int64_t row) { return double(to_number(from[row * rows.row_stride])); };
        const double origin = origin_of(activation(0), activation(count - 1));
        double& sum = sums.of[1][column - tile.first_column];
        double& squares = sums.of[2][column - tile.first_column];
        if (std::isfinite(squares)) {
            squares += origin * (2 * sum + double(count) * origin);
            sum += double(count) * origin;
            continue;
        }
        sum = squares = 0;  // the square of 1e20 overflowed float
        for (int64_t row = 0; row < count; ++row) sum += activation(row), squares += activation(row) * activation(row);
    }
}

template <class T, class Element, bool with_gradient>
double activation_tile_with_statistics(const ActivationRows<T, Element> rows, Tile tile, TileSums& sums) {
    const int64_t whole = tile.first_column + (tile.last_column - tile.first_column) / lanes<T> * lanes<T>;
    double total = 0;
    for (int64_t row = tile.first_row, end; row < tile.last_row; row = end) {
        end = row + (row + rows_in_group <= tile.last_row ? rows_in_group : 1);
        Vector<T> absolute{};
        int64_t column = tile.first_column;
        for (; column < whole; column += lanes<T>)
            absolute += add_group<T, Element, with_gradient>(rows, tile, row, end, column, lanes<T>, sums);
        if (column < tile.last_column) {
            const int64_t columns = tile.last_column - column;
            absolute += add_group<T, Element, with_gradient>(rows, tile, row, end, column, columns, sums);
        }
        total += sum_of_lanes<T>(absolute);
    }
    undo_origin(rows, tile, sums);
    return total;
}

template <class T, class Element>
double choose_outputs(const ActivationLayer& layer, Tile tile, double scale, bool large, TileSums& sums) {
    constexpr int64_t vector_bytes = lanes<T> * sizeof(Element);
    // With statistics, the columns of a vector are written row by row; writing part of a cache line past the caches
    // takes several times as long as writing all of it.
    const bool whole_lines = vector_bytes == line_bytes && layer.neurons % lanes<T> == 0 &&
                             reinterpret_cast<uintptr_t>(layer.gradient) % vector_bytes == 0;
    const ActivationRows<T, Element> rows{static_cast<const Element*>(layer.activation.data),
                                          static_cast<Element*>(layer.gradient),
                                          layer.activation.row_stride,
                                          layer.neurons,
                                          T(scale),
                                          large && (whole_lines || !layer.statistics)};
    if (layer.gradient && layer.statistics) return activation_tile_with_statistics<T, Element, true>(rows, tile, sums);
    if (layer.gradient) return activation_tile_alone<T, Element, true>(rows, tile);
    if (layer.statistics) return activation_tile_with_statistics<T, Element, false>(rows, tile, sums);
    return activation_tile_alone<T, Element, false>(rows, tile);
}

// Processes a tile of any element type. `scale` is the gradient's magnitude; a `large` gradient is written past the
// caches. `sums` must be zero.
inline double activation_tile(const ActivationLayer& layer, Tile tile, double scale, bool large, TileSums& sums) {
    return with_element(layer.activation.type, [&](auto element) {
        using Element = decltype(element);
        return choose_outputs<ComputedIn<Element>, Element>(layer, tile, scale, large, sums);
    });
}

}  // namespace
}  // namespace kddp

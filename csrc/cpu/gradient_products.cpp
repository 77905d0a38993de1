// The sums of activations times their gradients on the CPU, compiled once for each instruction set.
//
// Entries of at least a vector are summed one by one. Shorter ones are columns: sums of all columns wait in doubles
// until the columns of each entry are added up. Both divide the work by the sizes alone, so the result does not depend
// on the number of threads.
#include "kddp/gradient_products.h"

#include "cpu/isa.h"
#include "cpu/simd.h"

namespace kddp {
namespace {

// Fewer elements are summed before other threads would have started.
constexpr int64_t elements_worth_threads = 32768;

template <class T, class Element>
struct Tensors {
    const Element* activation;
    const Element* gradient;

    Tensors at(int64_t element) const { return {activation + element, gradient + element}; }
    KDDP_ALWAYS_INLINE Vector<T> terms(int64_t element, Vector<T> mean) const {
        return (load_elements<T>(activation + element) - mean) * load_elements<T>(gradient + element);
    }
    T term(int64_t element, T mean) const {
        return (T(to_number(activation[element])) - mean) * T(to_number(gradient[element]));
    }
};

template <class T>
T mean_of(const GradientProducts& job, int64_t entry) {
    return job.mean ? T(job.mean[entry]) : T(0);
}

template <class T>
void set_product(const GradientProducts& job, int64_t sample, int64_t entry, double sum) {
    static_cast<T*>(job.products)[sample * job.entries + entry] = T(sum);
}

// Long entries

// Vectors that are summed before the sum moves to double.
constexpr int64_t vectors_in_float = 64;

// Adds the terms of a run of at least one vector. The last vector overlaps the one before it; lanes that are counted
// already become 0.
template <class T, class Element>
KDDP_ALWAYS_INLINE inline void add_run(Tensors<T, Element> run, int64_t count, T mean, DoubleSum<T>& sum) {
    constexpr int64_t n = lanes<T>, at_once = 4;
    const Vector<T> means = broadcast<T>(mean);
    const int64_t whole = count / n * n;
    int64_t i = 0;
    while (i < whole) {
        const int64_t end = smaller(whole, i + vectors_in_float * n);
        Vector<T> sums[at_once]{};
        for (; i + at_once * n <= end; i += at_once * n) {
#pragma GCC unroll 4
            for (int k = 0; k < at_once; ++k) sums[k] += run.terms(i + k * n, means);
        }
        for (; i < end; i += n) sums[0] += run.terms(i, means);
        sum += (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
    if (whole == count) return;
    T is_new[n];
    for (int64_t lane = 0; lane < n; ++lane) is_new[lane] = T(lane >= n - (count - whole));
    sum += load<T>(is_new) != 0 ? run.terms(count - n, means) : Vector<T>{};
}

template <class T, class Element>
void sum_long_entries(const GradientProducts& job, Tensors<T, Element> tensors, [[maybe_unused]] bool worth_threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(job.threads) if (worth_threads)
    for (int64_t sample = 0; sample < job.samples; ++sample) {
        for (int64_t entry = 0; entry < job.entries; ++entry) {
            DoubleSum<T> sum;
            for (int64_t i = 0; i < job.before; ++i) {
                const int64_t first = ((sample * job.before + i) * job.entries + entry) * job.after;
                add_run<T, Element>(tensors.at(first), job.after, mean_of<T>(job, entry), sum);
            }
            set_product<T>(job, sample, entry, sum.of_lanes());
        }
    }
}

// Short entries

constexpr int64_t most_columns = 1024;

// Rows whose terms are summed before the sums move to double.
constexpr int64_t rows_in_float = 8;

// A sample as (rows, repeats * entries * after). Runs of all entries are repeated in a row until it is long enough.
struct ColumnLayout {
    ColumnLayout(const GradientProducts& job, int64_t long_enough) : rows(job.before) {
        const int64_t run = job.entries * job.after;
        for (repeats = long_enough / run; repeats > 1 && rows % repeats;) --repeats;
        if (repeats < 1) repeats = 1;
        rows /= repeats;
        row_length = repeats * run;
        block_entries = smaller(job.entries, most_columns / job.after);
        block_samples = clamp(65536 / (rows * repeats * block_entries * job.after), 1, 64);
        sums_are_products = job.after == 1 && repeats == 1 && rows <= rows_in_float;
    }

    int64_t rows, repeats, row_length;
    int64_t block_entries, block_samples;  // of a piece of work
    bool sums_are_products;                // each column is an entry, and its sum needs no double
};

// A block of columns, with the mean and the sum of each.
template <class T>
struct alignas(64) Columns {
    T means[most_columns];
    double sums[most_columns];
};

// Sums of `count` vectors of columns over some rows. Only the first `columns` lanes of a vector exist.
template <int count, class T, class Element>
KDDP_ALWAYS_INLINE inline void sum_rows(Tensors<T, Element> from, int64_t row_length, int64_t rows, int64_t columns,
                                        const T* means, Vector<T> (&sum)[count]) {
    for (int64_t row = 0; row < rows; ++row, from = from.at(row_length)) {
        for (int64_t i = 0; i < count * lanes<T>; i += line_bytes / sizeof(Element)) {
            const Tensors next = from.at(rows_in_float * row_length + i);
            prefetch(next.activation), prefetch(next.gradient);
        }
#pragma GCC unroll 4
        for (int k = 0; k < count; ++k) {
            const int64_t i = k * lanes<T>;
            const Vector<T> a = load_lanes<T>(from.activation + i, 0, columns, T(0));
            sum[k] += (a - load<T>(means + i)) * load_lanes<T>(from.gradient + i, 0, columns, T(0));
        }
    }
}

template <int count, class T>
KDDP_ALWAYS_INLINE inline void add_to_sums(const Vector<T> (&sum)[count], bool is_first, double* sums) {
    for (int k = 0; k < count; ++k) {
        Vector<double> half[2];
        widen(sum[k], half[0], half[1]);
        for (int i = 0; i < lanes<T> / lanes<double>; ++i, sums += lanes<double>)
            store<double>(sums, is_first ? half[i] : load<double>(sums) + half[i]);
    }
}

template <class T>
KDDP_ALWAYS_INLINE inline void store_lanes(T* to, Vector<T> v, int64_t last) {
    last == lanes<T> ? store<T>(to, v) : store_partial<T>(to, v, 0, last);
}

// Sets the sums of a block of columns, or the products themselves if that is all.
template <class T, class Element>
void sum_columns(const ColumnLayout& layout, Tensors<T, Element> from, int64_t count, Columns<T>& columns,
                 T* products) {
    constexpr int64_t n = lanes<T>;
    for (int64_t row = 0; row < layout.rows; row += rows_in_float, from = from.at(rows_in_float * layout.row_length)) {
        const int64_t rows = smaller(rows_in_float, layout.rows - row);
        const auto add = [&](auto vectors, int64_t i, int64_t of_vector) KDDP_ALWAYS_INLINE {
            Vector<T> sum[vectors.value]{};
            sum_rows<vectors.value, T, Element>(from.at(i), layout.row_length, rows, of_vector, columns.means + i, sum);
            if (!layout.sums_are_products) return add_to_sums<vectors.value, T>(sum, row == 0, columns.sums + i);
            for (int k = 0; k < vectors.value; ++k) store_lanes<T>(products + i + k * n, sum[k], of_vector);
        };
        int64_t i = 0;
        for (; i + 4 * n <= count; i += 4 * n) add(std::integral_constant<int, 4>(), i, n);
        for (; i + n <= count; i += n) add(std::integral_constant<int, 1>(), i, n);
        if (i < count) add(std::integral_constant<int, 1>(), i, count % n);
    }
}

// Adds up the columns of each entry. `after`, if it is not 0, is that of the job.
template <int after, class T>
KDDP_ALWAYS_INLINE inline void add_columns(const GradientProducts& job, const double* sums, int64_t entries,
                                           T* products) {
    const int64_t columns = after ? after : job.after;
    for (int64_t entry = 0; entry < entries; ++entry, sums += columns) {
        double sum = sums[0];
#pragma GCC unroll 16
        for (int64_t i = 1; i < columns; ++i) sum += sums[i];
        products[entry] = T(sum);
    }
}

// The products of up to `block_entries` entries, from `first`, of some samples.
template <class T, class Element>
void sum_block(const GradientProducts& job, const ColumnLayout& layout, Tensors<T, Element> tensors,
               int64_t first_sample, int64_t first) {
    Columns<T> columns;  // lanes outside of the columns are not used
    std::memset(columns.means, 0, sizeof columns.means);
    const int64_t entries = smaller(layout.block_entries, job.entries - first), run = job.entries * job.after;
    const int64_t of_run = entries * job.after, count = (layout.repeats - 1) * run + of_run;
    for (int64_t i = 0; job.mean && i < count; ++i) columns.means[i] = T(job.mean[first + i % run / job.after]);
    const int64_t end = smaller(job.samples, first_sample + layout.block_samples);
    for (int64_t sample = first_sample; sample < end; ++sample) {
        const int64_t start = sample * layout.rows * layout.row_length + first * job.after;
        T* to = static_cast<T*>(job.products) + sample * job.entries + first;
        sum_columns<T, Element>(layout, tensors.at(start), count, columns, to);
        if (layout.sums_are_products) continue;
        for (int64_t i = of_run; i < count; ++i) columns.sums[i % of_run] += columns.sums[i];
        switch (job.after) {
            case 1:
                add_columns<1>(job, columns.sums, entries, to);
                break;
            case 4:
                add_columns<4>(job, columns.sums, entries, to);
                break;
            case 9:
                add_columns<9>(job, columns.sums, entries, to);
                break;
            default:
                add_columns<0>(job, columns.sums, entries, to);
        }
    }
}

template <class T, class Element>
void sum_short_entries(const GradientProducts& job, Tensors<T, Element> tensors, [[maybe_unused]] bool worth_threads) {
    const ColumnLayout layout(job, 4 * lanes<T>);
#pragma omp parallel for collapse(2) schedule(static) num_threads(job.threads) if (worth_threads)
    for (int64_t sample = 0; sample < job.samples; sample += layout.block_samples)
        for (int64_t entry = 0; entry < job.entries; entry += layout.block_entries)
            sum_block<T, Element>(job, layout, tensors, sample, entry);
}

void sum_products(const GradientProducts& job) {
    if (job.samples * job.entries == 0) return;
    const int64_t elements = job.samples * job.before * job.entries * job.after;
    if (elements == 0) {
        std::memset(job.products, 0, job.samples * job.entries * (job.type == ElementType::float64 ? 8 : 4));
        return;
    }
    const bool worth_threads = job.threads > 1 && elements > elements_worth_threads;
    with_element(job.type, [&](auto element) {
        using Element = decltype(element);
        using T = ComputedIn<Element>;
        const Tensors<T, Element> tensors{static_cast<const Element*>(job.activation),
                                          static_cast<const Element*>(job.gradient)};
        if (job.after >= lanes<T>)
            sum_long_entries<T, Element>(job, tensors, worth_threads);
        else
            sum_short_entries<T, Element>(job, tensors, worth_threads);
    });
}

}  // namespace

// The build names these after the instruction set.
const products::Kernel products::KDDP_ISA_KERNELS = sum_products;

}  // namespace kddp

// The gather of kept rows and columns on the CPU: a parallel loop over the kept rows of each tensor.
//
// Memory bounds its speed, so one build serves all instruction sets. Huge pages make large fresh outputs 4 times as
// fast, and prefetching the next row makes large gathers 1.3 times as fast. Vector instructions and stores past the
// caches gained less than 1.3 times on fresh outputs.
#include "cpu/simd.h"
#include "kddp/gather_slices.h"

namespace kddp {
namespace {

// Below this many bytes, starting threads costs more than they save.
constexpr int64_t bytes_worth_threads = 1 << 18;

// `fixed_width` is the width of a column in bytes if it is known at compile time, else 0.
template <int64_t fixed_width>
void gather_columns(const GatherSlices& job, int64_t column_bytes, const char* from, const char* next, char* to) {
    const int64_t width = fixed_width ? fixed_width : column_bytes;
    for (int64_t i = 0; i < job.kept_columns; ++i) {
        const int64_t offset = job.keep_columns[i] * width;
        prefetch(next + offset);
        std::memcpy(to + i * width, from + offset, width);
    }
}

// Copies the kept columns of a row. `next` is the row that is copied after this one.
void gather_row(const GatherSlices& job, int64_t column_bytes, const char* from, const char* next, char* to) {
    if (job.kept_columns == 0) return;  // there is no target
    if (!job.keep_columns) {
        std::memcpy(to, from, job.kept_columns * column_bytes);
        return;
    }
    switch (column_bytes) {
        case 1:
            return gather_columns<1>(job, column_bytes, from, next, to);
        case 2:
            return gather_columns<2>(job, column_bytes, from, next, to);
        case 4:
            return gather_columns<4>(job, column_bytes, from, next, to);
        case 8:
            return gather_columns<8>(job, column_bytes, from, next, to);
        default:
            return gather_columns<0>(job, column_bytes, from, next, to);
    }
}

// What the pruned columns of a row contributed. Four partial sums hide the latency of the additions.
template <class Element>
double contribution(const Compensation& job, const char* row, int64_t elements) {
    constexpr int64_t ways = 4;
    const auto term = [&](int64_t p) {
        const Element* column = reinterpret_cast<const Element*>(row) + job.pruned_columns[p] * elements;
        double sum = double(to_number(column[0]));
        for (int64_t k = 1; k < elements; ++k) sum += double(to_number(column[k]));
        return sum * job.means[p];
    };
    double sums[ways] = {};
    int64_t p = 0;
    for (; p + ways <= job.pruned_count; p += ways) {
#pragma GCC unroll 4
        for (int64_t way = 0; way < ways; ++way) sums[way] += term(p + way);
    }
    for (; p < job.pruned_count; ++p) sums[0] += term(p);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

double contribution(const Compensation& job, const char* row, int64_t column_bytes) {
    const int64_t elements = column_bytes / size_of(job.type);
    return with_element(job.type, [&](auto element) { return contribution<decltype(element)>(job, row, elements); });
}

const char* source_row(const GatherSlices& job, const Block& block, int64_t row) {
    return static_cast<const char*>(block.source) + (job.keep_rows ? job.keep_rows[row] : row) * block.row_stride;
}

}  // namespace

void gather_slices(const GatherSlices& job) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < job.block_count; ++i) {
        const Block& block = job.blocks[i];
        bytes += job.kept_rows * job.columns * block.column_bytes;
        advise_huge_pages(block.target, job.kept_rows * job.kept_columns * block.column_bytes);
    }
    [[maybe_unused]] const bool worth_threads =
        job.threads > 1 && bytes > bytes_worth_threads;  // unused without OpenMP
#pragma omp parallel num_threads(job.threads) if (worth_threads)
    for (int64_t i = 0; i < job.block_count; ++i) {
        const Block& block = job.blocks[i];
        // Static: the rows of a thread are contiguous, and two threads rarely first touch the same huge page.
#pragma omp for schedule(static) nowait
        for (int64_t row = 0; row < job.kept_rows; ++row) {
            const char* from = source_row(job, block, row);
            const char* next = source_row(job, block, row + 1 < job.kept_rows ? row + 1 : row);
            char* to = static_cast<char*>(block.target) + row * job.kept_columns * block.column_bytes;
            gather_row(job, block.column_bytes, from, next, to);
            if (i == 0 && job.compensation.pruned_columns)
                job.compensation.shift[row] = contribution(job.compensation, from, block.column_bytes);
        }
    }
}

}  // namespace kddp

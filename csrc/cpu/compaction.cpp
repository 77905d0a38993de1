// The gather of kept rows and columns on the CPU. Memory decides its speed, so one build serves every
// processor.
#include "kddp/compaction.h"

#include <cstring>

namespace kddp {
namespace {

// Below this many bytes a team of threads costs more than it saves.
constexpr int64_t bytes_worth_threads = 1 << 18;

// Copies the kept columns of one row; each column is `bytes` wide, which the compiler knows where it matters.
template <int64_t fixed_bytes>
void gather_row(const char* from, char* to, const Compaction& job, int64_t bytes) {
    const int64_t width = fixed_bytes ? fixed_bytes : bytes;
    for (int64_t i = 0; i < job.kept_columns; ++i)
        std::memcpy(to + i * width, from + job.keep_columns[i] * width, width);
}

void gather_row(const Compaction& job, const Block& block, int64_t row) {
    const int64_t bytes = block.inner * block.element_size;
    const int64_t source_row = job.keep_rows ? job.keep_rows[row] : row;
    const char* from = static_cast<const char*>(block.source) + source_row * job.columns * bytes;
    char* to = static_cast<char*>(block.target) + row * job.kept_columns * bytes;
    if (!job.keep_columns) {
        std::memcpy(to, from, job.kept_columns * bytes);
    } else if (bytes == 4) {
        gather_row<4>(from, to, job, bytes);
    } else if (bytes == 2) {
        gather_row<2>(from, to, job, bytes);
    } else if (bytes == 8) {
        gather_row<8>(from, to, job, bytes);
    } else {
        gather_row<0>(from, to, job, bytes);
    }
}

template <class T>
double contribution_of_row(const Compensation& job, int64_t row) {
    const int64_t source_row = job.keep_rows ? job.keep_rows[row] : row;
    const T* weight = static_cast<const T*>(job.weight) + source_row * job.columns * job.inner;
    double sum = 0;
    for (int64_t p = 0; p < job.pruned_count; ++p) {
        const T* column = weight + job.pruned_columns[p] * job.inner;
        double of_column = 0;
        for (int64_t k = 0; k < job.inner; ++k) of_column += double(column[k]);
        sum += of_column * job.pruned_means[p];
    }
    return sum;
}

}  // namespace

void gather_slices(const Compaction& job) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < job.block_count; ++i)
        bytes += job.kept_rows * job.kept_columns * job.blocks[i].inner * job.blocks[i].element_size;
    // Tensor after tensor, so that the rows written last are near one another.
    const int64_t all_rows = job.block_count * job.kept_rows;
#pragma omp parallel for num_threads(job.threads) if (job.threads > 1 && bytes > bytes_worth_threads)
    for (int64_t i = 0; i < all_rows; ++i) gather_row(job, job.blocks[i / job.kept_rows], i % job.kept_rows);
}

void pruned_contribution(const Compensation& job) {
    for (int64_t row = 0; row < job.kept_rows; ++row)
        job.shift[row] = job.is_double ? contribution_of_row<double>(job, row) : contribution_of_row<float>(job, row);
}

}  // namespace kddp

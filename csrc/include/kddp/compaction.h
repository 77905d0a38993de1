// Taking the kept rows and columns out of every tensor of a layer in one call.
#pragma once

#include <cstdint>

namespace kddp {

// One tensor, seen as a contiguous (rows, columns, inner) block of elements of `element_size` bytes.
struct Block {
    const void* source;
    void* target;  // (kept rows, kept columns, inner)
    int64_t inner;
    int64_t element_size;
};

struct Compaction {
    const Block* blocks;
    int64_t block_count;
    int64_t rows;
    int64_t columns;
    const int64_t* keep_rows;  // absent: all
    int64_t kept_rows;
    const int64_t* keep_columns;  // absent: all
    int64_t kept_columns;
    int threads;
};

void gather_slices(const Compaction& job);

// What the pruned columns contributed on average: shift[r] = sum over p of weight[r, pruned[p], :] *
// means[p], accumulated in double in the order of p. Element types other than float32 and float64 are not
// taken.
struct Compensation {
    const void* weight;  // (rows, columns, inner) contiguous
    bool is_double;
    int64_t columns;
    int64_t inner;
    const int64_t* keep_rows;
    int64_t kept_rows;
    const int64_t* pruned_columns;
    int64_t pruned_count;
    const double* pruned_means;
    double* shift;  // (kept rows)
};

void pruned_contribution(const Compensation& job);

}  // namespace kddp

// Taking the kept rows and columns out of every tensor of a layer, and what the pruned columns contributed, in one
// reading of them: one job is one launch.
#pragma once

#include "kddp/types.h"

namespace kddp {

// One tensor, seen as (rows, columns): a column is `column_bytes` wide (those of a matrix behind a flatten, or of a
// convolution, are several elements), columns lie side by side, and rows `row_stride` bytes apart.
struct Block {
    const void* source;
    int64_t row_stride;
    int64_t column_bytes;
    void* target;  // (kept rows, kept columns), contiguous
};

// shift[r] = sum over p and the elements k of a column of block 0's [row r, pruned[p], k] * means[p], summed in double
// in an order that depends on the sizes and the instruction set alone. NaN and infinities in pruned columns follow
// IEEE 754 (infinity * 0 is NaN); those in kept columns do not matter.
struct Compensation {
    ElementType type;               // of block 0
    const int64_t* pruned_columns;  // absent: none wanted
    int64_t pruned_count;
    const double* means;  // (pruned)
    double* shift;        // (kept rows)
};

struct GatherSlices {
    const Block* blocks;
    int64_t block_count;
    int64_t columns;
    const int64_t* keep_rows;  // in any order, and again if so wished; absent: the first `kept_rows`
    int64_t kept_rows;
    const int64_t* keep_columns;  // likewise
    int64_t kept_columns;
    Compensation compensation;
    void* workspace;  // gather_slices_workspace bytes, aligned to 64
    int threads;
};

int64_t gather_slices_workspace(const GatherSlices& job);

// Indices must be in range.
void gather_slices(const GatherSlices& job);

}  // namespace kddp

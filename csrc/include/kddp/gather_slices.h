// The gather of the kept rows and columns of all tensors of a layer, together with the contribution of its pruned
// columns. One job is one launch.
#pragma once

#include "kddp/types.h"

namespace kddp {

// One tensor as (rows, columns). Columns are contiguous and `column_bytes` wide: several elements behind a flatten or
// in a convolution. Rows are `row_stride` bytes apart.
struct Block {
    const void* source;
    int64_t row_stride;
    int64_t column_bytes;
    void* target;  // (kept rows, kept columns), contiguous
};

// The contribution of the pruned columns of block 0, with k over the elements of a column:
//   shift[r] = sum over p and k of block0[r, pruned[p], k] * means[p]
// The sum is in double, in an order that depends on the sizes alone. NaN and infinity in pruned columns follow IEEE 754
// (infinity * 0 is NaN).
struct Compensation {
    ElementType type;               // of block 0
    const int64_t* pruned_columns;  // absent: no contribution is computed
    int64_t pruned_count;
    const double* means;  // (pruned)
    double* shift;        // (kept rows)
};

struct GatherSlices {
    const Block* blocks;
    int64_t block_count;
    int64_t columns;
    const int64_t* keep_rows;  // in any order, also repeated; absent: the first `kept_rows`
    int64_t kept_rows;
    const int64_t* keep_columns;  // as above
    int64_t kept_columns;
    Compensation compensation;
    int threads;
};

// Indices must be in range.
void gather_slices(const GatherSlices& job);

}  // namespace kddp

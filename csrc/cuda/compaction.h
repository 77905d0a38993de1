// What the CUDA backend implements for the compaction.
#pragma once

#include "cuda/place.h"
#include "kddp/gather_slices.h"

namespace kddp {

// One launch for up to `blocks_of_launch` tensors, on the current device. Indices must be in range; it needs no
// workspace.
void cuda_gather_slices(const GatherSlices& job, const CudaPlace& place);

}  // namespace kddp

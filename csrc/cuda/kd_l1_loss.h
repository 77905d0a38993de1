// What the CUDA backend implements for the loss. `threads` of a job has no meaning here.
#pragma once

#include "cuda/place.h"
#include "kddp/kd_l1_loss.h"

namespace kddp {

// Bytes of workspace of a launch on the current device.
int64_t cuda_kd_l1_loss_workspace(const KdL1Loss& job);

// Starts the loss on the current device, in one launch for up to `layers_of_launch` layers of activations; nothing is
// waited for. The same numbers at every run on the same kind of GPU. A label out of range makes the loss, and the
// gradient of its row, not a number.
void cuda_kd_l1_loss(const KdL1Loss& job, const CudaPlace& place);

}  // namespace kddp

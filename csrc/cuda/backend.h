// The operations of the CUDA backend. Each one launches its kernels on the current device and does not wait for them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kddp/gather_slices.h"
#include "kddp/gradient_products.h"
#include "kddp/kd_l1_loss.h"

namespace kddp {

// What a launch needs besides its job. The device is the current one.
struct LaunchContext {
    cudaStream_t stream;
};

// Bytes of workspace that the loss needs on the current device. `threads` of a job is ignored here.
int64_t cuda_kd_l1_loss_workspace(const KdL1Loss& job);

// The fused loss: a launch that counts the valid labels, then one for up to `layers_per_launch` layers of activations.
// Results are the same at every run on the same kind of GPU, and as large a share of it. A label out of range makes the
// loss and the gradient of its row NaN.
void cuda_kd_l1_loss(const KdL1Loss& job, const LaunchContext& context);

// One launch for up to `blocks_per_launch` tensors. Indices must be in range. Needs no workspace.
void cuda_gather_slices(const GatherSlices& job, const LaunchContext& context);

// One launch. Needs no workspace.
void cuda_gradient_products(const GradientProducts& job, const LaunchContext& context);

// target = source * factor * scalar, for contiguous elements of one type. source and target may be the same.
struct ScaledTensor {
    const void* source;
    void* target;
    int64_t count;
    ElementType type;
    double factor;
};

// The backward of the loss: scales its gradients by the incoming one, which stays on the device. `scalar` points to one
// float32 or float64. One launch for up to `tensors_per_launch` tensors.
void cuda_scale(const ScaledTensor* tensors, int64_t tensor_count, const void* scalar, ElementType scalar_type,
                const LaunchContext& context);

// What the current device offers to a launch (occupancy.cu).

// The error that a launch on the current device would end with: no driver, or no kernel for its architecture.
cudaError_t find_kernels();

// Dynamic shared memory that a block may use.
int max_dynamic_shared_bytes();

// Blocks of a kernel that the device runs at once, at least 1. Also raises the kernel's limit of shared memory. Answers
// are cached. An error is not: it is left to cudaGetLastError.
int resident_blocks(const void* kernel, int threads, int shared_bytes);

}  // namespace kddp

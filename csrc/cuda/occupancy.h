// What the current device offers to a launch. The answers are cached.
#pragma once

#include <cuda_runtime.h>

namespace kddp {

// The error that a launch on the current device would end with: no driver, or no kernel for its architecture.
cudaError_t find_kernels();

// Dynamic shared memory that a block may use.
int max_dynamic_shared_bytes();

// Blocks of a kernel that the device runs at once, at least 1. Also raises the kernel's limit of shared memory.
int resident_blocks(const void* kernel, int threads, int shared_bytes);

}  // namespace kddp

// What the current device offers to a launch; asked for once.
#pragma once

#include <cuda_runtime.h>

namespace kddp {

// What a launch on the current device would end with, where there is no driver or no kernel for its architecture.
cudaError_t find_kernels();

// Dynamic shared memory that a block may have.
int most_dynamic_shared_bytes();

// Blocks of a kernel that run at once on the device, at least 1. Allows the kernel so much shared memory.
int resident_blocks(const void* kernel, int threads, int shared_bytes);

}  // namespace kddp

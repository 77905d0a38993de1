// What a launch needs besides its job. The device is the current one.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace kddp {

constexpr int64_t counters_bytes = 16384;

struct CudaPlace {
    cudaStream_t stream;
    unsigned* counters;  // counters_bytes that are 0 between launches; of this device and stream alone
};

}  // namespace kddp

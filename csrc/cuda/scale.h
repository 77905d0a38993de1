// The backward of the loss: its gradients times what comes from above, which stays on the device.
#pragma once

#include "cuda/place.h"
#include "kddp/types.h"

namespace kddp {

// target = source * factor * the scalar, elements of one type side by side. They may be the same.
struct ScaledTensor {
    const void* source;
    void* target;
    int64_t count;
    ElementType type;
    double factor;
};

// `scalar` is one float32 or float64. One launch for up to `tensors_of_scale_launch`.
void cuda_scale(const ScaledTensor* tensors, int64_t tensor_count, const void* scalar, ElementType scalar_type,
                const CudaPlace& place);

}  // namespace kddp

// The kernels that compute in double: logits of any type, float64 among them.
#include "cuda/kernels_by_rows.cuh"

namespace kddp {

LossKernels float64_kernels(GradientForm form) {
    return kernels_of<RowKinds<double, ElementType::float64, true>>(form);
}

}  // namespace kddp

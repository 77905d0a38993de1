// The kernels for float32 logits of the student.
#include "cuda/kernels_by_rows.cuh"

namespace kddp {

LossKernels float32_kernels(GradientForm form) { return kernels_of<RowKinds<float, ElementType::float32>>(form); }

}  // namespace kddp

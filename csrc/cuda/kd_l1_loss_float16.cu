// The kernels for float16 logits of the student.
#include "cuda/kernels_by_rows.cuh"

namespace kddp {

LossKernels float16_kernels(GradientForm form) { return kernels_of<RowKinds<float, ElementType::float16>>(form); }

}  // namespace kddp

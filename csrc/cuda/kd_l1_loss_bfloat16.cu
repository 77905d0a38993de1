// The kernels for bfloat16 logits of the student.
#include "cuda/kernels_by_rows.cuh"

namespace kddp {

LossKernels bfloat16_kernels(GradientForm form) { return kernels_of<RowKinds<float, ElementType::bfloat16>>(form); }

}  // namespace kddp

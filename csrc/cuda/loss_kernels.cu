// The loss kernels for one type of the student's logits. CMake compiles this file once for each type, in parallel, with
// KDDP_LOGITS defined as float32, bfloat16, float16 or float64.
#include "cuda/loss_kernel.cuh"

namespace kddp {

template <>
LossKernels loss_kernels<ElementType::KDDP_LOGITS>(GradientForm form) {
    using Types = RowTypes<ElementType::KDDP_LOGITS>;
    return form == GradientForm::weighted ? kernels_of<Types, GradientForm::weighted>()
                                          : kernels_of<Types, GradientForm::difference>();
}

}  // namespace kddp

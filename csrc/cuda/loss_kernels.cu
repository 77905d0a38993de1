// The loss kernels for one type of the student's logits. CMake compiles this file once for each type, in parallel, with
// KDDP_LOGITS defined as float32, bfloat16, float16 or float64.
#include "cuda/loss_kernel.cuh"

namespace kddp {

template <ElementType type>
LossKernels loss_kernels(GradientForm form, bool is_usual) {
    if constexpr (!RowTypes<type>::any)
        if (is_usual) return kernels_of<RowTypes<type, true>, GradientForm::difference>();
    return form == GradientForm::weighted ? kernels_of<RowTypes<type>, GradientForm::weighted>()
                                          : kernels_of<RowTypes<type>, GradientForm::difference>();
}

template LossKernels loss_kernels<ElementType::KDDP_LOGITS>(GradientForm form, bool is_usual);

}  // namespace kddp

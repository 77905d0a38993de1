// The loss as a C function, for float32 and forward_kl only, which compiles fast: the kernels of usual calls, and one
// more for small rows of other calls.
#include <cstring>
#include <vector>

#include "cuda/backend.h"
#include "cuda/loss_kernel.cuh"

namespace kddp {
template <>
LossKernels loss_kernels<ElementType::float32>(GradientForm, bool is_usual) {
    if (is_usual) return kernels_of<RowTypes<ElementType::float32, true>, GradientForm::difference>();
    return {kd_l1_loss_by_rows<RowTypes<ElementType::float32>, 8, true, GradientForm::difference>};
}
template <>
LossKernels loss_kernels<ElementType::bfloat16>(GradientForm, bool) {
    return {};
}
template <>
LossKernels loss_kernels<ElementType::float16>(GradientForm, bool) {
    return {};
}
template <>
LossKernels loss_kernels<ElementType::float64>(GradientForm, bool) {
    return {};
}
}  // namespace kddp

// statistics: (5, neurons). Returns the text of the error, or null.
extern "C" const char* run_loss(int64_t rows, int64_t classes, int64_t temperature, const float* student,
                                const float* teacher, const int64_t* labels, int64_t neurons, const float* activation,
                                float* logits_gradient, float* activation_gradient, double* statistics, float* loss,
                                float* terms) {
    using kddp::ElementType;
    const kddp::ActivationLayer layer{
        {activation, ElementType::float32, neurons}, rows, neurons, double(rows), 0.1, activation_gradient, statistics};
    kddp::KdL1Loss job{};
    job.rows = rows, job.classes = classes;
    job.student = {student, ElementType::float32, classes}, job.teacher = {teacher, ElementType::float32, classes};
    job.labels = labels, job.ignore_index = -100, job.activations = {&layer, 1, neurons};
    job.temperature = double(temperature), job.alpha = 0.9, job.divergence = kddp::Divergence::forward_kl;
    job.logits_gradient = logits_gradient, job.result_type = ElementType::float32, job.loss = loss, job.terms = terms;
    std::vector<double> workspace(static_cast<size_t>(kddp::cuda_kd_l1_loss_workspace(job)) / 8 + 8);
    std::memset(workspace.data(), 0xFF, workspace.size() * sizeof(double));
    job.workspace = workspace.data() + (64 - reinterpret_cast<uintptr_t>(workspace.data()) % 64) % 64 / 8;
    emulator::allow(workspace.data(), workspace.size() * 8, true, "the workspace");
    return emulator::guarded([&] { kddp::cuda_kd_l1_loss(job, {nullptr}); });
}

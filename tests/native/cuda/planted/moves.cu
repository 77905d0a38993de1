// The compaction, the backward and the gradient products as C functions, for float32.
#include "cuda/backend.h"
#include "cuda/platform.cuh"

extern "C" {

const char* run_gather(int64_t columns, const int64_t* keep_rows, int64_t kept_rows, const int64_t* keep_columns,
                       int64_t kept_columns, const float* source, float* target) {
    const kddp::Block block{source, columns * 4, 4, target};
    const kddp::GatherSlices job{&block, 1, columns, keep_rows, kept_rows, keep_columns, kept_columns, {}, 1};
    return emulator::guarded([&] { kddp::cuda_gather_slices(job, {nullptr}); });
}

const char* run_scale(int64_t count, const float* source, float* target, const float* scalar) {
    const kddp::ScaledTensor tensor{source, target, count, kddp::ElementType::float32, 2.0};
    return emulator::guarded([&] { kddp::cuda_scale(&tensor, 1, scalar, kddp::ElementType::float32, {nullptr}); });
}

const char* run_products(int64_t samples, int64_t entries, int64_t after, const float* activation,
                         const float* gradient, const double* mean, float* products) {
    const kddp::GradientProducts job{
        activation, gradient, kddp::ElementType::float32, mean, products, samples, 1, entries, after, 1};
    return emulator::guarded([&] { kddp::cuda_gradient_products(job, {nullptr}); });
}
}

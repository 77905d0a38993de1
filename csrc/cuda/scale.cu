// The backward of the loss: scales all gradients of a call in one launch. Blocks take runs of 16-byte vectors, tensor
// by tensor. A tensor that would be multiplied by 1 in place is skipped, as in the usual loss.backward().
#include <algorithm>

#include "cuda/backend.h"
#include "cuda/elements.cuh"

namespace kddp {
namespace {

constexpr int tensors_per_launch = 48, threads = 256, vectors_per_run = threads * 4;

struct ScaleLaunch {
    ScaledTensor tensors[tensors_per_launch];
    int64_t first_run[tensors_per_launch + 1];
    int count;
    const void* scalar;
    ElementType scalar_type;
};

constexpr int elements_per_vector(ElementType type) { return static_cast<int>(16 / size_of(type)); }

template <class T, ElementType type>
KDDP_DEVICE void scale_run(const ScaledTensor& tensor, double scalar, int64_t first_vector) {
    constexpr int n = elements_per_vector(type), bytes = static_cast<int>(size_of(type));
    const T scale = T(scalar * tensor.factor);
    const char* from = static_cast<const char*>(tensor.source);
    char* to = static_cast<char*>(tensor.target);
    const bool aligned = (reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) % 16 == 0;
    for (int k = threadIdx.x; k < vectors_per_run; k += threads) {
        const int64_t first = (first_vector + k) * n;
        T values[n];
        if (aligned && first + n <= tensor.count) {
            load_run<T, type, n, Input::overwritten>(from + first * bytes, values);
#pragma unroll
            for (int i = 0; i < n; ++i) values[i] *= scale;  // NOLINT(*-core.uninitialized.Assign): load_run set it
            store_run<T, type, n>(to + first * bytes, values);
            continue;
        }
        for (int64_t i = first; i < first + n && i < tensor.count; ++i)
            store_element<T, type>(to + i * bytes, load_element<T, type, Input::overwritten>(from + i * bytes) * scale);
    }
}

__global__ void __launch_bounds__(threads) scale_gradients(const __grid_constant__ ScaleLaunch launch) {
    const double scalar = launch.scalar_type == ElementType::float64
                              ? load_global(static_cast<const double*>(launch.scalar))
                              : double(load_global(static_cast<const float*>(launch.scalar)));
    int index = 0;
    for (int64_t run = blockIdx.x; run < launch.first_run[launch.count]; run += gridDim.x) {
        while (run >= launch.first_run[index + 1]) ++index;
        const ScaledTensor& tensor = launch.tensors[index];
        if (tensor.source == tensor.target && scalar * tensor.factor == 1) continue;
        const int64_t first = (run - launch.first_run[index]) * vectors_per_run;
        if (tensor.type == ElementType::float64)
            scale_run<double, ElementType::float64>(tensor, scalar, first);
        else
            with_type<float>(tensor.type, [&](auto type) { scale_run<float, type.value>(tensor, scalar, first); });
    }
}

}  // namespace

void cuda_scale(const ScaledTensor* tensors, int64_t tensor_count, const void* scalar, ElementType scalar_type,
                const LaunchContext& context) {
    for (int64_t first = 0; first < tensor_count; first += tensors_per_launch) {
        ScaleLaunch launch{};
        launch.scalar = scalar, launch.scalar_type = scalar_type;
        launch.count = static_cast<int>(std::min<int64_t>(tensor_count - first, tensors_per_launch));
        for (int i = 0; i < launch.count; ++i) {
            launch.tensors[i] = tensors[first + i];
            const int64_t elements = int64_t(vectors_per_run) * elements_per_vector(launch.tensors[i].type);
            launch.first_run[i + 1] = launch.first_run[i] + (launch.tensors[i].count + elements - 1) / elements;
        }
        const int64_t runs = launch.first_run[launch.count];
        if (runs == 0) continue;
        const int resident = resident_blocks(reinterpret_cast<const void*>(&scale_gradients), threads, 0);
        const dim3 grid(static_cast<unsigned>(std::min<int64_t>(runs, resident)));
        KDDP_LAUNCH(scale_gradients, grid, dim3(threads), 0, context.stream, launch);
    }
}

}  // namespace kddp

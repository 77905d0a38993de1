// The sums of activations times their gradients, by sample and entry. One job is one launch.
#pragma once

#include "kddp/types.h"

namespace kddp {

// Both tensors are (samples, before, entries, after), contiguous, of one type:
//   products[n, e] = sum over i and j of (activation[n, i, e, j] - mean[e]) * gradient[n, i, e, j]
// The terms are computed in float32 and moved into double sums, or in float64 for float64 tensors. The order of the sum
// depends on the sizes alone.
struct GradientProducts {
    const void* activation;
    const void* gradient;
    ElementType type;
    const double* mean;  // (entries); absent: 0
    void* products;      // (samples, entries), float32, or float64 for float64 tensors
    int64_t samples, before, entries, after;
    int threads;
};

void gradient_products(const GradientProducts& job);

}  // namespace kddp

// The L1 penalty on the activations of fully-connected layers, and what pruning needs to know of their
// neurons.
#pragma once

#include "kddp/types.h"

namespace kddp {

// Rows of a statistics block: sum |a|, sum a, sum a^2, count of nonzeros, max |a|.
constexpr int64_t statistics_rows = 5;

// Activations (rows, neurons) of one layer and where the results go. Outputs are optional.
struct ActivationLayer {
    Matrix activation;
    int64_t rows, neurons;
    double samples;  // what the sum of |a| is divided by: the rows, or with several columns a neuron more than these
    double l1_weight;
    void* gradient;      // (rows, neurons) contiguous, the activation's type: d loss / d a
    double* statistics;  // row k of the block starts at statistics + k * statistics_stride
};

struct ActivationL1 {
    const ActivationLayer* layers;
    int64_t layer_count;
    int64_t statistics_stride;
};

}  // namespace kddp

// The L1 penalty on the activations of layers, and the statistics of their neurons for pruning.
#pragma once

#include "kddp/types.h"

namespace kddp {

// Rows of a statistics block: sum |a|, sum a, sum a^2, count of nonzeros, max |a|.
constexpr int64_t statistics_rows = 5;

// The activations (rows, neurons) of one layer and its optional outputs.
struct ActivationLayer {
    Matrix activation;
    int64_t rows, neurons;
    double samples;  // the divisor of sum |a|: the rows, or more if a neuron has several positions
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

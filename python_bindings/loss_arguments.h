// The fused loss for kddp_ext/ops/kd_l1_loss.py, which owns every buffer and has checked every size and type.
//
// A Backend is made of a call's `Place`, says how much workspace a job needs, and runs it.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "kddp/kd_l1_loss.h"

namespace kddp_python {

using MatrixArguments = std::tuple<Address, int, int64_t>;  // data, element type, row stride

inline kddp::Matrix matrix(const MatrixArguments& arguments) {
    const auto& [data, type, row_stride] = arguments;
    return {pointer<const void>(data), static_cast<kddp::ElementType>(type), row_stride};
}

// activation, rows, neurons, samples, l1_weight, gradient, statistics
using LayerArguments = std::tuple<MatrixArguments, int64_t, int64_t, double, double, Address, Address>;

inline std::vector<kddp::ActivationLayer> activation_layers(const std::vector<LayerArguments>& arguments) {
    std::vector<kddp::ActivationLayer> layers;
    layers.reserve(arguments.size());
    for (const auto& [activation, rows, neurons, samples, l1_weight, gradient, statistics] : arguments)
        layers.push_back({matrix(activation), rows, neurons, samples, l1_weight, pointer<void>(gradient),
                          pointer<double>(statistics)});
    return layers;
}

template <class Backend>
void kd_l1_loss(int64_t rows, int64_t classes, const MatrixArguments& student, const MatrixArguments& teacher,
                Address labels, const std::vector<LayerArguments>& layer_arguments, int64_t statistics_stride,
                double temperature, double alpha, double label_smoothing, int64_t ignore_index, int divergence,
                double jsd_beta, double dkd_target_weight, double dkd_non_target_weight, bool standardize_logits,
                bool scaled_gradients, Address logits_gradient, int result_type, Address loss, Address terms,
                const py::function& allocate, const typename Backend::Place& place) {
    const std::vector<kddp::ActivationLayer> layers = activation_layers(layer_arguments);
    kddp::KdL1Loss job{rows,
                       classes,
                       matrix(student),
                       matrix(teacher),
                       pointer<const int64_t>(labels),
                       {layers.data(), static_cast<int64_t>(layers.size()), statistics_stride},
                       temperature,
                       alpha,
                       label_smoothing,
                       ignore_index,
                       static_cast<kddp::Divergence>(divergence),
                       jsd_beta,
                       dkd_target_weight,
                       dkd_non_target_weight,
                       standardize_logits,
                       scaled_gradients,
                       pointer<void>(logits_gradient),
                       static_cast<kddp::ElementType>(result_type),
                       pointer<void>(loss),
                       pointer<void>(terms),
                       nullptr,
                       1};
    const Backend backend(place);
    const py::object workspace = take_workspace(backend, job, allocate);
    kddp::Status status;
    {
        const py::gil_scoped_release unlocked;
        status = backend.run(job);
    }
    if (status.code == kddp::Status::label_out_of_range)
        throw py::value_error("labels: expected values from 0 to " + std::to_string(classes - 1) +
                              " or ignore_index=" + std::to_string(ignore_index) + ", got " +
                              std::to_string(status.value) + " in row " + std::to_string(status.row));
}

}  // namespace kddp_python

// The operations for Python, for each backend. kddp_ext/ops calls them; it owns every buffer and has checked every size
// and type. Tensors come as addresses; the address 0 means that the tensor is absent.
//
// A Backend is constructed from the last argument of a call; it gives the bytes of workspace of a job, and runs it.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "kddp/gather_slices.h"
#include "kddp/gradient_products.h"
#include "kddp/kd_l1_loss.h"

namespace kddp_python {

namespace py = pybind11;

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

using MatrixArguments = std::tuple<Address, int, int64_t>;  // data, element type, row stride

inline kddp::Matrix matrix(const MatrixArguments& arguments) {
    const auto& [data, type, row_stride] = arguments;
    return {pointer<const void>(data), static_cast<kddp::ElementType>(type), row_stride};
}

// activation, rows, neurons, samples, l1_weight, gradient, statistics
using LayerArguments = std::tuple<MatrixArguments, int64_t, int64_t, double, double, Address, Address>;

template <class Backend>
void kd_l1_loss(int64_t rows, int64_t classes, const MatrixArguments& student, const MatrixArguments& teacher,
                Address labels, const MatrixArguments& soft_labels, Address class_weights, Address row_weights,
                const std::vector<LayerArguments>& layer_arguments, int64_t statistics_stride, double temperature,
                double alpha, double normalizer, double label_smoothing, int64_t ignore_index, int divergence,
                double mixture_share, double teacher_weight, double student_weight, double dkd_target_weight,
                double dkd_non_target_weight, bool standardize_logits, bool scaled_gradients, Address logits_gradient,
                int result_type, Address loss, Address terms, Address row_terms, const py::function& allocate,
                const typename Backend::Context& context) {
    std::vector<kddp::ActivationLayer> layers;
    layers.reserve(layer_arguments.size());
    for (const auto& [activation, layer_rows, neurons, samples, l1_weight, gradient, statistics] : layer_arguments)
        layers.push_back({matrix(activation), layer_rows, neurons, samples, l1_weight, pointer<void>(gradient),
                          pointer<double>(statistics)});
    kddp::KdL1Loss job{};
    job.rows = rows, job.classes = classes;
    job.student = matrix(student), job.teacher = matrix(teacher);
    job.labels = pointer<const int64_t>(labels), job.soft_labels = matrix(soft_labels);
    job.class_weights = pointer<const void>(class_weights), job.row_weights = pointer<const double>(row_weights);
    job.activations = {layers.data(), static_cast<int64_t>(layers.size()), statistics_stride};
    job.temperature = temperature;
    job.alpha = alpha;
    job.normalizer = normalizer;
    job.label_smoothing = label_smoothing;
    job.ignore_index = ignore_index;
    job.divergence = static_cast<kddp::Divergence>(divergence);
    job.mixture = {mixture_share, teacher_weight, student_weight};
    job.dkd_target_weight = dkd_target_weight, job.dkd_non_target_weight = dkd_non_target_weight;
    job.standardize_logits = standardize_logits;
    job.scaled_gradients = scaled_gradients;
    job.logits_gradient = pointer<void>(logits_gradient);
    job.result_type = static_cast<kddp::ElementType>(result_type);
    job.loss = pointer<void>(loss), job.terms = pointer<void>(terms), job.row_terms = pointer<void>(row_terms);

    const Backend backend{context};
    const py::object workspace = allocate(backend.workspace(job));
    job.workspace = pointer<void>(workspace.attr("data_ptr")().template cast<Address>());
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

using BlockArguments = std::tuple<Address, int64_t, int64_t, Address>;  // source, row stride, bytes of a column, target
// element type, pruned columns, their number, means, shift
using CompensationArguments = std::tuple<int, Address, int64_t, Address, Address>;

template <class Backend>
void gather_slices(const std::vector<BlockArguments>& block_arguments, int64_t columns, Address keep_rows,
                   int64_t kept_rows, Address keep_columns, int64_t kept_columns,
                   const CompensationArguments& compensation, const typename Backend::Context& context) {
    std::vector<kddp::Block> blocks;
    blocks.reserve(block_arguments.size());
    for (const auto& [source, row_stride, column_bytes, target] : block_arguments)
        blocks.push_back({pointer<const void>(source), row_stride, column_bytes, pointer<void>(target)});
    const auto& [type, pruned_columns, pruned_count, means, shift] = compensation;
    kddp::GatherSlices job{};
    job.blocks = blocks.data(), job.block_count = static_cast<int64_t>(blocks.size());
    job.columns = columns;
    job.keep_rows = pointer<const int64_t>(keep_rows), job.kept_rows = kept_rows;
    job.keep_columns = pointer<const int64_t>(keep_columns), job.kept_columns = kept_columns;
    job.compensation = {static_cast<kddp::ElementType>(type), pointer<const int64_t>(pruned_columns), pruned_count,
                        pointer<const double>(means), pointer<double>(shift)};
    const Backend backend{context};
    const py::gil_scoped_release unlocked;
    backend.run(job);
}

template <class Backend>
void gradient_products(Address activation, Address gradient, int type, Address mean, Address products, int64_t samples,
                       int64_t before, int64_t entries, int64_t after, const typename Backend::Context& context) {
    kddp::GradientProducts job{};
    job.activation = pointer<const void>(activation), job.gradient = pointer<const void>(gradient);
    job.type = static_cast<kddp::ElementType>(type);
    job.mean = pointer<const double>(mean), job.products = pointer<void>(products);
    job.samples = samples, job.before = before, job.entries = entries, job.after = after;
    const Backend backend{context};
    const py::gil_scoped_release unlocked;
    backend.run(job);
}

}  // namespace kddp_python

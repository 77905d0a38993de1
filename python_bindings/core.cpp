// The native operations for Python: addresses and sizes in, exceptions out, the interpreter's lock released
// meanwhile.
//
// Only kddp_ext/ops.py calls these. It owns every buffer and has checked every size and type.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "kddp/compaction.h"
#include "kddp/kd_l1_loss.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

using MatrixArguments = std::tuple<Address, int, int64_t>;  // data, element type, row stride

kddp::Matrix matrix(const MatrixArguments& arguments) {
    const auto& [data, type, row_stride] = arguments;
    return {pointer<const void>(data), static_cast<kddp::ElementType>(type), row_stride};
}

// activation, neurons, l1_weight, gradient, statistics
using LayerArguments = std::tuple<MatrixArguments, int64_t, double, Address, Address>;

std::vector<kddp::ActivationLayer> activation_layers(const std::vector<LayerArguments>& arguments) {
    std::vector<kddp::ActivationLayer> layers;
    for (const auto& [activation, neurons, l1_weight, gradient, statistics] : arguments)
        layers.push_back(
            {matrix(activation), neurons, l1_weight, pointer<void>(gradient), pointer<double>(statistics)});
    return layers;
}

// Calls `allocate(bytes)` for the workspace between sizing and running, so that Python owns that memory too.
void kd_l1_loss(int64_t rows, int64_t classes, const MatrixArguments& student, const MatrixArguments& teacher,
                Address labels, const std::vector<LayerArguments>& layer_arguments, int64_t statistics_stride,
                double temperature, double alpha, double label_smoothing, int64_t ignore_index, bool scaled_gradients,
                Address logits_gradient, int result_type, Address loss, Address terms, const py::function& allocate,
                int threads) {
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
                       scaled_gradients,
                       pointer<void>(logits_gradient),
                       static_cast<kddp::ElementType>(result_type),
                       pointer<void>(loss),
                       pointer<void>(terms),
                       nullptr,
                       threads};
    const py::object workspace = allocate(kddp::kd_l1_loss_workspace(job));
    job.workspace = pointer<void>(workspace.attr("data_ptr")().cast<Address>());
    kddp::Status status;
    {
        py::gil_scoped_release unlocked;
        status = kddp::kd_l1_loss(job);
    }
    if (status.code == kddp::Status::label_out_of_range)
        throw py::value_error("labels: expected values from 0 to " + std::to_string(classes - 1) +
                              " or ignore_index=" + std::to_string(ignore_index) + ", got " +
                              std::to_string(status.value) + " in row " + std::to_string(status.row));
}

// source, target, inner, element_size
using BlockArguments = std::tuple<Address, Address, int64_t, int64_t>;

void gather_slices(const std::vector<BlockArguments>& block_arguments, int64_t rows, int64_t columns, Address keep_rows,
                   int64_t kept_rows, Address keep_columns, int64_t kept_columns, int threads) {
    std::vector<kddp::Block> blocks;
    for (const auto& [source, target, inner, element_size] : block_arguments)
        blocks.push_back({pointer<const void>(source), pointer<void>(target), inner, element_size});
    py::gil_scoped_release unlocked;
    kddp::gather_slices({blocks.data(), static_cast<int64_t>(blocks.size()), rows, columns,
                         pointer<const int64_t>(keep_rows), kept_rows, pointer<const int64_t>(keep_columns),
                         kept_columns, threads});
}

void pruned_contribution(Address weight, bool is_double, int64_t columns, int64_t inner, Address keep_rows,
                         int64_t kept_rows, Address pruned_columns, int64_t pruned_count, Address pruned_means,
                         Address shift) {
    py::gil_scoped_release unlocked;
    kddp::pruned_contribution({pointer<const void>(weight), is_double, columns, inner,
                               pointer<const int64_t>(keep_rows), kept_rows, pointer<const int64_t>(pruned_columns),
                               pruned_count, pointer<const double>(pruned_means), pointer<double>(shift)});
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "The native CPU operations of kddp_ext; use kddp_ext.ops instead.";
    m.def("kd_l1_loss", &kd_l1_loss);
    m.def("gather_slices", &gather_slices);
    m.def("pruned_contribution", &pruned_contribution);
    m.def("instruction_set", [] { return std::string(kddp::kernels().name); });
    m.attr("compiler") = KDDP_COMPILER;
}

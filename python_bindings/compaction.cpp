// The compaction for kddp_ext/ops/compaction.py, which owns every buffer and has checked every size and type.
#include "kddp/compaction.h"

#include <tuple>
#include <vector>

#include "bindings.h"

namespace kddp_python {
namespace {

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

void bind_compaction(py::module_& m) {
    m.def("gather_slices", &gather_slices);
    m.def("pruned_contribution", &pruned_contribution);
}

}  // namespace kddp_python

// The compaction for kddp_ext/ops/gather_slices.py, which owns every buffer and has checked every size and type.
#pragma once

#include <tuple>
#include <vector>

#include "bindings.h"
#include "kddp/gather_slices.h"

namespace kddp_python {

// source, row stride in bytes, bytes of a column, target
using BlockArguments = std::tuple<Address, int64_t, int64_t, Address>;
// element type, pruned columns, their number, means, shift
using CompensationArguments = std::tuple<int, Address, int64_t, Address, Address>;

inline kddp::Compensation compensation(const CompensationArguments& arguments) {
    const auto& [type, pruned_columns, pruned_count, means, shift] = arguments;
    return {static_cast<kddp::ElementType>(type), pointer<const int64_t>(pruned_columns), pruned_count,
            pointer<const double>(means), pointer<double>(shift)};
}

template <class Backend>
void gather_slices(const std::vector<BlockArguments>& block_arguments, int64_t columns, Address keep_rows,
                   int64_t kept_rows, Address keep_columns, int64_t kept_columns,
                   const CompensationArguments& compensation_arguments, const py::function& allocate,
                   const typename Backend::Place& place) {
    std::vector<kddp::Block> blocks;
    blocks.reserve(block_arguments.size());
    for (const auto& [source, row_stride, column_bytes, target] : block_arguments)
        blocks.push_back({pointer<const void>(source), row_stride, column_bytes, pointer<void>(target)});
    kddp::GatherSlices job{blocks.data(), static_cast<int64_t>(blocks.size()),
                           columns,       pointer<const int64_t>(keep_rows),
                           kept_rows,     pointer<const int64_t>(keep_columns),
                           kept_columns,  compensation(compensation_arguments),
                           nullptr,       1};
    const Backend backend(place);
    const py::object workspace = take_workspace(backend, job, allocate);
    const py::gil_scoped_release unlocked;
    backend.run(job);
}

}  // namespace kddp_python

// What the bindings share: addresses are integers, and an absent tensor is 0.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

namespace kddp_python {

namespace py = pybind11;

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// Gives a job the workspace that it needs, by `allocate(bytes)`: Python owns that memory too, as long as what is
// returned.
template <class Backend, class Job>
py::object take_workspace(const Backend& backend, Job& job, const py::function& allocate) {
    py::object workspace = allocate(backend.workspace(job));
    job.workspace = pointer<void>(workspace.attr("data_ptr")().template cast<Address>());
    return workspace;
}

}  // namespace kddp_python

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

}  // namespace kddp_python

// The native operations for Python: addresses and sizes in, exceptions out, the interpreter's lock released
// meanwhile. Only kddp_ext/ops calls these.
#include <string>

#include "bindings.h"
#include "cpu/kernels.h"

PYBIND11_MODULE(_core, m) {
    m.doc() = "The native CPU operations of kddp_ext; use kddp_ext.ops instead.";
    kddp_python::bind_kd_l1_loss(m);
    kddp_python::bind_compaction(m);
    m.def("instruction_set", [] { return std::string(kddp::kernels().name); });
    m.attr("compiler") = KDDP_COMPILER;
}

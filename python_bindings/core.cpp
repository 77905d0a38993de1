// The CPU operations as the Python module _core.
#include "cpu/isa.h"
#include "operations.h"

namespace kddp_python {
namespace {

struct Cpu {
    using Context = int;
    const int threads;

    int64_t workspace(kddp::KdL1Loss& job) const {
        job.threads = threads;
        return kddp::kd_l1_loss_workspace(job);
    }
    static kddp::Status run(const kddp::KdL1Loss& job) { return kddp::kd_l1_loss(job); }
    void run(kddp::GatherSlices& job) const {
        job.threads = threads;
        kddp::gather_slices(job);
    }
    void run(kddp::GradientProducts& job) const {
        job.threads = threads;
        kddp::gradient_products(job);
    }
};

}  // namespace
}  // namespace kddp_python

PYBIND11_MODULE(_core, m) {
    using kddp_python::Cpu;
    m.doc() = "The native CPU operations of kddp_ext; use kddp_ext.ops instead.";
    m.def("kd_l1_loss", &kddp_python::kd_l1_loss<Cpu>);
    m.def("gather_slices", &kddp_python::gather_slices<Cpu>);
    m.def("gradient_products", &kddp_python::gradient_products<Cpu>);
    m.def("instruction_set", &kddp::instruction_set);
    m.attr("compiler") = KDDP_COMPILER;
}

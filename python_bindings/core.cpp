// The native operations for Python: addresses and sizes in, exceptions out, the interpreter's lock released
// meanwhile. Only kddp_ext/ops calls these.
#include <string>

#include "compaction_arguments.h"
#include "cpu/kernels.h"
#include "loss_arguments.h"

namespace kddp_python {
namespace {

class Cpu {
  public:
    using Place = int;  // threads
    explicit Cpu(int threads) : threads_(threads) {}

    int64_t workspace(kddp::KdL1Loss& job) const {
        job.threads = threads_;
        return kddp::kd_l1_loss_workspace(job);
    }
    int64_t workspace(kddp::GatherSlices& job) const {
        job.threads = threads_;
        return kddp::gather_slices_workspace(job);
    }
    static kddp::Status run(const kddp::KdL1Loss& job) { return kddp::kd_l1_loss(job); }
    static void run(const kddp::GatherSlices& job) { kddp::gather_slices(job); }

  private:
    int threads_;
};

}  // namespace
}  // namespace kddp_python

PYBIND11_MODULE(_core, m) {
    using kddp_python::Cpu;
    m.doc() = "The native CPU operations of kddp_ext; use kddp_ext.ops instead.";
    m.def("kd_l1_loss", &kddp_python::kd_l1_loss<Cpu>);
    m.def("gather_slices", &kddp_python::gather_slices<Cpu>);
    m.def("instruction_set", [] { return std::string(kddp::kernels().name); });
    m.attr("compiler") = KDDP_COMPILER;
}

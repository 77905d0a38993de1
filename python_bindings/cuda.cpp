// The operations of `_core` on a GPU. In the place of the threads a call says where it runs: the device, the stream,
// and the counters that belong to both. Only kddp_ext/ops calls these.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "compaction_arguments.h"
#include "cuda/backend.h"
#include "cuda/occupancy.h"
#include "loss_arguments.h"

#if !defined(KDDP_CUDA_MODULE)
#define KDDP_CUDA_MODULE _cuda
#endif

namespace kddp_python {
namespace {

void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // what is told here is not to be told again by the next launch
    throw std::runtime_error(std::string("kddp_ext: ") + what + " failed with " + cudaGetErrorName(error) + ": " +
                             cudaGetErrorString(error));
}

// device, stream, counters, and whatever keeps the counters alive during the call
using PlaceArguments = std::tuple<int, Address, Address, py::object>;

// Makes a device the current one as long as this lives.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        error_ = cudaGetDevice(&before_);
        if (error_ != cudaSuccess || before_ == device) return;
        error_ = cudaSetDevice(device);
        changed_ = error_ == cudaSuccess;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

    cudaError_t error() const { return error_; }

  private:
    cudaError_t error_;
    int before_ = 0;
    bool changed_ = false;
};

// One call on a device and stream.
class Cuda {
  public:
    using Place = PlaceArguments;

    explicit Cuda(const PlaceArguments& place)
        : guard_(std::get<0>(place)),
          place_{reinterpret_cast<cudaStream_t>(std::get<1>(place)), pointer<unsigned>(std::get<2>(place))} {
        check(guard_.error(), "choosing the device");
    }

    static int64_t workspace(const kddp::KdL1Loss& job) { return kddp::cuda_kd_l1_loss_workspace(job); }
    static int64_t workspace(const kddp::GatherSlices&) { return 0; }

    kddp::Status run(const kddp::KdL1Loss& job) const {
        kddp::cuda_kd_l1_loss(job, place_);
        check(cudaGetLastError(), "the launch of the loss");
        return {};
    }
    void run(const kddp::GatherSlices& job) const {
        kddp::cuda_gather_slices(job, place_);
        check(cudaGetLastError(), "the launch of the compaction");
    }
    void run(const std::vector<kddp::ScaledTensor>& tensors, Address scalar, kddp::ElementType scalar_type) const {
        kddp::cuda_scale(tensors.data(), static_cast<int64_t>(tensors.size()), pointer<const void>(scalar), scalar_type,
                         place_);
        check(cudaGetLastError(), "the launch of the backward");
    }

  private:
    DeviceGuard guard_;
    kddp::LaunchContext place_;
};

// source, target, elements, element type, factor
using ScaledArguments = std::tuple<Address, Address, int64_t, int, double>;

// target = source * factor * scalar for every tensor; the scalar stays where it is.
void scale(const std::vector<ScaledArguments>& arguments, Address scalar, int scalar_type,
           const PlaceArguments& place) {
    std::vector<kddp::ScaledTensor> tensors;
    tensors.reserve(arguments.size());
    for (const auto& [source, target, count, type, factor] : arguments)
        tensors.push_back(
            {pointer<const void>(source), pointer<void>(target), count, static_cast<kddp::ElementType>(type), factor});
    const Cuda backend(place);
    const py::gil_scoped_release unlocked;
    backend.run(tensors, scalar, static_cast<kddp::ElementType>(scalar_type));
}

// Name of the error that a launch on the device would end with, or nothing.
std::string device_error(int device) {
    const DeviceGuard guard(device);
    const cudaError_t error = guard.error() == cudaSuccess ? kddp::find_kernels() : guard.error();
    cudaGetLastError();  // what has been told is not to be told again
    return error == cudaSuccess ? "" : cudaGetErrorName(error);
}

int version(cudaError_t (*ask)(int*)) {
    int value = 0;
    return ask(&value) == cudaSuccess ? value : 0;
}

}  // namespace
}  // namespace kddp_python

PYBIND11_MODULE(KDDP_CUDA_MODULE, m) {
    using kddp_python::Cuda;
    m.doc() = "The native CUDA operations of kddp_ext; use kddp_ext.ops instead.";
    m.def("kd_l1_loss", &kddp_python::kd_l1_loss<Cuda>);
    m.def("gather_slices", &kddp_python::gather_slices<Cuda>);
    m.def("scale", &kddp_python::scale);
    m.def("device_error", &kddp_python::device_error);
    m.def("driver_version", [] { return kddp_python::version(cudaDriverGetVersion); });
    m.def("runtime_version", [] { return kddp_python::version(cudaRuntimeGetVersion); });
    m.attr("counters_bytes") = kddp::counters_bytes;
    m.attr("compiler") = KDDP_CUDA_COMPILER;
    m.attr("architectures") = KDDP_CUDA_ARCHITECTURES;
}

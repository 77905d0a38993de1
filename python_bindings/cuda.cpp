// The CUDA operations as the Python module _cuda. Each call runs on a device and stream.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/backend.h"
#include "operations.h"

#if !defined(KDDP_CUDA_MODULE)
#define KDDP_CUDA_MODULE _cuda
#endif

namespace kddp_python {
namespace {

void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // clears the error, so that the next launch does not report it again
    throw std::runtime_error(std::string("kddp_ext: ") + what + " failed with " + cudaGetErrorName(error) + ": " +
                             cudaGetErrorString(error));
}

// device, stream
using ContextArguments = std::tuple<int, Address>;

// Makes a device current during its lifetime.
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
    using Context = ContextArguments;

    explicit Cuda(const ContextArguments& context)
        : guard_(std::get<0>(context)), context_{reinterpret_cast<cudaStream_t>(std::get<1>(context))} {
        check(guard_.error(), "choosing the device");
    }

    static int64_t workspace(const kddp::KdL1Loss& job) { return kddp::cuda_kd_l1_loss_workspace(job); }

    kddp::Status run(const kddp::KdL1Loss& job) const {
        kddp::cuda_kd_l1_loss(job, context_);
        check(cudaGetLastError(), "the launch of the loss");
        return {};
    }
    void run(const kddp::GatherSlices& job) const {
        kddp::cuda_gather_slices(job, context_);
        check(cudaGetLastError(), "the launch of the gather");
    }
    void run(const kddp::GradientProducts& job) const {
        kddp::cuda_gradient_products(job, context_);
        check(cudaGetLastError(), "the launch of the gradient products");
    }
    void run(const std::vector<kddp::ScaledTensor>& tensors, Address scalar, kddp::ElementType scalar_type) const {
        kddp::cuda_scale(tensors.data(), static_cast<int64_t>(tensors.size()), pointer<const void>(scalar), scalar_type,
                         context_);
        check(cudaGetLastError(), "the launch of the backward");
    }

  private:
    DeviceGuard guard_;
    kddp::LaunchContext context_;
};

// source, target, elements, element type, factor
using ScaledArguments = std::tuple<Address, Address, int64_t, int, double>;

// target = source * factor * scalar for every tensor; the scalar stays on the device.
void scale(const std::vector<ScaledArguments>& arguments, Address scalar, int scalar_type,
           const ContextArguments& context) {
    std::vector<kddp::ScaledTensor> tensors;
    tensors.reserve(arguments.size());
    for (const auto& [source, target, count, type, factor] : arguments)
        tensors.push_back(
            {pointer<const void>(source), pointer<void>(target), count, static_cast<kddp::ElementType>(type), factor});
    const Cuda backend(context);
    const py::gil_scoped_release unlocked;
    backend.run(tensors, scalar, static_cast<kddp::ElementType>(scalar_type));
}

// The name of the error that a launch on the device would raise, or an empty string.
std::string device_error(int device) {
    const DeviceGuard guard(device);
    const cudaError_t error = guard.error() == cudaSuccess ? kddp::find_kernels() : guard.error();
    cudaGetLastError();  // clears the error
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
    m.def("gradient_products", &kddp_python::gradient_products<Cuda>);
    m.def("scale", &kddp_python::scale);
    m.def("device_error", &kddp_python::device_error);
    m.def("driver_version", [] { return kddp_python::version(cudaDriverGetVersion); });
    m.def("runtime_version", [] { return kddp_python::version(cudaRuntimeGetVersion); });
    m.attr("compiler") = KDDP_CUDA_COMPILER;
    m.attr("architectures") = KDDP_CUDA_ARCHITECTURES;
}

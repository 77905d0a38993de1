// Which instruction set serves this process: chosen once, at the first call.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace kddp {
namespace {

struct Candidate {
    const Kernels* kernels;
    bool supported;
};

const Kernels& choose() {
#if defined(KDDP_X86)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    const Candidate candidates[] = {
#if defined(KDDP_X86)
        {&avx512_bf16_kernels, avx512 && __builtin_cpu_supports("avx512bf16")},
        {&avx512_kernels, avx512},
        {&avx2_kernels,
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
        {&baseline_kernels, true},
    };
    const char* wanted = std::getenv("KDDP_CPU_ISA");
    std::string names;
    for (const Candidate& candidate : candidates) {
        if (!candidate.supported) continue;
        if (!wanted || !*wanted || std::string(wanted) == candidate.kernels->name) return *candidate.kernels;
        names += std::string(names.empty() ? "" : ", ") + candidate.kernels->name;
    }
    throw std::invalid_argument("KDDP_CPU_ISA: expected one of " + names + " on this processor, got '" + wanted + "'");
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

int64_t kd_l1_loss_workspace(const KdL1Loss& job) { return kernels().kd_l1_loss_workspace(job); }

Status kd_l1_loss(const KdL1Loss& job) { return kernels().kd_l1_loss(job); }

int64_t gather_slices_workspace(const GatherSlices& job) { return kernels().compaction->gather_slices_workspace(job); }

void gather_slices(const GatherSlices& job) { kernels().compaction->gather_slices(job); }

}  // namespace kddp

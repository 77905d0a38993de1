// Chooses the instruction set of this process, once, at the first call.
#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "row_math.h"

namespace kddp {
namespace {

struct Candidate {
    const Kernels* kernels;
    const products::Kernel* gradient_products;
    bool supported;
};

Candidate choose() {
#if defined(KDDP_X86)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    const Candidate candidates[] = {
#if defined(KDDP_X86)
        {&avx512_bf16_kernels, &products::avx512_kernels, avx512 && __builtin_cpu_supports("avx512bf16")},
        {&avx512_kernels, &products::avx512_kernels, avx512},
        {&avx2_kernels, &products::avx2_kernels,
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
        {&baseline_kernels, &products::baseline_kernels, true},
    };
    const char* wanted = std::getenv("KDDP_CPU_ISA");
    std::string names;
    for (const Candidate& candidate : candidates) {
        if (!candidate.supported) continue;
        if (!wanted || !*wanted || std::string(wanted) == candidate.kernels->name) return candidate;
        names += std::string(names.empty() ? "" : ", ") + candidate.kernels->name;
    }
    throw std::invalid_argument("KDDP_CPU_ISA: expected one of " + names + " on this processor, got '" + wanted + "'");
}

const Candidate& chosen() {
    static const Candidate candidate = choose();
    return candidate;
}

const Kernels& kernels() { return *chosen().kernels; }

const Kernels& kernels_for([[maybe_unused]] const KdL1Loss& job) {
#if defined(KDDP_X86)
    const bool bfloat16 = job.student.type == ElementType::bfloat16 && !computes_in_double(job);
    if (&kernels() == &avx512_bf16_kernels && !bfloat16) return avx512_kernels;
#endif
    return kernels();
}

}  // namespace

const char* instruction_set() { return kernels().name; }

int64_t kd_l1_loss_workspace(const KdL1Loss& job) { return kernels_for(job).kd_l1_loss_workspace(job); }

Status kd_l1_loss(const KdL1Loss& job) { return kernels_for(job).kd_l1_loss(job); }

void gradient_products(const GradientProducts& job) { (*chosen().gradient_products)(job); }

}  // namespace kddp

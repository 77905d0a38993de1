// What each instruction set provides; isa.cpp picks one when the library is first used.
#pragma once

#include "kddp/gather_slices.h"
#include "kddp/gradient_products.h"
#include "kddp/kd_l1_loss.h"

namespace kddp {

struct Kernels {
    const char* name;
    int64_t (*kd_l1_loss_workspace)(const KdL1Loss&);
    Status (*kd_l1_loss)(const KdL1Loss&);
};

extern const Kernels baseline_kernels;
#if defined(KDDP_X86)
extern const Kernels avx2_kernels, avx512_kernels;
extern const Kernels avx512_bf16_kernels;  // float32 arithmetic for bfloat16 students alone; avx512 serves the others
#endif

namespace products {

using Kernel = void (*)(const GradientProducts&);

extern const Kernel baseline_kernels;
#if defined(KDDP_X86)
extern const Kernel avx2_kernels, avx512_kernels;  // with avx512_bf16, too, because nothing is rounded to bfloat16
#endif

}  // namespace products

// The name of the widest instruction set that this processor has, or of the one that KDDP_CPU_ISA chooses.
const char* instruction_set();

}  // namespace kddp

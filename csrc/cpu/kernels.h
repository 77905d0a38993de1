// What each instruction set provides; dispatch.cpp picks one when the library is first used.
#pragma once

#include "kddp/kd_l1_loss.h"

namespace kddp {

struct Kernels {
    const char* name;
    int64_t (*kd_l1_loss_workspace)(const KdL1Loss&);
    Status (*kd_l1_loss)(const KdL1Loss&);
};

extern const Kernels baseline_kernels;
#if defined(KDDP_X86)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_bf16_kernels;
#endif

// The widest that this processor has, or the one that the environment variable KDDP_CPU_ISA names.
const Kernels& kernels();

}  // namespace kddp

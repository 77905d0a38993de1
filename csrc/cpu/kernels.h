// What each instruction set provides; dispatch.cpp picks one when the library is first used.
#pragma once

#include "kddp/gather_slices.h"
#include "kddp/kd_l1_loss.h"

namespace kddp {

struct CompactionKernels {
    int64_t (*gather_slices_workspace)(const GatherSlices&);
    void (*gather_slices)(const GatherSlices&);
};

struct Kernels {
    const char* name;
    int64_t (*kd_l1_loss_workspace)(const KdL1Loss&);
    Status (*kd_l1_loss)(const KdL1Loss&);
    const CompactionKernels* compaction;
};

extern const CompactionKernels baseline_compaction;
extern const Kernels baseline_kernels;
#if defined(KDDP_X86)
extern const CompactionKernels avx2_compaction, avx512_compaction, avx512_bf16_compaction;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_bf16_kernels;
#endif

// The widest that this processor has, or the one that the environment variable KDDP_CPU_ISA names.
const Kernels& kernels();

}  // namespace kddp

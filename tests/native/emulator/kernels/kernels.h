// What the kernels of the emulator's tests include: the functions of csrc/cuda for access to memory.
#pragma once

#include "cuda/memory.cuh"

using kddp::load_global;
using kddp::load_input;
using kddp::load_workspace;
using kddp::store_global;

inline int own_index() { return int(blockIdx.x * blockDim.x + threadIdx.x); }

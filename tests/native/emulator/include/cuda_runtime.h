// Stands in for the CUDA runtime's header of the same name.
#pragma once

#include "emulated/host_functions.h"
#include "emulated/math_functions.h"
#include "emulated/memory_functions.h"
#include "emulated/types.h"
#include "emulated/warp_functions.h"

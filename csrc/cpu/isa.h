// The instruction sets that this build has and this processor runs, and their kernels.
#pragma once

#include "kernel.h"

namespace grasp {

// The kernel of an instruction set for M rows of x, or that of a smaller set if it has none. AUTO takes the best.
// The kernels of a call have the same layout of tiles, whatever their bits.
const Kernel *find_kernel(int32_t isa, grasp_dtype dtype, int bits, int64_t M);

}  // namespace grasp

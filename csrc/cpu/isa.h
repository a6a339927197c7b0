// Which instruction sets this build has and this processor runs, and the kernels they offer.
#pragma once

#include "kernel.h"

namespace grasp {

// Whether an instruction set can be used; asked of the processor once.
bool supports(int32_t isa);

// The kernel of an instruction set for M rows of x, by a lesser one where it has none of its own. AUTO takes the best.
const Kernel *find_kernel(int32_t isa, grasp_dtype dtype, int64_t M);

}  // namespace grasp

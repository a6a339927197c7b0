#include "choose.h"

const grasp::Kernel *grasp::portable_kernel(grasp_dtype dtype, int64_t M) { return choose_kernel(dtype, M); }

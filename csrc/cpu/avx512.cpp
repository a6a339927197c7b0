#include "choose.h"

const grasp::Kernel *grasp::avx512_kernel(grasp_dtype dtype, int64_t M) { return choose_kernel(dtype, M); }

#include "choose.h"

const grasp::Kernel *grasp::avx512_kernel(grasp_dtype dtype, int bits, int64_t M) {
    return choose_kernel(dtype, bits, M);
}

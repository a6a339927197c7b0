#include "cuda/variants.cuh"

const grasp_cuda::Variant grasp_cuda::quantized_f16[6] = {
    quantized<F16, 8, 8, true>(), quantized<F16, 8, 16, true>(), quantized<F16, 8, 16, false>(),
    quantized<F16, 4, 8, true>(), quantized<F16, 4, 16, true>(), quantized<F16, 4, 16, false>(),
};

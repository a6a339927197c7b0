#include "cuda/variants.cuh"

const grasp_cuda::Variant grasp_cuda::quantized_bf16[6] = {
    quantized<BF16, 8, 8, true>(), quantized<BF16, 8, 16, true>(), quantized<BF16, 8, 16, false>(),
    quantized<BF16, 4, 8, true>(), quantized<BF16, 4, 16, true>(), quantized<BF16, 4, 16, false>(),
};

#include "cuda/variants.cuh"

const grasp_cuda::Variant grasp_cuda::variants_bf16[3] = {
    variant<BF16, 8, true>(),
    variant<BF16, 16, true>(),
    variant<BF16, 16, false>(),
};

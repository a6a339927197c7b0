#include "cuda/variants.cuh"

const grasp_cuda::Variant grasp_cuda::variants_bf16[6] = {
    variant<BF16, 8, true, false>(), variant<BF16, 16, true, false>(), variant<BF16, 16, false, false>(),
    variant<BF16, 8, true, true>(),  variant<BF16, 16, true, true>(),  variant<BF16, 16, false, true>(),
};

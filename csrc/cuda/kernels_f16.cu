#include "cuda/variants.cuh"

const grasp_cuda::Variant grasp_cuda::variants_f16[3] = {
    variant<F16, 8, true>(),
    variant<F16, 16, true>(),
    variant<F16, 16, false>(),
};

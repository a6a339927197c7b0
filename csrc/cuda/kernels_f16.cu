#include "cuda/variants.cuh"

const grasp_cuda::Variant grasp_cuda::variants_f16[6] = {
    variant<F16, 8, true, false>(), variant<F16, 16, true, false>(), variant<F16, 16, false, false>(),
    variant<F16, 8, true, true>(),  variant<F16, 16, true, true>(),  variant<F16, 16, false, true>(),
};

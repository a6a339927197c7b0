#include "cuda/variants.cuh"

const grasp_cuda::Variant grasp_cuda::variants_f32[4] = {
    variant<float, 1, true>(),
    variant<float, 4, true>(),
    variant<float, 16, true>(),
    variant<float, 16, false>(),
};

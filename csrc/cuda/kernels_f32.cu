#include "cuda/variants.cuh"

const grasp_cuda::Variant grasp_cuda::variants_f32[8] = {
    variant<float, 1, true, false>(),   variant<float, 4, true, false>(),  variant<float, 16, true, false>(),
    variant<float, 16, false, false>(), variant<float, 1, true, true>(),   variant<float, 4, true, true>(),
    variant<float, 16, true, true>(),   variant<float, 16, false, true>(),
};

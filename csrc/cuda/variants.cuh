// The kernels by number of rows: one table per dtype, each compiled in its own file.
#pragma once

#include "cuda/kernels.cuh"

namespace grasp_cuda {

struct Variant {
    int32_t rows, splits;  // the most it can run
    bool vector;           // whether it needs alignment: see Product
    bool pivoted;          // whether members may have an order
    const void *shrink, *expand, *cooperative;
};

// The last of each form can run every call of it; the others are in increasing order of rows.
extern const Variant variants_f32[8], variants_f16[6], variants_bf16[6];

template <class T, int ROWS, bool VECTOR, bool PIVOTED>
Variant variant() {
    return {ROWS,
            MAX_SPLITS<ROWS>,
            VECTOR,
            PIVOTED,
            reinterpret_cast<const void *>(&lowrank_shrink_kernel<T, ROWS, VECTOR>),
            reinterpret_cast<const void *>(&lowrank_expand_kernel<T, ROWS, VECTOR, PIVOTED>),
            reinterpret_cast<const void *>(&lowrank_cooperative_kernel<T, ROWS, VECTOR, PIVOTED>)};
}

}  // namespace grasp_cuda

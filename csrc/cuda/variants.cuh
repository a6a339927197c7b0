// The kernels by number of rows: one table per dtype, each compiled in its own file.
#pragma once

#include "cuda/kernels.cuh"

namespace grasp_cuda {

struct Variant {
    int32_t rows, splits;  // the most it can run
    bool vector;           // whether it needs alignment: see Product
    const void *shrink, *expand, *cooperative;
};

// The last kernel can run every call; the others are in increasing order of rows.
extern const Variant variants_f32[4], variants_f16[3], variants_bf16[3];

template <class T, int ROWS, bool VECTOR>
Variant variant() {
    return {ROWS,
            MAX_SPLITS<ROWS>,
            VECTOR,
            reinterpret_cast<const void *>(&lowrank_shrink_kernel<T, ROWS, VECTOR>),
            reinterpret_cast<const void *>(&lowrank_expand_kernel<T, ROWS, VECTOR>),
            reinterpret_cast<const void *>(&lowrank_cooperative_kernel<T, ROWS, VECTOR>)};
}

}  // namespace grasp_cuda

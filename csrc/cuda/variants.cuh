// Which kernels there are, each for so many rows: a table per dtype, each compiled in a file of its own.
#pragma once

#include "cuda/kernels.cuh"

namespace grasp_cuda {

struct Variant {
    int32_t rows, splits;  // the most it serves
    bool vector;           // what it asks of alignment: see Product
    const void *shrink, *expand, *cooperative;
};

// The last serves every call; of the others, those with fewer rows come first.
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

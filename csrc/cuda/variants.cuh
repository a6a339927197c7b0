// The kernels by number of rows: tables for each dtype, each compiled in its own file.
#pragma once

#include "cuda/kernels.cuh"

namespace grasp_cuda {

struct Variant {
    int32_t bits;                               // of the weight that a kernel reads; 0 if it has the dtype of x
    int32_t rows, splits;                       // the most it can run
    int32_t granule;                            // splits of K are multiples of it
    bool vector;                                // whether it needs alignment: see Product
    bool pivoted;                               // whether members may have an order
    const void *shrink, *expand, *cooperative;  // cooperative is null for quantised weights
};

// The last of each form can run every call of it; the others are in increasing order of rows. The kernels of quantised
// weights are those of pivoted members, which run others too.
extern const Variant variants_f32[8], variants_f16[6], variants_bf16[6];
extern const Variant quantized_f16[6], quantized_bf16[6];

template <class T, int BITS, int ROWS, bool VECTOR, bool PIVOTED>
Variant make_variant(const void *cooperative) {
    return {BITS,
            ROWS,
            MAX_SPLITS<ROWS>,
            SPLIT_GRANULE<T, BITS>,
            VECTOR,
            PIVOTED,
            reinterpret_cast<const void *>(&lowrank_shrink_kernel<T, BITS, ROWS, VECTOR>),
            reinterpret_cast<const void *>(&lowrank_expand_kernel<T, BITS, ROWS, VECTOR, PIVOTED>),
            cooperative};
}

template <class T, int ROWS, bool VECTOR, bool PIVOTED>
Variant variant() {
    return make_variant<T, 0, ROWS, VECTOR, PIVOTED>(
        reinterpret_cast<const void *>(&lowrank_cooperative_kernel<T, ROWS, VECTOR, PIVOTED>));
}

template <class T, int BITS, int ROWS, bool VECTOR>
Variant quantized() {
    return make_variant<T, BITS, ROWS, VECTOR, true>(nullptr);
}

}  // namespace grasp_cuda

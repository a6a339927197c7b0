// The kernels that every instruction set has, chosen by the number of rows of x.
#pragma once

#include "dot.h"
#include "panel.h"

namespace grasp {
namespace {

// If a panel is half empty, one dot product per row of x is faster.
constexpr int64_t DOT_ROWS = W == 16 ? 8 : 4;

template <class DotKernel, class PanelKernel>
const Kernel *dot_or_panel(int64_t M) {
    return M <= DOT_ROWS ? &DotKernel::kernel : &PanelKernel::kernel;
}

// T is the dtype of x, Policy that of a weight of the same dtype.
template <class T, class Policy>
const Kernel *choose(int bits, int64_t M) {
    switch (bits) {
        case 8: return dot_or_panel<Dot<T, Unpacked<8>>, Panel<Single<T>, 8>>(M);
        case 4: return dot_or_panel<Dot<T, Unpacked<4>>, Panel<Single<T>, 4>>(M);
        default: return dot_or_panel<Dot<T, Policy>, Panel<Single<T>>>(M);
    }
}

inline const Kernel *choose_kernel(grasp_dtype dtype, int bits, int64_t M) {
    switch (dtype) {
        case GRASP_F32: return choose<float, Widen<float>>(bits, M);
        case GRASP_F16: return choose<F16, Widen<F16>>(bits, M);
        case GRASP_BF16: return choose<BF16, SplitPairs>(bits, M);
    }
    return nullptr;
}

}  // namespace
}  // namespace grasp

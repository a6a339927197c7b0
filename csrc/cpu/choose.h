// The kernels that every instruction set has, chosen by the number of rows of x.
#pragma once

#include "dot.h"
#include "panel.h"

namespace grasp {
namespace {

// If a panel is half empty, one dot product per row of x is faster.
constexpr int64_t DOT_ROWS = W == 16 ? 8 : 4;

template <class DotPolicy, class PanelPolicy>
const Kernel *dot_or_panel(int64_t M) {
    return M <= DOT_ROWS ? &Dot<DotPolicy>::kernel : &Panel<PanelPolicy>::kernel;
}

inline const Kernel *choose_kernel(grasp_dtype dtype, int64_t M) {
    switch (dtype) {
        case GRASP_F32: return dot_or_panel<Widen<float>, Single<float>>(M);
        case GRASP_F16: return dot_or_panel<Widen<F16>, Single<F16>>(M);
        case GRASP_BF16: return dot_or_panel<SplitPairs, Single<BF16>>(M);
    }
    return nullptr;
}

}  // namespace
}  // namespace grasp

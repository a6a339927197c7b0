// bfloat16 in pairs, for AVX512-BF16 and AMX: they add the two products of a lane to the float of the lane.
#pragma once

#include "panel.h"

namespace grasp {
namespace {

struct Pairs {
    using Element = BF16;
    using Unit = uint32_t;
    using Value = BF16;
    static constexpr int PER_UNIT = 2, PADDING = 16;

    // n elements, two per lane. The lanes after the last are zero, and its upper half is zero if n is odd.
    static VF load(const BF16 *p, int64_t n) { return n < 2 * W ? read_part<VF>(p, n * 2) : read<VF>(p); }

    static VF multiply(VF acc, uint32_t w, VF x) {
        return (VF)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(w), (__m512bh)x);
    }

    // Element `index` of the rows of a panel: one half of each lane.
    static void put(float *panel, int64_t index, VF value) {
        BF16 half[W];
        store(half, value);
        const VU bits = widen(read<VH>(half));
        const __mmask32 halves = index % 2 ? 0xaaaaaaaa : 0x55555555;
        _mm512_mask_storeu_epi16(panel + index / 2 * W, halves, (__m512i)(index % 2 ? bits << 16 : bits));
    }
};

}  // namespace
}  // namespace grasp

#include "choose.h"
#include "pairs.h"

namespace grasp {
namespace {

// bfloat16 with VDPBF16PS, in the layout that it has in memory.
struct NativePairs {
    using Element = BF16;
    using Packed = BF16;
    using Loaded = VF;
    static constexpr int STEP = 2 * W, PACKED = STEP, PER_ELEMENT = 1;
    static constexpr bool SEALS = false;
    static Loaded load(const BF16 *w) { return read<VF>(w); }
    static Loaded load_part(const BF16 *w, int64_t n) { return read_part<VF>(w, n * sizeof(BF16)); }
    static VF multiply(VF acc, Loaded w, const BF16 *x) {
        return (VF)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)read<VF>(x));
    }
    static void pack(const BF16 *x, BF16 *packed) { std::memcpy(packed, x, STEP * sizeof(BF16)); }
    static void put(BF16 *packed, int64_t index, float value) {
        BF16 rounded[W];
        store(rounded, broadcast(value));
        packed[index] = rounded[0];
    }
};

}  // namespace

const Kernel *avx512_bf16_kernel(grasp_dtype dtype, int bits, int64_t M) {
    if (dtype != GRASP_BF16) return nullptr;
    switch (bits) {
        case 8: return dot_or_panel<Dot<BF16, Unpacked<8>>, Panel<Pairs, 8>>(M);
        case 4: return dot_or_panel<Dot<BF16, Unpacked<4>>, Panel<Pairs, 4>>(M);
        default: return dot_or_panel<Dot<BF16, NativePairs>, Panel<Pairs>>(M);
    }
}

}  // namespace grasp

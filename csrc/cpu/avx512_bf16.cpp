#include "choose.h"
#include "integers.h"
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

// A weight of 8 bits as bfloat16: values are exact, their products with the scale of a group are rounded.
struct Converted : NativePairs {
    using Element = uint8_t;
    struct Loaded {
        const uint8_t *from;
        int64_t columns;
        VF pairs;
    };
    static Loaded load_part(const uint8_t *w, int64_t n, VF scale = broadcast(1)) {
        return {w, n, (VF)Scaled<8, BF16>(scale).pairs(w, n)};
    }
    static Loaded load(const uint8_t *w) { return load_part(w, STEP); }
    static void scale(Loaded &loaded, VF scales) { loaded = load_part(loaded.from, loaded.columns, scales); }
    static VF multiply(VF acc, const Loaded &w, const BF16 *x) { return NativePairs::multiply(acc, w.pairs, x); }
};

constexpr int64_t CONVERTED_FROM = 4;  // rows of x, from which one conversion of the weight is faster than integers

// Few rows of x and a quantised weight.
template <class T, int DIGITS>
const Kernel *integers(int bits) {
    return bits == 8 ? &Dot<T, Integers<8, DIGITS>>::kernel : &Dot<T, Integers<4, DIGITS>>::kernel;
}

}  // namespace

const Kernel *avx512_bf16_kernel(grasp_dtype dtype, int bits, int64_t M) {
    if (bits && M <= DOT_ROWS) {
        if (dtype == GRASP_BF16 && bits == 8 && M >= CONVERTED_FROM) return &Dot<BF16, Converted>::kernel;
        switch (dtype) {
            case GRASP_F32: return integers<float, 3>(bits);
            case GRASP_F16: return integers<F16, 2>(bits);
            case GRASP_BF16: return integers<BF16, 2>(bits);
        }
    }
    if (dtype != GRASP_BF16) return nullptr;
    switch (bits) {
        case 8: return &Panel<Pairs, 8>::kernel;
        case 4: return &Panel<Pairs, 4>::kernel;
        default: return dot_or_panel<Dot<BF16, NativePairs>, Panel<Pairs>>(M);
    }
}

}  // namespace grasp

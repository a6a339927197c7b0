// For Dot, with the instruction VPDPBUSD: a quantised weight times x in fixed point, in 32-bit integers.
//
// Each step of packed x has its own scale, a power of two, and digits of 8 bits: two, or three for float32. So x is
// rounded to 15 (22) bits below the largest of its step; the products and their sums in a step are exact.
#pragma once

#include "quantized.h"

namespace grasp {
namespace {

template <int BITS, int DIGITS>
struct Integers {
    using Element = uint8_t;
    using Packed = float;
    // 64 bytes of the weight are VECTORS vectors: of all columns, or of the even and of the odd ones. A packed step is
    // [DIGITS][VECTORS] vectors of int8, a vector of what OFFSET adds to the sums, and a vector of the scale. Before
    // `seal`, it is its floats.
    static constexpr int PER_ELEMENT = 8 / BITS, VECTORS = PER_ELEMENT, STEP = 64 * VECTORS;
    static constexpr int USED = (DIGITS * VECTORS + 2) * W, PACKED = USED > STEP ? USED : STEP;
    static constexpr bool SEALS = true;
    static constexpr int32_t OFFSET = 1 << (BITS - 1);  // makes values unsigned

    struct Loaded {
        VU v[VECTORS];
        VF scale = broadcast(1);
    };

    static Loaded split(VU words) {
        Loaded loaded;
        if constexpr (BITS == 8) {
            loaded.v[0] = words ^ 0x80808080;
        } else {
            loaded.v[0] = words & 0x0f0f0f0f;
            loaded.v[1] = words >> 4 & 0x0f0f0f0f;
        }
        return loaded;
    }
    static Loaded load(const uint8_t *w) { return split(read<VU>(w)); }
    static Loaded load_part(const uint8_t *w, int64_t n) { return split(read_part<VU, 1>(w, n)); }
    static void scale(Loaded &loaded, VF scales) { loaded.scale = scales; }

    static VU sum(VU start, const VU *w, const float *digits) {
        VU high = {};
#pragma GCC unroll 3
        for (int d = DIGITS - 1; d >= 0; --d) {
            VU low = d ? VU{} : start;
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) {
                low =
                    (VU)_mm512_dpbusd_epi32((__m512i)low, (__m512i)w[v], read<__m512i>(digits + (d * VECTORS + v) * W));
            }
            high = (high << 8) + low;
        }
        return high;
    }

    static VF multiply(VF acc, const Loaded &w, const float *x) {
        const float *rest = x + DIGITS * VECTORS * W;
        const VI total = (VI)sum(read<VU>(rest), w.v, x);
        return multiply_add(__builtin_convertvector(total, VF), w.scale * grasp::load(rest + W), acc);
    }

    template <class T>
    static void pack(const T *x, float *packed) {
        for (int i = 0; i < STEP; i += W) store(packed + i, grasp::load(x + i));
        seal(packed);
    }
    static void put(float *packed, int64_t index, float value) { packed[index / STEP * PACKED + index % STEP] = value; }

    static void seal(float *packed) {
        VF x[STEP / W];
        VU largest = {};  // bits of positive floats are ordered as the floats; NaN is above all
        for (int i = 0; i < STEP / W; ++i) {
            x[i] = grasp::load(packed + i * W);
            largest = (VU)_mm512_max_epu32((__m512i)largest, (__m512i)(float_to_bits(x[i]) & 0x7fffffff));
        }
        const uint32_t bits = _mm512_reduce_max_epu32((__m512i)largest);
        // 2^(exponent - 127) is above the largest by at least half a percent, so that digits do not overflow.
        constexpr int DEPTH = DIGITS == 2 ? 15 : 22, LOWEST = 23;
        int exponent = ((bits + 0x18000) >> 23) + 1;
        const bool finite = bits < 0x7f800000;
        exponent = exponent < LOWEST ? LOWEST : finite ? exponent : LOWEST;
        const VF factor = bits_to_float(VU{} + ((127 + DEPTH + 127 - exponent) << 23));
        const VF scale = bits_to_float(VU{} + (finite ? (exponent - DEPTH) << 23 : 0x7fc00000));
        int8_t *digits = reinterpret_cast<int8_t *>(packed);
        for (int i = 0; i < STEP / W; i += VECTORS) {
            VI rest[VECTORS];
            for (int v = 0; v < VECTORS; ++v) {
                VF column = x[i + v];
                if constexpr (VECTORS == 2) {
                    constexpr auto even = [](int l) constexpr { return 2 * l; };
                    constexpr auto odd = [](int l) constexpr { return 2 * l + 1; };
                    const auto lanes = std::make_integer_sequence<int, W>();
                    column = v ? shuffle(x[i], x[i + 1], odd, lanes) : shuffle(x[i], x[i + 1], even, lanes);
                }
                rest[v] = (VI)_mm512_cvtps_epi32((__m512)(column * factor));
                for (int d = 0; d < DIGITS; ++d) {
                    const VI digit = rest[v] << 24 >> 24;
                    write(digits + (d * VECTORS + v) * 64 + i / VECTORS * W, _mm512_cvtepi32_epi8((__m512i)digit));
                    rest[v] = (rest[v] - digit) >> 8;
                }
            }
        }
        VU offsets[VECTORS];
        for (VU &offset : offsets) offset = VU{} + OFFSET * 0x01010101u;
        float *after = packed + DIGITS * VECTORS * W;
        write(after, -sum(VU{}, offsets, packed));
        store(after + W, scale);
    }
};

}  // namespace
}  // namespace grasp

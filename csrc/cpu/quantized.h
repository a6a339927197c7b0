// Quantised weights: values of 8 or 4 bits become floats. The layout is in lowrank.h.
#pragma once

#include "kernel.h"
#include "vector.h"

namespace grasp {
namespace {

typedef int32_t VI __attribute__((vector_size(4 * W)));

// values[lane[i]]; the lanes are below W.
inline VF permute(VF values, VI lane) {
#if defined(__AVX512F__)
    return (VF)_mm512_permutexvar_ps((__m512i)lane, (__m512)values);
#elif defined(__AVX2__)
    return (VF)_mm256_permutevar8x32_ps((__m256)values, (__m256i)lane);
#else
    VF result;
    for (int i = 0; i < W; ++i) result[i] = values[lane[i]];
    return result;
#endif
}

// The scales of a weight's groups.
class Scales {
  public:
    Scales() = default;
    Scales(const Weight &weight, int64_t first_row)
        : data_(static_cast<const char *>(weight.scales)),
          dtype_(weight.scales_dtype),
          shift_(weight.group ? __builtin_ctzll(weight.group) : 0),
          groups_(weight.groups),
          first_(first_row * weight.groups) {}

    // The scale of column k of a row.
    float at(int64_t row, int64_t k) const {
        VF scale[1];
        load(row, 0, k, 1, scale);
        return scale[0][0];
    }

    // Columns of W groups.
    int64_t span() const { return W << shift_; }

    // The scales of these groups from column k on, of ROWS rows `pitch` apart. Those after the last group are zero.
    template <int ROWS>
    void load(int64_t row, int64_t pitch, int64_t k, VF (&scales)[ROWS]) const {
        const int64_t left = groups_ - (k >> shift_);
        load(row, pitch, k, left < W ? left : W, scales);
    }

    // The groups of lanes that hold COLUMNS / W columns each, from column k of a span on.
    template <int64_t COLUMNS>
    VI groups(int64_t k) const {
        VI column;
        for (int i = 0; i < W; ++i) column[i] = i * (COLUMNS / W);
        return (column + static_cast<int>(k)) >> static_cast<int>(shift_);
    }

  private:
    template <int ROWS>
    void load(int64_t row, int64_t pitch, int64_t k, int64_t n, VF (&scales)[ROWS]) const {
        const int64_t first = first_ + row * groups_ + (k >> shift_), stride = pitch * groups_;
        switch (dtype_) {
            case GRASP_F32: return load(reinterpret_cast<const float *>(data_) + first, stride, n, scales);
            case GRASP_F16: return load(reinterpret_cast<const F16 *>(data_) + first, stride, n, scales);
            default: return load(reinterpret_cast<const BF16 *>(data_) + first, stride, n, scales);
        }
    }

    template <class T, int ROWS>
    static void load(const T *first, int64_t stride, int64_t n, VF (&scales)[ROWS]) {
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const T *row = first + r * stride;
            scales[r] = n < W ? load_part(row, n) : grasp::load(row);
        }
    }

    const char *data_ = nullptr;
    grasp_dtype dtype_ = GRASP_F32;
    int64_t shift_ = 0, groups_ = 0, first_ = 0;
};

// W values from memory, in their order; n < W of them, and others without meaning.
template <int BITS>
struct Values {
    typedef uint8_t VB __attribute__((vector_size(W)));
    typedef int8_t VS __attribute__((vector_size(W)));
    typedef uint8_t Half __attribute__((vector_size(W / 2)));
    typedef uint16_t Pairs __attribute__((vector_size(W)));

    static VF load(const uint8_t *p) {
        if constexpr (BITS == 8) return convert(read<VB>(p));
        return split(read<Half>(p));
    }
    static VF load_part(const uint8_t *p, int64_t n) {
        if constexpr (BITS == 8) return convert(read_part<VB, 1>(p, n));
        return n == W - 1 ? load(p) : split(read_part<Half, 1>(p, (n + 1) / 2));
    }

  private:
    static VF convert(VB bytes) { return __builtin_convertvector(__builtin_convertvector((VS)bytes, VI), VF); }
    static VF split(Half bytes) {
        const Pairs pairs = __builtin_convertvector(bytes, Pairs);
        return convert((VB)((pairs | pairs << 4) & 0x0f0f)) - 8.0f;
    }
};

// Columns of one group, COLUMNS at a time, times the scale of the group.
template <int BITS, class T>
struct Scaled {
    static constexpr int64_t COLUMNS = W;
    VF factor;

    explicit Scaled(VF scale) : factor(scale) {}

    // n columns are left in the row; after the last one, values without meaning are written.
    void unpack(const uint8_t *p, int64_t n, T *to) const {
        store(to, factor * (n < W ? Values<BITS>::load_part(p, n) : Values<BITS>::load(p)));
    }
};

#if defined(__AVX512BF16__)
// The 16 products of a value and the scale are looked up.
template <>
struct Scaled<4, BF16> {
    static constexpr int64_t COLUMNS = 2 * W;
    __m512i products;  // twice, so that the fifth bit of an index does not matter; all higher bits are ignored

    explicit Scaled(VF scale) {
        VF values;
        for (int i = 0; i < W; ++i) values[i] = i - 8;
        products = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh((__m512)(values * scale)));
    }

    void unpack(const uint8_t *p, int64_t n, BF16 *to) const {
        const __mmask16 bytes = n < COLUMNS ? (1u << (n + 1) / 2) - 1 : 0xffff;
        const VU pairs = (VU)_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(bytes, p));
        write(to, _mm512_permutexvar_epi16((__m512i)(pairs | pairs << 12), products));
    }
};

template <>
struct Scaled<8, BF16> {
    static constexpr int64_t COLUMNS = 2 * W;
    VF factor;

    explicit Scaled(VF scale) : factor(scale) {}

    __m512i pairs(const uint8_t *p, int64_t n) const {
        const __mmask32 bytes = n < COLUMNS ? (1u << n) - 1 : 0xffffffff;
        const __m256i values = _mm256_maskz_loadu_epi8(bytes, p);
        const auto half = [this](__m128i bytes) {
            return (__m512)(factor * (VF)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
        };
        return (__m512i)_mm512_cvtne2ps_pbh(half(_mm256_extracti128_si256(values, 1)),
                                            half(_mm256_castsi256_si128(values)));
    }
    void unpack(const uint8_t *p, int64_t n, BF16 *to) const { write(to, pairs(p, n)); }
};
#endif

// Columns [begin : begin + count] of a row times the scales of its groups, and zeros behind its end. begin is a
// multiple of 64; count is too, or is the rest of the row rounded up, and `to` has room for 2 W columns more.
template <int BITS, class T>
void unpack(const Weight &weight, int64_t row, int64_t begin, int64_t count, T *to) {
    const uint8_t *at = static_cast<const uint8_t *>(weight.data) + row * weight.stride + begin * BITS / 8;
    const Scales scales(weight, row);
    const int64_t left = weight.depth - begin, used = count < left ? count : left;
    int64_t i = 0;
    while (i < used) {
        const int64_t k = begin + i, in_group = weight.group ? weight.group - k % weight.group : used;
        const int64_t end = used - i < in_group ? used : i + in_group;
        const Scaled<BITS, T> columns(broadcast(weight.group ? scales.at(0, k) : 1.0f));
        for (; i < end; i += columns.COLUMNS) columns.unpack(at + i * BITS / 8, left - i, to + i);
    }
    if (i < count) std::memset(to + i, 0, (count - i) * sizeof(T));
}

// For Dot: each 32 bits of the weight are one lane of several vectors. A packed step has the elements for the first of
// these vectors first. A value stays in its place in its half of the 32 bits, which multiplies it by a power of two;
// packed x is divided by that.
template <int BITS>
struct Unpacked {
    using Element = uint8_t;
    using Packed = float;
    static constexpr int VECTORS = 32 / BITS, STEP = VECTORS * W, PACKED = STEP, PER_ELEMENT = 8 / BITS;
    static constexpr bool SEALS = false;
    static constexpr uint32_t MASK = (1u << BITS) - 1, OFFSET = 1u << (BITS - 1);
    struct Loaded {
        VU words;
        VF scale = broadcast(1);
    };

    static constexpr int place(int i) { return BITS * i % 16; }

    static Loaded load(const uint8_t *w) { return {read<VU>(w)}; }
    static Loaded load_part(const uint8_t *w, int64_t n) { return {read_part<VU, 1>(w, n)}; }
    static void scale(Loaded &loaded, VF scales) { loaded.scale = scales; }

    static VF multiply(VF acc, const Loaded &w, const float *x) {
        const VU words = BITS == 8 ? w.words ^ 0x80808080 : w.words;  // values + OFFSET
        VF sum = {};
#pragma GCC unroll 8
        for (int i = 0; i < VECTORS; ++i) {
            const VU half = 2 * i < VECTORS ? words : words >> 16;
            const VI value = (VI)((half & MASK << place(i)) - (OFFSET << place(i)));
            sum = multiply_add(__builtin_convertvector(value, VF), grasp::load(x + i * W), sum);
        }
        return multiply_add(sum, w.scale, acc);
    }

    template <class T>
    static void pack(const T *x, float *packed) {
        alignas(64) float values[STEP];
        for (int i = 0; i < STEP; i += W) store(values + i, grasp::load(x + i));
        for (int i = 0; i < STEP; ++i) put(packed, i, values[i]);
    }
    static void put(float *packed, int64_t index, float value) {
        const int64_t i = index % VECTORS;
        packed[index / STEP * STEP + i * W + index % STEP / VECTORS] = value / static_cast<float>(1 << place(i));
    }
};

}  // namespace
}  // namespace grasp

// Vectors of W floats in the vector extensions of GCC and Clang. Each file of csrc/cpu compiles them for its
// instruction set. Everything is in an unnamed namespace, so that two such files never share a function.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace grasp {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float VF __attribute__((vector_size(4 * W)));
typedef uint32_t VU __attribute__((vector_size(4 * W)));
typedef uint16_t VH __attribute__((vector_size(2 * W)));

// Elements in memory.
struct F16 {
    uint16_t bits;
};
struct BF16 {
    uint16_t bits;
};

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

inline VF bits_to_float(VU bits) {
    VF value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline VU float_to_bits(VF value) {
    VU bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline VU select(VU mask, VU yes, VU no) { return (yes & mask) | (no & ~mask); }

inline VF broadcast(float value) { return value - VF{}; }  // a sum would lose the sign of zero

template <class Vector>
inline Vector read(const void *p) {
    Vector value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

template <class Vector>
inline void write(void *p, Vector value) {
    std::memcpy(p, &value, sizeof value);
}

// a · b + c, always fused. The compiler would fuse it in one loop and not in another: the sum of a weight row would
// then depend on how the rows are divided into chunks.
inline VF multiply_add(VF a, VF b, VF c) {
#if defined(__AVX512F__)
    return (VF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (VF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (VF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// --- conversions: W elements to float and back, to nearest even ------------------------------------------------------

inline VF load(const float *p) { return read<VF>(p); }

inline VU widen(VH values) {
#if defined(__AVX512F__)
    return (VU)_mm512_cvtepu16_epi32((__m256i)values);  // GCC 12 makes four instructions of a conversion
#else
    return __builtin_convertvector(values, VU);
#endif
}

inline VF load(const BF16 *p) { return bits_to_float(widen(read<VH>(p)) << 16); }

inline void store(float *p, VF value) { write(p, value); }

inline void store(BF16 *p, VF value) {
    const VU bits = float_to_bits(value);
    const VU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const VU nan = (bits >> 16) | 0x40;
    const VU is_nan = (VU)((bits & 0x7fffffff) > 0x7f800000);
    write(p, __builtin_convertvector(select(is_nan, nan, rounded), VH));
}

#if defined(__AVX512F__)
inline VF load(const F16 *p) { return (VF)_mm512_cvtph_ps(read<__m256i>(p)); }
inline void store(F16 *p, VF value) { write(p, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__F16C__)
inline VF load(const F16 *p) { return (VF)_mm256_cvtph_ps(read<__m128i>(p)); }
inline void store(F16 *p, VF value) { write(p, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT)); }
#else
inline VF load(const F16 *p) {
    const VU half = widen(read<VH>(p));
    const VU exponent_shifted = (half & 0x7fff) << 13;
    const VU scale = VU{} + 0x77800000;  // 2^112: the difference of the exponents' biases; also correct for subnormals
    const VU magnitude = float_to_bits(bits_to_float(exponent_shifted) * bits_to_float(scale));
    const VU special = (VU)((half & 0x7c00) == 0x7c00) & 0x7f800000;  // infinities and NaN
    return bits_to_float(magnitude | special | (half & 0x8000) << 16);
}

inline void store(F16 *p, VF value) {
    const VU bits = float_to_bits(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    const VU normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Below 2^-14, adding 0.5 rounds to multiples of 2^-24, whose number is then in the low bits.
    const VF half = bits_to_float(VU{} + 0x3f000000);
    const VU subnormal = float_to_bits(bits_to_float(magnitude) + half) - 0x3f000000;
    const VU infinite = (VU)(magnitude > 0x7f800000) & 0x200;
    VU result = select((VU)(magnitude < 0x38800000), subnormal, normal);
    result = select((VU)(magnitude >= 0x477ff000), VU{} + 0x7c00 + infinite, result);
    write(p, __builtin_convertvector(result | sign, VH));
}
#endif

// The first `bytes` bytes, fewer than in a Vector and a multiple of UNIT; the others are zero. Used at the end of every
// row.
template <class Vector, int UNIT = 2>
inline Vector read_part(const void *p, int64_t bytes) {
#if defined(__AVX512BW__)
    if constexpr (sizeof(Vector) == 64) return (Vector)_mm512_maskz_loadu_epi8((1ull << bytes) - 1, p);
    if constexpr (sizeof(Vector) == 32) return (Vector)_mm256_maskz_loadu_epi8((1u << bytes) - 1, p);
#endif
    alignas(64) char buffer[sizeof(Vector)] = {};
    const char *from = static_cast<const char *>(p);
    char *to = buffer;
#pragma GCC unroll 6
    for (int64_t piece = sizeof(Vector) / 2; piece >= UNIT; piece /= 2) {
        if (!(bytes & piece)) continue;
        std::memcpy(to, from, piece);
        from += piece;
        to += piece;
    }
    return read<Vector>(buffer);
}

// The first n < W elements; the others are zero.
inline VF load_part(const float *p, int64_t n) { return read_part<VF>(p, n * 4); }
template <class Half>
inline VF load_part(const Half *p, int64_t n) {
    const VH halves = read_part<VH>(p, n * 2);
    Half buffer[W];
    write(buffer, halves);
    return load(buffer);
}

template <class T>
inline void store_part(T *p, VF value, int64_t n) {
    T buffer[W];
    store(buffer, value);
#if defined(__AVX512BW__)
    const uint64_t mask = (1ull << n * sizeof(T)) - 1;
    if constexpr (sizeof buffer == 64) return _mm512_mask_storeu_epi8(p, mask, read<__m512i>(buffer));
    if constexpr (sizeof buffer == 32) return _mm256_mask_storeu_epi8(p, mask, read<__m256i>(buffer));
#endif
    std::memcpy(p, buffer, n * sizeof(T));
}

// --- shuffles --------------------------------------------------------------------------------------------------------

// Lane i of the result is lane lane(i) of the concatenation of a and b.
template <class Lane, int... I>
inline VF shuffle(VF a, VF b, Lane lane, std::integer_sequence<int, I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, lane(I)...);
#else
    typedef int VI __attribute__((vector_size(4 * W)));
    return __builtin_shuffle(a, b, (VI){lane(I)...});
#endif
}

// Lanes whose index has not bit D come from a, the others from b, each from its own place.
template <int D>
inline VF own_lanes(VF a, VF b) {
    constexpr auto lane = [](int i) constexpr { return i & D ? W + i : i; };
    return shuffle(a, b, lane, std::make_integer_sequence<int, W>());
}

// Lanes whose index has not bit D come from a, the others from b, each from the lane whose index differs in that bit.
template <int D>
inline VF other_lanes(VF a, VF b) {
    constexpr auto lane = [](int i) constexpr { return i & D ? W + i - D : i + D; };
    return shuffle(a, b, lane, std::make_integer_sequence<int, W>());
}

template <int D = 1>
inline VF sum_lanes(VF *v) {
    if constexpr (D == W) {
        return v[0];
    } else {
        for (int i = 0; i < W / D / 2; ++i) {
            v[i] = own_lanes<D>(v[2 * i], v[2 * i + 1]) + other_lanes<D>(v[2 * i], v[2 * i + 1]);
        }
        return sum_lanes<2 * D>(v);
    }
}

// Lane i of the result is the sum of the lanes of v[i]. v has W vectors and is overwritten.
inline VF reduce(VF *v) { return sum_lanes(v); }

// Transposes W × W in place.
template <int D = 1>
inline void transpose(VF *v) {
    if constexpr (D < W) {
        for (int i = 0; i < W; ++i) {
            if (i & D) continue;
            const VF a = v[i], b = v[i + D];
            constexpr auto low = [](int l) constexpr { return l & D ? W + l - D : l; };
            constexpr auto high = [](int l) constexpr { return l & D ? W + l : l + D; };
            v[i] = shuffle(a, b, low, std::make_integer_sequence<int, W>());
            v[i + D] = shuffle(a, b, high, std::make_integer_sequence<int, W>());
        }
        transpose<2 * D>(v);
    }
}

}  // namespace
}  // namespace grasp

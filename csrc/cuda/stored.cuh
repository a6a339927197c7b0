// How the elements of a weight are stored, and how a lane loads them: in the dtype of the rows that they multiply, or
// as integers of 8 or 4 bits with scales, which become elements of 16 bits; see csrc/lowrank.h.
#pragma once

#include "cuda/intrinsics.cuh"

namespace grasp_cuda {

template <class T>
constexpr int CHUNK = 16 / sizeof(T);  // elements

template <class T>
GRASP_DEVICE Pair unpack(uint32_t word) {
    return {to_float(T{static_cast<uint16_t>(word)}), to_float(T{static_cast<uint16_t>(word >> 16)})};
}

template <class T>
GRASP_DEVICE uint32_t pack(float low, float high) {
    return round_to<T>(low).bits | static_cast<uint32_t>(round_to<T>(high).bits) << 16;
}

// The first `count` elements at an address of any alignment; zeros after them.
GRASP_DEVICE Chunk gather(const float *from, int count) {
    Chunk chunk = {};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        if (e < count) chunk.words[e] = as_bits(load(from + e));
    }
    return chunk;
}

template <class T>
GRASP_DEVICE Chunk gather(const T *from, int count) {
    Chunk chunk = {};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        if (e < count) chunk.words[e / 2] |= static_cast<uint32_t>(load(from + e).bits) << e % 2 * 16;
    }
    return chunk;
}

struct Weight {
    const void *data;
    int64_t stride;  // elements; bytes if quantised
    int32_t rows;
    // Of a quantised weight: columns per scale are 1 << shift. Without groups, one scale multiplies the sums of a row.
    int32_t groups, shift;
    const void *scales;
    int32_t scales_are_float;

    template <class T>
    GRASP_DEVICE float scale(int64_t index) const {
        return scales_are_float ? load(static_cast<const float *>(scales) + index)
                                : to_float(load(static_cast<const T *>(scales) + index));
    }
};

// Integers: 8 bytes at once, whose columns have one scale.
template <class T, int BITS>
struct Stored {
    static constexpr int ELEMENTS = 64 / BITS, PARTS = ELEMENTS / CHUNK<T>;  // chunks of T
    static_assert((BITS == 8 || BITS == 4) && sizeof(T) == 2, "there are no other kernels");

    struct Loaded {
        HalfChunk values;
        float scale;
    };

    template <bool VECTOR>
    static GRASP_DEVICE Loaded load(const Weight &weight, int row, int k, int stop) {
        const uint8_t *from = static_cast<const uint8_t *>(weight.data) + row * weight.stride + k * BITS / 8;
        Loaded loaded = {{}, 1};
        if (weight.groups) loaded.scale = weight.scale<T>(int64_t{row} * weight.groups + (k >> weight.shift));
        if constexpr (VECTOR) {
            loaded.values = load_half_weights(from);
        } else {
#pragma unroll
            for (int byte = 0; byte < 8; ++byte) {
                if (k + byte * 8 / BITS >= stop) break;
                loaded.values.words[byte / 4] |= static_cast<uint32_t>(grasp_cuda::load(from + byte)) << byte % 4 * 8;
            }
        }
        return loaded;
    }

    // The scale of a row without groups, else 1.
    static GRASP_DEVICE float row_scale(const Weight &weight, int row) {
        return weight.groups == 0 && row < weight.rows ? weight.scale<T>(row) : 1;
    }

    static GRASP_DEVICE Chunk part(const Loaded &loaded, int part) {
        Chunk chunk;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int e = part * CHUNK<T> + 2 * i;
            chunk.words[i] =
                pack<T>(value(loaded.values, e) * loaded.scale, value(loaded.values, e + 1) * loaded.scale);
        }
        return chunk;
    }

  private:
    static constexpr uint32_t TWO_TO_23 = 0x4b000000;  // the float; its last bits count ones

    static GRASP_DEVICE float value(const HalfChunk &values, int e) {
        const uint32_t word = values.words[e * BITS / 32];
        const int place = e % (32 / BITS);
        const uint32_t bits =
            BITS == 8 ? replace_low_byte(TWO_TO_23, word ^ 0x80808080, place) : TWO_TO_23 | (word >> 4 * place & 15);
        return as_float(bits) - (8388608.0f + (1 << (BITS - 1)));
    }
};

// Elements as they are multiplied.
template <class T>
struct Stored<T, 0> {
    static constexpr int ELEMENTS = CHUNK<T>, PARTS = 1;
    using Loaded = Chunk;

    template <bool VECTOR>
    static GRASP_DEVICE Chunk load(const Weight &weight, int row, int k, int stop) {
        const T *from = static_cast<const T *>(weight.data) + row * weight.stride + k;
        return VECTOR ? load_weights(from) : gather(from, stop - k);
    }

    static GRASP_DEVICE float row_scale(const Weight &, int) { return 1; }
    static GRASP_DEVICE Chunk part(const Chunk &loaded, int) { return loaded; }
};

}  // namespace grasp_cuda

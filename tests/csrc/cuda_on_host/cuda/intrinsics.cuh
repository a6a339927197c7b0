// In place of csrc/cuda/intrinsics.cuh: the same functions for an emulated thread. Conversions and the tensor core are
// written from their definitions; every access to device memory is checked.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_runtime.h"
#include "emulator.h"

#define GRASP_DEVICE inline

namespace grasp_cuda {

struct F16 {
    uint16_t bits;
};

struct BF16 {
    uint16_t bits;
};

struct alignas(16) Chunk {
    uint32_t words[4];
};

struct alignas(8) HalfChunk {
    uint32_t words[2];
};

struct Pair {
    float low, high;
};

inline int thread_index() { return emulator::thread_index(); }
inline int block_index() { return emulator::block_index(); }
inline int block_count() { return emulator::block_count(); }

template <int BYTES, int TAG>
void *shared_memory() {
    return emulator::shared_memory(TAG, BYTES);
}

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float to_float(float value) { return value; }

inline float to_float(BF16 value) { return as_float(static_cast<uint32_t>(value.bits) << 16); }

inline float to_float(F16 value) {
    const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
    const float digits = static_cast<float>(exponent ? fraction + 1024 : fraction);
    float magnitude = std::ldexp(digits, (exponent ? exponent : 1) - 25);
    if (exponent == 31) magnitude = fraction ? NAN : INFINITY;
    return value.bits >> 15 ? -magnitude : magnitude;
}

inline uint32_t replace_low_byte(uint32_t upper, uint32_t word, int byte) {
    return (upper & 0xffffff00) | (word >> 8 * byte & 0xff);
}

template <class T>
T round_to(float value);

template <>
inline float round_to<float>(float value) {
    return value;
}

template <>
inline BF16 round_to<BF16>(float value) {
    if (std::isnan(value)) return {0x7fff};
    const uint32_t bits = as_bits(value);
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline F16 round_to<F16>(float value) {
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const float magnitude = std::fabs(value);
    if (std::isnan(value)) return {0x7fff};
    if (magnitude >= 65520) return {static_cast<uint16_t>(sign | 0x7c00)};
    const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
    const int digits = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
    return {static_cast<uint16_t>(sign | ((exponent + 14) * 1024 + digits))};
}

template <class T>
T read(const void *from, size_t alignment) {
    T value = {};
    if (emulator::may_read(from, sizeof(T), alignment)) std::memcpy(&value, from, sizeof(T));
    return value;
}

inline Chunk load_weights(const void *from) { return read<Chunk>(from, 16); }
inline HalfChunk load_half_weights(const void *from) { return read<HalfChunk>(from, 8); }
inline Chunk load_hidden(const float *from) { return read<Chunk>(from, 16); }
inline float load_hidden_float(const float *from) { return read<float>(from, 4); }
inline Chunk load_chunk(const void *from) { return read<Chunk>(from, 16); }
template <class T>
T load(const T *from) {
    return read<T>(from, sizeof(T));
}

template <class T>
void store(T *to, T value) {
    if (emulator::may_write(to, sizeof(T))) std::memcpy(to, &value, sizeof(T));
}

// PTX, "Matrix Fragments for mma.m16n8k16": a lane's group is lane / 4, its place lane % 4. Of A it has rows group and
// group + 8 and columns 2 · place, + 1, + 8 and + 9; of B those rows and column group; of C rows group and group + 8
// and columns 2 · place and + 1.
template <class T>
void multiply_add(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
    float own[12];
    for (int i = 0; i < 6; ++i) {
        const uint32_t word = i < 4 ? left[i] : right[i - 4];
        own[2 * i] = to_float(T{static_cast<uint16_t>(word)});
        own[2 * i + 1] = to_float(T{static_cast<uint16_t>(word >> 16)});
    }
    const float *all = emulator::exchange(own, 12);
    const auto a = [&](int row, int k) {
        return all[(row % 8 * 4 + k % 8 / 2) * emulator::EXCHANGED + 2 * (row / 8 + k / 8 * 2) + k % 2];
    };
    const auto b = [&](int k, int column) {
        return all[(column * 4 + k % 8 / 2) * emulator::EXCHANGED + 8 + 2 * (k / 8) + k % 2];
    };
    const int group = thread_index() % 32 / 4, place = thread_index() % 4;
    for (int i = 0; i < 4; ++i) {
        for (int k = 0; k < 16; ++k) sums[i] += a(group + i / 2 * 8, k) * b(k, 2 * place + i % 2);
    }
}

inline float shuffle_xor(float value, int mask) {
    return emulator::exchange(&value, 1)[(thread_index() % 32 ^ mask) * emulator::EXCHANGED];
}

inline void sync_block() { emulator::sync_block(); }
inline void launch_dependents() {}
inline void wait_for_dependency() { emulator::wait_for_dependency(); }
inline uint32_t add_release(uint32_t *word, uint32_t value) { return emulator::add(word, value); }
inline uint32_t load_acquire(const uint32_t *word) { return emulator::poll(word); }

}  // namespace grasp_cuda

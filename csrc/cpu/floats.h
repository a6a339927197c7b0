// Vectors in memory as floats, on any processor.
#pragma once

#include <cstdint>
#include <cstring>

#include "lowrank.h"

namespace grasp {

inline int64_t element_size(int32_t dtype) { return dtype == GRASP_F32 ? 4 : 2; }

inline float half_to_float(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    if (exponent == 0) {
        const float value = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -value : value;
    }
    const uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Elements [first : first + count] of a vector, as floats.
inline const float *to_floats(const void *data, int32_t dtype, int64_t first, int64_t count, float *buffer) {
    if (data == nullptr) return nullptr;
    const char *at = static_cast<const char *>(data) + first * element_size(dtype);
    for (int64_t i = 0; i < count; ++i) {
        if (dtype == GRASP_F32) {
            std::memcpy(buffer + i, at + 4 * i, 4);
            continue;
        }
        uint16_t half;
        std::memcpy(&half, at + 2 * i, 2);
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        std::memcpy(buffer + i, &bits, 4);
        if (dtype == GRASP_F16) buffer[i] = half_to_float(half);
    }
    return buffer;
}

}  // namespace grasp

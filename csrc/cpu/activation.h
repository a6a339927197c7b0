// Activations of gated linear units on vectors of floats.
#pragma once

#include "kernel.h"
#include "vector.h"

namespace grasp {
namespace {

// e^x to 2 units in the last place: 2^n · e^r with |r| ≤ ln(2)/2, and e^r by its Taylor series to the 7th power.
// Infinite above the largest float, and at least the smallest normal float.
inline VF exponential(VF x) {
    const VF lowest = broadcast(-87.0f), highest = broadcast(88.72f);
    const auto overflows = x > highest;
    x = x < lowest ? lowest : x;  // NaN compares false and stays
    x = overflows ? highest : x;
    const VF magic = broadcast(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer, in the low bits
    const VF shifted = x * 1.44269504f + magic;
    const VF n = shifted - magic;
    const VF r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts, the first exact in 9 bits
    VF p = broadcast(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const VF power = bits_to_float(float_to_bits(p) + (float_to_bits(shifted) << 23));
    return overflows ? broadcast(__builtin_inff()) : power;
}

struct Silu {
    static VF apply(VF x) { return x / (exponential(-x) + 1.0f); }
};

struct GeluTanh {
    // (1 + tanh z) / 2 = 1 / (1 + e^(-2z))
    static VF apply(VF x) { return x / (exponential(-1.59576912f * (x + 0.044715f * x * x * x)) + 1.0f); }
};

struct Gelu {
    static VF apply(VF x) {
        for (int i = 0; i < W; ++i) x[i] = 0.5f * x[i] * __builtin_erfcf(-0.70710678f * x[i]);
        return x;
    }
};

struct Relu {
    static VF apply(VF x) { return x < VF{} ? VF{} : x; }
};

// gate = activation(gate) * up; `floats` is a multiple of W.
template <class Activation>
void gate_with(float *gate, const float *up, int64_t floats) {
    for (int64_t i = 0; i < floats; i += W) store(gate + i, Activation::apply(load(gate + i)) * load(up + i));
}

void gate_span(float *gate, const float *up, int64_t floats, grasp_activation activation) {
    switch (activation) {
        case GRASP_SILU: return gate_with<Silu>(gate, up, floats);
        case GRASP_GELU: return gate_with<Gelu>(gate, up, floats);
        case GRASP_GELU_TANH: return gate_with<GeluTanh>(gate, up, floats);
        case GRASP_RELU: return gate_with<Relu>(gate, up, floats);
    }
}

}  // namespace
}  // namespace grasp

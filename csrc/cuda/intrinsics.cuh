// Everything in the kernels that is not plain C++: elements, loads and stores, tensor cores, synchronization.
#pragma once

#include <cstdint>

#define GRASP_DEVICE __device__ __forceinline__

namespace grasp_cuda {

struct F16 {
    uint16_t bits;
};

struct BF16 {
    uint16_t bits;
};

struct alignas(16) Chunk {  // 16 bytes of a row
    uint32_t words[4];
};

struct alignas(8) HalfChunk {
    uint32_t words[2];
};

struct Pair {
    float low, high;
};

GRASP_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
GRASP_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
GRASP_DEVICE int block_count() { return static_cast<int>(gridDim.x); }

// Shared memory of the block; TAG distinguishes the buffers.
template <int BYTES, int TAG>
GRASP_DEVICE void *shared_memory() {
    __shared__ Chunk memory[BYTES / sizeof(Chunk)];
    return memory;
}

// --- elements --------------------------------------------------------------------------------------------------------

GRASP_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
GRASP_DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }

GRASP_DEVICE float to_float(float value) { return value; }

GRASP_DEVICE float to_float(BF16 value) { return as_float(static_cast<uint32_t>(value.bits) << 16); }

GRASP_DEVICE float to_float(F16 value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}

// Byte `byte` of a word below the three upper bytes of `upper`.
GRASP_DEVICE uint32_t replace_low_byte(uint32_t upper, uint32_t word, int byte) {
    return __byte_perm(word, upper, 0x7650 | byte);
}

// Rounded to nearest, ties to even.
template <class T>
GRASP_DEVICE T round_to(float value);

template <>
GRASP_DEVICE float round_to<float>(float value) {
    return value;
}

template <>
GRASP_DEVICE F16 round_to<F16>(float value) {
    F16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}

template <>
GRASP_DEVICE BF16 round_to<BF16>(float value) {
    BF16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}

// --- memory ----------------------------------------------------------------------------------------------------------

// 16 bytes of a factor. It is read once, so the caches evict it first. The compiler does not move the load across a
// wait.
GRASP_DEVICE Chunk load_weights(const void *from) {
    Chunk chunk;
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(chunk.words[0]), "=r"(chunk.words[1]), "=r"(chunk.words[2]), "=r"(chunk.words[3])
                 : "l"(from)
                 : "memory");
    return chunk;
}

// The same of 8 bytes.
GRASP_DEVICE HalfChunk load_half_weights(const void *from) {
    HalfChunk chunk;
    asm volatile("ld.global.cs.v2.u32 {%0, %1}, [%2];"
                 : "=r"(chunk.words[0]), "=r"(chunk.words[1])
                 : "l"(from)
                 : "memory");
    return chunk;
}

// 4 floats, or one, that another block wrote; bypasses the first-level cache.
GRASP_DEVICE Chunk load_hidden(const float *from) {
    Chunk chunk;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(chunk.words[0]), "=r"(chunk.words[1]), "=r"(chunk.words[2]), "=r"(chunk.words[3])
                 : "l"(from)
                 : "memory");
    return chunk;
}

GRASP_DEVICE float load_hidden_float(const float *from) {
    float value;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(from) : "memory");
    return value;
}

GRASP_DEVICE Chunk load_chunk(const void *from) { return *static_cast<const Chunk *>(from); }

template <class T>
GRASP_DEVICE T load(const T *from) {
    return *from;
}

template <class T>
GRASP_DEVICE void store(T *to, T value) {
    *to = value;
}

// --- tensor cores ----------------------------------------------------------------------------------------------------

#define GRASP_MMA(TYPE)                                                   \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE            \
        ".f32 "                                                           \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])      \
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]))

// sums += left · right, [16, 16] by [16, 8], in the fragment layout of PTX's mma.m16n8k16.
template <class T>
GRASP_DEVICE void multiply_add(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]);

template <>
GRASP_DEVICE void multiply_add<F16>(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
    GRASP_MMA("f16");
}

template <>
GRASP_DEVICE void multiply_add<BF16>(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
    GRASP_MMA("bf16");
}

// --- synchronization -------------------------------------------------------------------------------------------------

GRASP_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }

GRASP_DEVICE void sync_block() { __syncthreads(); }

// Lets the next kernel start: its blocks run as blocks of this kernel finish.
GRASP_DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the previous kernel has ended and its stores can be read. No-op if this kernel was not launched as its
// dependent: then the previous kernel has ended already.
GRASP_DEVICE void wait_for_dependency() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

GRASP_DEVICE uint32_t add_release(uint32_t *word, uint32_t value) {
    uint32_t before;
    asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(value) : "memory");
    return before;
}

GRASP_DEVICE uint32_t load_acquire(const uint32_t *word) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
}

}  // namespace grasp_cuda

// The interface between lowrank.cpp, which has threads, chunks and memory, and the vector code of an instruction set.
#pragma once

#include <cstdint>

#include "lowrank.h"

namespace grasp {

constexpr int64_t MAX_ROWS = 64;  // of x in one call of a kernel

constexpr int64_t TILE_FLOATS = 64 * MAX_ROWS;

// A matrix [rows, depth] that is streamed from memory: Vh or U.
struct Weight {
    const void *data;
    int64_t stride, depth;  // elements; the stride of a quantised matrix is in bytes

    // Of a quantised matrix with more than one scale in a row; else `group` is 0, and the caller applies the scales.
    const void *scales = nullptr;  // [rows, groups]
    grasp_dtype scales_dtype = GRASP_F32;
    int64_t group = 0, groups = 0;
};

// out[M, rows] = in[M, depth] · weightᵀ for M ≤ MAX_ROWS, in steps.
//
// `in` is packed in a layout that only the kernel knows. The products of a chunk of at most `chunk` weight rows are
// stored in a tile in float32, which stays in the first-level cache; only the kernel knows its layout too.
struct Kernel {
    int64_t block, chunk;  // weight rows: to multiply at once for speed, and in a tile
    int64_t lanes;         // a tile is [weight row][M rounded up to lanes]; 0: [M][chunk]

    int64_t (*packed_bytes)(int64_t M, int64_t depth);

    // x[M, begin:end] → packed. begin is a multiple of PACK_STEP; end is too, or is the depth.
    void (*pack)(const grasp_input &x, int64_t begin, int64_t end, void *packed);

    // weight[first : first + rows] → tile.
    void (*multiply)(const Weight &weight, int64_t first, int64_t rows, const void *packed, int64_t M, float *tile);

    // tile[m, row] = tile[m, row] * scale[row] + shift[row]; either may be null.
    void (*adjust)(float *tile, int64_t M, int64_t rows, const float *scale, const float *shift);

    // tile → packed[:, first : first + rows], the input of the next product; `seal` follows when all of it is put.
    void (*put_packed)(const float *tile, int64_t M, int64_t first, int64_t rows, int64_t depth, void *packed);
    void (*seal)(int64_t M, int64_t depth, void *packed);  // null: not needed

    // tile → y[:, first : first + rows]; y points to the output of the first row of x.
    void (*put_output)(const float *tile, int64_t M, int64_t rows, void *y, int64_t y_stride);

    // tile[row] → merged[columns[row] - first]; null without lanes.
    void (*place)(const float *tile, int64_t M, int64_t rows, const int32_t *columns, int64_t first, float *merged);

    // tile `gate` = activation(gate) * up.
    void (*gate)(float *gate, const float *up, int64_t M, int64_t rows, grasp_activation activation);
};

constexpr int64_t PACK_STEP = 128;

// The kernel for M rows of x and a weight of `bits`, or null if this instruction set has none of its own. 0 bits: the
// weight has the dtype of x. The kernels of one instruction set, dtype and M have the same layout of tiles.
const Kernel *portable_kernel(grasp_dtype dtype, int bits, int64_t M);
const Kernel *avx2_kernel(grasp_dtype dtype, int bits, int64_t M);
const Kernel *avx512_kernel(grasp_dtype dtype, int bits, int64_t M);
const Kernel *avx512_bf16_kernel(grasp_dtype dtype, int bits, int64_t M);
const Kernel *amx_kernel(grasp_dtype dtype, int bits, int64_t M);

}  // namespace grasp

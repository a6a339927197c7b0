// The product of up to 16 rows with 8 · TILES rows of a weight in one block, both along a row: left · weightᵀ.
//
// The summed dimension is divided among the warps, and in a warp among four lanes, 16 bytes each. A lane uses its 16
// bytes as it loaded them: the tensor core then sums in an order that is the same permutation for both operands. Of a
// quantised weight a lane loads 8 bytes, which become one or more times 16 bytes in the dtype of the rows.
#pragma once

#include "cuda/stored.cuh"

namespace grasp_cuda {

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int MAX_ROWS = 16;

template <class T, int BITS>
constexpr int STEP = 4 * Stored<T, BITS>::ELEMENTS;  // elements of a row that a warp loads at once

GRASP_DEVICE int warp() { return thread_index() / 32; }
GRASP_DEVICE int lane_row() { return thread_index() % 32 / 4; }
GRASP_DEVICE int lane_place() { return thread_index() % 4; }

// --- sums of a warp --------------------------------------------------------------------------------------------------

// [ROWS, 8 · TILES] in tensor-core fragments, for 16-bit elements.
template <class T, int ROWS, int TILES>
struct Sums {
    static_assert(ROWS == 8 || ROWS == 16, "the rows of half a fragment, or a whole one");
    float values[TILES][4] = {};

    // Add the products of one step; left(row) is a lane's chunk of that row.
    template <class Left>
    GRASP_DEVICE void add(const Left &left, const Chunk (&right)[TILES]) {
        const Chunk top = left(lane_row()), bottom = ROWS == 16 ? left(lane_row() + 8) : Chunk{};
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const uint32_t rows[4] = {top.words[i], bottom.words[i], top.words[i + 1], bottom.words[i + 1]};
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                const uint32_t columns[2] = {right[t].words[i], right[t].words[i + 1]};
                multiply_add<T>(values[t], rows, columns);
            }
        }
    }

    // Write the sums to [ROWS, pitch].
    GRASP_DEVICE void put(float *sums, int pitch, int /* rows */) const {
        float *at = sums + lane_row() * pitch + 2 * lane_place();
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
#pragma unroll
            for (int i = 0; i < ROWS / 4; ++i) at[i / 2 * 8 * pitch + 8 * t + i % 2] = values[t][i];
        }
    }
};

// The same in multiply-adds, for floats: a lane has all rows of the columns that belong to its row of each tile.
template <int ROWS, int TILES>
struct Sums<float, ROWS, TILES> {
    float values[TILES][ROWS] = {};

    template <class Left>
    GRASP_DEVICE void add(const Left &left, const Chunk (&right)[TILES]) {
#pragma unroll
        for (int m = 0; m < ROWS; ++m) {
            const Chunk chunk = left(m);
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
#pragma unroll
                for (int e = 0; e < 4; ++e) values[t][m] += as_float(chunk.words[e]) * as_float(right[t].words[e]);
            }
        }
    }

    // Only the first `rows` rows.
    GRASP_DEVICE void put(float *sums, int pitch, int rows) const {
#pragma unroll
        for (int m = 0; m < ROWS; ++m) {
            if (m < rows) {
#pragma unroll
                for (int t = 0; t < TILES; ++t) {
                    float sum = values[t][m] + shuffle_xor(values[t][m], 1);
                    sum += shuffle_xor(sum, 2);
                    if (lane_place() == 0) sums[m * pitch + 8 * t + lane_row()] = sum;
                }
            }
        }
    }
};

// --- the product of a block ------------------------------------------------------------------------------------------

// STEPS: the steps that a warp loads at once, while it multiplies as many. VECTOR: every chunk is aligned and
// completely inside or outside the matrix; without it, elements are loaded one by one.
template <class T, int BITS, int ROWS, int TILES, int STEPS, bool VECTOR>
struct Product {
    using Form = Stored<T, BITS>;
    static constexpr int COLUMNS = 8 * TILES;                    // of the result: rows of the weight
    static constexpr int STAGE = WARPS * STEPS * STEP<T, BITS>;  // elements of the summed dimension
    static constexpr int PITCH = COLUMNS + 8;                // so that the rows of a fragment are on different banks
    static constexpr int SHARED = WARPS * ROWS * PITCH * 4;  // bytes
    static_assert(THREADS % COLUMNS == 0, "a thread finishes one column");

    Weight weight;
    int first, stop;  // row of the weight; end of the summed dimension
    typename Form::Loaded ahead[STEPS][TILES];
    Sums<T, ROWS, TILES> sums;

    GRASP_DEVICE Product(const Weight &weight, int first, int stop) : weight(weight), first(first), stop(stop) {}

    // The lane's first element of the summed dimension, in one step of a stage.
    static GRASP_DEVICE int place(int stage, int step) {
        return stage + (warp() * STEPS + step) * STEP<T, BITS> + lane_place() * Form::ELEMENTS;
    }

    // The column whose sum a thread finishes.
    static GRASP_DEVICE int column() { return thread_index() % COLUMNS; }

    // Load the stage's part of the weight.
    GRASP_DEVICE void fetch(int stage) {
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
            const int row = first + 8 * t + lane_row();
#pragma unroll
            for (int j = 0; j < STEPS; ++j) {
                const int k = place(stage, j);
                ahead[j][t] = {};
                if (row < weight.rows && k < stop) ahead[j][t] = Form::template load<VECTOR>(weight, row, k, stop);
            }
        }
    }

    // Multiply the loaded stage and load the next one. left(row, k) returns 16 bytes of a row from element k on;
    // adjust(chunk, k) may change those of the weight.
    template <class Left, class Adjust>
    GRASP_DEVICE void multiply(int stage, const Left &left, const Adjust &adjust) {
        typename Form::Loaded now[STEPS][TILES];
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
#pragma unroll
            for (int t = 0; t < TILES; ++t) now[j][t] = ahead[j][t];
        }
        if (stage + STAGE < stop) fetch(stage + STAGE);
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
#pragma unroll
            for (int part = 0; part < Form::PARTS; ++part) {
                const int k = place(stage, j) + part * CHUNK<T>;
                Chunk right[TILES];
#pragma unroll
                for (int t = 0; t < TILES; ++t) {
                    right[t] = Form::part(now[j][t], part);
                    adjust(right[t], k);
                }
                sums.add([&](int row) { return left(row, k); }, right);
            }
        }
    }

    // Add up the warps' sums in their order, and call finish(row, sum) for the thread's column.
    template <class Finish>
    GRASP_DEVICE void finish(int rows, const Finish &finish) const {
        float *all = static_cast<float *>(shared_memory<SHARED, 0>());
        sync_block();  // the sums of an earlier product may still be in use
        sums.put(all + warp() * ROWS * PITCH, PITCH, rows);
        sync_block();
#pragma unroll
        for (int first_row = 0; first_row < ROWS; first_row += THREADS / COLUMNS) {
            const int row = first_row + thread_index() / COLUMNS;
            if (row >= rows) continue;
            float sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) sum += all[(w * ROWS + row) * PITCH + column()];
            finish(row, sum);
        }
    }
};

}  // namespace grasp_cuda

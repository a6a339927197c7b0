// The kernels of a low-rank linear, or of a group of them with one x: shrink, expand, and both in one launch.
//
// shrink: h = x · Vhᵀ as partial sums over splits of K. expand: y = (h ∘ s) · Uᵀ + bias, where h is the sum of its
// splits, rounded once to the dtype of x. Both divide the members of a group into tiles, numbered one after the other.
// A pivoted member has tiles of U, then tiles of h: the former give the entries of y that `order` has after the pivots.
// The members of one launch store Vh alike, and U alike.
#pragma once

#include <type_traits>

#include "cuda/product.cuh"

namespace grasp_cuda {

constexpr int MAX_MEMBERS = 8;
// Blocks per processor: the registers must suffice for as many.
template <int BITS, int ROWS>
constexpr int MIN_BLOCKS = BITS > 0 && ROWS == 8 ? 3 : 2;
constexpr int RANK_TILE = 16, WIDTH_TILE = 32;  // columns of h and of y per block

// Chunks of a weight row that a lane loads at once; multiply-adds of many rows leave fewer registers for them.
template <class T, int ROWS>
constexpr int SHRINK_STEPS = sizeof(T) == 4 && ROWS > 8 ? 2 : 4;
template <class T, int BITS>
constexpr int SPLIT_GRANULE = WARPS * SHRINK_STEPS<T, 1> * STEP<T, BITS>;  // elements of K: whole stages
template <class T, int ROWS>
constexpr int EXPAND_STEPS = SHRINK_STEPS<T, ROWS> / 2;

// Every block of the expand reads all partial sums, so more rows get fewer splits.
template <int ROWS>
constexpr int MAX_SPLITS = ROWS > 8 ? 4 : 8;

struct Member {
    Weight U, Vh;
    const void *s, *bias;  // may be null
    void *y;
    int64_t y_stride;  // elements
    int32_t N, R;
    int32_t rank_tile, width_tile;  // the member's first tiles among those of the group
    int32_t s_is_float;
};

struct Problem {
    const void *x;
    int64_t x_stride;
    float *hidden;      // [splits, M, RANK_TILE · rank_tiles]; columns after a member's rank are 0
    uint32_t *barrier;  // of the kernel with both phases
    int32_t M, K;
    int32_t count, rank_tiles, width_tiles;  // members; tiles of all of them
    int32_t splits, length;                  // splits of K, and the elements of one
    Member members[MAX_MEMBERS];
    const int32_t *orders[MAX_MEMBERS];  // null for a member that is not pivoted
};

GRASP_DEVICE const Member &member_of(const Problem &problem, int32_t Member::*first, int tile) {
    int index = 0;
    while (index + 1 < problem.count && tile >= problem.members[index + 1].*first) ++index;
    return problem.members[index];
}

template <class T>
GRASP_DEVICE float scale(const Member &member, int column) {
    if (column >= member.R) return 0;
    return member.s_is_float ? load(static_cast<const float *>(member.s) + column)
                             : to_float(load(static_cast<const T *>(member.s) + column));
}

// --- shrink ----------------------------------------------------------------------------------------------------------

template <class T, int BITS, int ROWS, bool VECTOR>
GRASP_DEVICE void shrink(const Problem &problem, int task) {
    using Tile = Product<T, BITS, ROWS, RANK_TILE / 8, SHRINK_STEPS<T, ROWS>, VECTOR>;
    const int tile = task % problem.rank_tiles, split = task / problem.rank_tiles;
    const Member &member = member_of(problem, &Member::rank_tile, tile);
    const int first = (tile - member.rank_tile) * RANK_TILE;
    const int start = split * problem.length;
    const int stop = problem.K - start > problem.length ? start + problem.length : problem.K;

    Tile product(member.Vh, first, stop);
    product.fetch(start);
    const float scale = Tile::Form::row_scale(member.Vh, first + Tile::column());
    const auto x = [&](int row, int k) {
        if (row >= problem.M || k >= stop) return Chunk{};
        const T *from = static_cast<const T *>(problem.x) + row * problem.x_stride + k;
        return VECTOR ? load_chunk(from) : gather(from, stop - k);
    };
    for (int stage = start; stage < stop; stage += Tile::STAGE) product.multiply(stage, x, [](Chunk &, int) {});

    const int64_t columns = int64_t{RANK_TILE} * problem.rank_tiles;
    float *h = problem.hidden + split * problem.M * columns + tile * RANK_TILE + Tile::column();
    const bool inside = first + Tile::column() < member.R;  // outside, an Inf in x times zero gave NaN
    product.finish(problem.M, [&](int row, float sum) { store(h + row * columns, inside ? sum * scale : 0); });
}

// --- expand ----------------------------------------------------------------------------------------------------------

// PIVOTED: whether members may have an order.
template <class T, int BITS, int ROWS, bool VECTOR, bool PIVOTED>
struct Expand {
    using Tile = Product<T, BITS, ROWS, WIDTH_TILE / 8, EXPAND_STEPS<T, ROWS>, VECTOR>;
    // Puts the rows of a fragment on different banks. Lanes of a row are as far apart as they load elements of it.
    static constexpr int PITCH = Tile::STAGE + (Tile::Form::PARTS == 1 ? 4 : 1) * CHUNK<T>;

    const Problem &problem;
    const Member &member;
    const int first;  // row of U
    const int32_t *const order;
    const int rows;    // of U
    const int column;  // of y, which a thread finishes
    const bool inside;
    float bias = 0, weight_scale;
    Tile product;

    // Loads the data that do not depend on h: the first stage of U, and the bias.
    GRASP_DEVICE Expand(const Problem &problem, int tile)
        : problem(problem),
          member(member_of(problem, &Member::width_tile, tile)),
          first((tile - member.width_tile) * WIDTH_TILE),
          order(PIVOTED ? problem.orders[&member - problem.members] : nullptr),
          rows(order ? member.N - member.R : member.N),
          column(order ? find_column() : first + Tile::column()),
          inside(PIVOTED ? static_cast<uint32_t>(column) < static_cast<uint32_t>(member.N) : column < member.N),
          product(member.U, first, member.R) {
        product.fetch(0);
        weight_scale = Tile::Form::row_scale(member.U, first + Tile::column());
        if (member.bias && inside) bias = to_float(load(static_cast<const T *>(member.bias) + column));
    }

    GRASP_DEVICE void run() {
        if (PIVOTED && first >= rows) return write_pivots();
        T *hidden = static_cast<T *>(shared_memory<ROWS * PITCH * sizeof(T), 1>());
        for (int stage = 0; stage < member.R; stage += Tile::STAGE) {
            if (stage > 0) sync_block();  // the previous stage may still be in use
            put_hidden(hidden, stage);
            sync_block();
            const auto h = [&](int row, int k) {
                return row < problem.M ? *reinterpret_cast<const Chunk *>(hidden + row * PITCH + k - stage) : Chunk{};
            };
            product.multiply(stage, h, [&](Chunk &chunk, int k) { scale_weights(chunk, k); });
        }
        T *y = static_cast<T *>(member.y) + column;
        product.finish(problem.M, [&](int row, float sum) {
            if (inside) store(y + row * member.y_stride, round_to<T>(sum * weight_scale + bias));
        });
    }

  private:
    // -1 if there is none.
    GRASP_DEVICE int find_column() const {
        const bool in_U = first < rows;
        const int entry = in_U ? member.R + first + Tile::column() : pivot();
        return entry < (in_U ? member.N : member.R) ? load(order + entry) : -1;
    }

    // The column of h that a thread writes to y.
    GRASP_DEVICE int pivot() const {
        return first - (rows + WIDTH_TILE - 1) / WIDTH_TILE * WIDTH_TILE + Tile::column();
    }

    GRASP_DEVICE void write_pivots() const {
        const int64_t columns = int64_t{RANK_TILE} * problem.rank_tiles, stride = problem.M * columns;
        T *y = static_cast<T *>(member.y) + column;
        for (int row = thread_index() / WIDTH_TILE; inside && row < problem.M; row += THREADS / WIDTH_TILE) {
            const float *from = problem.hidden + row * columns + member.rank_tile * RANK_TILE + pivot();
            float sum = 0;
#pragma unroll
            for (int split = 0; split < MAX_SPLITS<ROWS>; ++split) {
                if (split < problem.splits) sum += load_hidden_float(from + split * stride);
            }
            store(y + row * member.y_stride, round_to<T>(sum + bias));
        }
    }

    // In fp16 s scales U, because h ∘ s could overflow.
    static constexpr bool SCALES_WEIGHTS = std::is_same<T, F16>::value;

    // Sums a stage of h over its splits, scales and rounds it: [M, STAGE] in shared memory, zeros after the rank.
    GRASP_DEVICE void put_hidden(T *hidden, int stage) const {
        constexpr int SPLITS = MAX_SPLITS<ROWS>, AT_ONCE = ROWS < 8 ? 1 : 16 / SPLITS, FOURS = Tile::STAGE / 4;
        for (int i = thread_index(); i < problem.M * FOURS; i += AT_ONCE * THREADS) {
            Chunk partials[AT_ONCE][SPLITS];
#pragma unroll
            for (int n = 0; n < AT_ONCE; ++n) {
                load_partials(partials[n], (i + n * THREADS) / FOURS, stage + (i + n * THREADS) % FOURS * 4);
            }
#pragma unroll
            for (int n = 0; n < AT_ONCE; ++n) {
                const int row = (i + n * THREADS) / FOURS, k = (i + n * THREADS) % FOURS * 4;
                if (row < problem.M) put_four(hidden + row * PITCH + k, partials[n], stage + k);
            }
        }
    }

    // 4 columns of a row of h, zeros outside.
    template <int SPLITS>
    GRASP_DEVICE void load_partials(Chunk (&partials)[SPLITS], int row, int k) const {
        const int64_t columns = int64_t{RANK_TILE} * problem.rank_tiles, stride = problem.M * columns;
        const bool exists = row < problem.M && k < (member.R + RANK_TILE - 1) / RANK_TILE * RANK_TILE;
        const int splits = exists ? problem.splits : 0;
        const float *from = problem.hidden + row * columns + member.rank_tile * RANK_TILE + k;
#pragma unroll
        for (int split = 0; split < SPLITS; ++split) {
            partials[split] = Chunk{};
            if (split < splits) partials[split] = load_hidden(from + split * stride);
        }
    }

    template <int SPLITS>
    GRASP_DEVICE void put_four(T *to, const Chunk (&partials)[SPLITS], int k) const {
        float sums[4] = {};
#pragma unroll
        for (int split = 0; split < SPLITS; ++split) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[e] += as_float(partials[split].words[e]);
        }
        if (member.s && !SCALES_WEIGHTS) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[e] *= scale<T>(member, k + e);
        }
        store_four(to, sums);
    }

    static GRASP_DEVICE void store_four(float *to, const float (&values)[4]) {
        Chunk chunk;
#pragma unroll
        for (int e = 0; e < 4; ++e) chunk.words[e] = as_bits(values[e]);
        *reinterpret_cast<Chunk *>(to) = chunk;
    }

    template <class Half>
    static GRASP_DEVICE void store_four(Half *to, const float (&values)[4]) {
        uint32_t *words = reinterpret_cast<uint32_t *>(to);
        words[0] = pack<Half>(values[0], values[1]);
        words[1] = pack<Half>(values[2], values[3]);
    }

    GRASP_DEVICE void scale_weights(Chunk &chunk, int k) const {
        if constexpr (SCALES_WEIGHTS) {
            if (member.s == nullptr) return;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const Pair pair = unpack<T>(chunk.words[i]);
                chunk.words[i] =
                    pack<T>(pair.low * scale<T>(member, k + 2 * i), pair.high * scale<T>(member, k + 2 * i + 1));
            }
        }
    }
};

// --- a barrier of the whole grid -------------------------------------------------------------------------------------

constexpr uint32_t FLIP = 1u << 30;

// Tells the barrier that this block's stores are done. Each block adds 1, and the first block adds the complement to
// FLIP: with the last arrival that bit flips, and the bits below it are 0 for the next crossing, in this launch or a
// later one.
GRASP_DEVICE uint32_t arrive(uint32_t *barrier) {
    sync_block();
    if (thread_index() != 0) return 0;
    return add_release(barrier, block_index() == 0 ? FLIP - static_cast<uint32_t>(block_count() - 1) : 1);
}

// Waits for all blocks, with the result of `arrive`. Their stores can be read afterwards.
GRASP_DEVICE void wait(const uint32_t *barrier, uint32_t ticket) {
    if (thread_index() == 0) {
        while (((load_acquire(barrier) ^ ticket) & FLIP) == 0) {
        }
    }
    sync_block();
}

// --- kernels ---------------------------------------------------------------------------------------------------------

template <class T, int BITS, int ROWS, bool VECTOR>
__global__ void __launch_bounds__(THREADS, (MIN_BLOCKS<BITS, ROWS>))
    lowrank_shrink_kernel(const __grid_constant__ Problem problem) {
    launch_dependents();
    shrink<T, BITS, ROWS, VECTOR>(problem, block_index());
}

template <class T, int BITS, int ROWS, bool VECTOR, bool PIVOTED>
__global__ void __launch_bounds__(THREADS, (MIN_BLOCKS<BITS, ROWS>))
    lowrank_expand_kernel(const __grid_constant__ Problem problem) {
    Expand<T, BITS, ROWS, VECTOR, PIVOTED> expand(problem, block_index());
    wait_for_dependency();
    expand.run();
}

// Arrive first, then load U while other blocks finish: an earlier load of U would delay the shrink.
template <class T, int ROWS, bool VECTOR, bool PIVOTED>
__global__ void __launch_bounds__(THREADS, (MIN_BLOCKS<0, ROWS>))
    lowrank_cooperative_kernel(const __grid_constant__ Problem problem) {
    for (int task = block_index(); task < problem.rank_tiles * problem.splits; task += block_count()) {
        shrink<T, 0, ROWS, VECTOR>(problem, task);
    }
    const uint32_t ticket = arrive(problem.barrier);
    for (int tile = block_index(); tile < problem.width_tiles; tile += block_count()) {
        Expand<T, 0, ROWS, VECTOR, PIVOTED> expand(problem, tile);
        if (tile == block_index()) wait(problem.barrier, ticket);
        expand.run();
    }
}

}  // namespace grasp_cuda

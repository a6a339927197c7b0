// More rows of x: panels of W rows, transposed, so that each lane is a row of x. Each element of the weight is
// multiplied with a whole panel, and no sum over lanes is needed.
#pragma once

#include "activation.h"
#include "kernel.h"
#include "quantized.h"
#include "vector.h"

namespace grasp {
namespace {

constexpr int64_t panels_of(int64_t M) { return (M + W - 1) / W; }

// The units that are broadcast: one type per dtype, and more for instruction sets with faster instructions. A unit is
// PER_UNIT elements.
template <class T>
struct Single {
    using Element = T;
    using Unit = float;
    using Value = float;  // of a quantised weight, PER_UNIT of them in a unit
    static constexpr int PER_UNIT = 1, PADDING = 1;
    // n ≤ W elements as units, one per lane.
    static VF load(const T *p, int64_t n) { return n < W ? load_part(p, n) : grasp::load(p); }
    static VF multiply(VF acc, float w, VF x) { return multiply_add(broadcast(w), x, acc); }
    // Element `index` of the rows of a panel.
    static void put(float *panel, int64_t index, VF value) { store(panel + index * W, value); }
};

// Shared by the kernels with panels: the layouts of x, h and the tile, and how they are packed and stored.
//   packed: [panel][unit][W], 32 bits each, units padded with zeros to PADDING.   tile: [weight row][panel][W].
template <class Policy, int64_t ROWS_OF_TILE>
struct Panels {
    static constexpr int64_t CHUNK = ROWS_OF_TILE;
    static_assert(CHUNK * MAX_ROWS <= TILE_FLOATS);

    using Element = typename Policy::Element;
    static constexpr int PER_UNIT = Policy::PER_UNIT;

    static int64_t units(int64_t depth) { return (depth + PER_UNIT - 1) / PER_UNIT; }

    static int64_t panel_floats(int64_t depth) { return round_up(units(depth), Policy::PADDING) * W; }

    static int64_t packed_bytes(int64_t M, int64_t depth) { return panels_of(M) * panel_floats(depth) * 4; }

    static void pad(float *panel, int64_t depth) {
        const int64_t used = units(depth) * W;
        std::memset(panel + used, 0, (panel_floats(depth) - used) * sizeof(float));
    }

    static void pack(const grasp_input &x, int64_t begin, int64_t end, void *packed) {
        for (int64_t m = 0; m < x.M; m += W) {
            float *out = static_cast<float *>(packed) + m / W * panel_floats(x.K);
            if (end == x.K) pad(out, x.K);
            for (int64_t k = begin; k < end; k += W * PER_UNIT) {
                VF block[W] = {};
                for (int64_t row = m; row < x.M && row < m + W; ++row) {
                    block[row - m] = Policy::load(static_cast<const Element *>(x.data) + row * x.stride + k, end - k);
                }
                transpose(block);
                for (int64_t i = 0; i < W && k + i * PER_UNIT < end; ++i) {
                    store(out + (k / PER_UNIT + i) * W, block[i]);
                }
            }
        }
    }

    static void adjust(float *tile, int64_t M, int64_t rows, const float *scale, const float *shift) {
        const int64_t lanes = panels_of(M) * W;
        for (int64_t r = 0; r < rows; ++r) {
            const VF factor = broadcast(scale ? scale[r] : 1.0f), term = broadcast(shift ? shift[r] : 0.0f);
            for (int64_t at = r * lanes; at < (r + 1) * lanes; at += W)
                store(tile + at, load(tile + at) * factor + term);
        }
    }

    static void put_packed(const float *tile, int64_t M, int64_t first, int64_t rows, int64_t depth, void *packed) {
        const int64_t panels = panels_of(M);
        for (int64_t p = 0; p < panels; ++p) {
            float *panel = static_cast<float *>(packed) + p * panel_floats(depth);
            for (int64_t r = 0; r < rows; ++r) Policy::put(panel, first + r, load(tile + (r * panels + p) * W));
            if (first + rows < depth) continue;
            if (depth % PER_UNIT) Policy::put(panel, depth, VF{});
            pad(panel, depth);
        }
    }

    static void put_output(const float *tile, int64_t M, int64_t rows, void *y, int64_t y_stride) {
        const int64_t lanes = panels_of(M) * W;
        for (int64_t m = 0; m < M; m += W) {
            for (int64_t r = 0; r < rows; r += W) {
                const int64_t count = rows - r < W ? rows - r : W;
                VF block[W] = {};
                for (int64_t i = 0; i < count; ++i) block[i] = load(tile + (r + i) * lanes + m);
                transpose(block);
                for (int64_t row = m; row < M && row < m + W; ++row) {
                    Element *out = static_cast<Element *>(y) + row * y_stride + r;
                    if (count < W) {
                        store_part(out, block[row - m], count);
                    } else {
                        store(out, block[row - m]);
                    }
                }
            }
        }
    }

    static void place(const float *tile, int64_t M, int64_t rows, const int32_t *columns, int64_t first,
                      float *merged) {
        const int64_t lanes = panels_of(M) * W;
        for (int64_t r = 0; r < rows; ++r) {
            float *to = merged + (columns[r] - first) * lanes;
            for (int64_t at = 0; at < lanes; at += W) store(to + at, load(tile + r * lanes + at));
        }
    }

    static void gate(float *gate, const float *up, int64_t M, int64_t rows, grasp_activation activation) {
        gate_span(gate, up, rows * panels_of(M) * W, activation);
    }
};

constexpr int ACCUMULATORS = W == 16 ? 24 : 12;  // vectors of sums that fit in registers

// The weight has BITS per value; 0: it has the dtype of x.
template <class Policy, int BITS = 0>
struct Panel : Panels<Policy, 2 * ACCUMULATORS> {
    using Base = Panels<Policy, 2 * ACCUMULATORS>;
    using Element = typename Policy::Element;
    using Unit = typename Policy::Unit;
    static constexpr int PER_UNIT = Policy::PER_UNIT;
    static constexpr int64_t BLOCK = 256, PITCH = BLOCK + 16;  // units of a weight row at a time
    static constexpr int64_t UNIT_BITS = PER_UNIT * (BITS ? BITS : 8 * sizeof(Element));
    static constexpr int64_t LINE = 512 / UNIT_BITS;  // units of a cache line

    // Rows of the weight, widened: w[row][PITCH]. `next` is the address of the rows that follow, or null.
    struct Block {
        const Unit *w;
        const char *next;
        int64_t units, row_bytes;

        Block skip(int64_t rows) const {
            return {w + rows * PITCH, next ? next + rows * row_bytes : next, units, row_bytes};
        }
    };

    // tile[ROWS][VECTORS] += w[ROWS, units] · x[units, VECTORS]
    template <int ROWS, int VECTORS>
    static void multiply_block(const Block &block, const float *x, int64_t panel_floats, float *tile, int64_t lanes) {
        const char *next = block.next;
        VF acc[ROWS][VECTORS];  // in registers, if every loop over them is unrolled
#pragma GCC unroll 24
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) acc[r][v] = load(tile + r * lanes + v * W);
        }
        for (int64_t line = 0; line < block.units; line += LINE) {
            const int64_t end = block.units - line < LINE ? block.units : line + LINE;
            for (int64_t u = line; u < end; ++u) {
                // One cache line of each row, spread over the LINE steps of the sums: a burst would delay the loads.
                for (int64_t r = u - line; r < ROWS && next; r += LINE) {
                    __builtin_prefetch(next + r * block.row_bytes, 0, 2);
                }
                VF lane[VECTORS];
                for (int v = 0; v < VECTORS; ++v) lane[v] = load(x + v * panel_floats + u * W);
#pragma GCC unroll 24
                for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
                    for (int v = 0; v < VECTORS; ++v) {
                        acc[r][v] = Policy::multiply(acc[r][v], block.w[r * PITCH + u], lane[v]);
                    }
                }
            }
            if (next) next += 64;
        }
#pragma GCC unroll 24
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) store(tile + r * lanes + v * W, acc[r][v]);
        }
    }

    // Uses the smallest instance with at least `rows`, at most ROWS; block and tile have room for more rows.
    template <int ROWS, int VECTORS>
    static void multiply_rows(int64_t rows, const Block &block, const float *x, int64_t panel_floats, float *tile,
                              int64_t lanes) {
        constexpr int STEP = 4 / VECTORS;
        if constexpr (ROWS > STEP) {
            if (rows <= ROWS - STEP) {
                return multiply_rows<ROWS - STEP, VECTORS>(rows, block, x, panel_floats, tile, lanes);
            }
        }
        multiply_block<ROWS, VECTORS>(block, x, panel_floats, tile, lanes);
    }

    // All panels, two at a time.
    static void multiply_panels(int64_t rows, Block block, const float *x, int64_t panel_floats, float *tile,
                                int64_t panels) {
        for (int64_t panel = 0; panel < panels; panel += 2) {
            if (panel + 1 == panels) {
                multiply_rows<ACCUMULATORS, 1>(rows, block, x, panel_floats, tile + panel * W, panels * W);
                return;
            }
            for (int64_t r = 0; r < rows; r += ACCUMULATORS / 2) {
                multiply_rows<ACCUMULATORS / 2, 2>(rows - r, block.skip(r), x, panel_floats,
                                                   tile + (r * panels + panel) * W, panels * W);
            }
            x += 2 * panel_floats;
            block.next = nullptr;
        }
    }

    // At most ACCUMULATORS rows.
    static void multiply_group(const Weight &weight, int64_t first, int64_t rows, const float *x, int64_t panels,
                               float *tile) {
        const int64_t units = Base::units(weight.depth), row_bytes = weight.stride * (BITS ? 1 : sizeof(Element));
        const int64_t blocks = (units + BLOCK - 1) / BLOCK, step = round_up((units + blocks - 1) / blocks, LINE);
        const char *w = static_cast<const char *>(weight.data) + first * row_bytes;
        alignas(64) Unit widened[ACCUMULATORS * PITCH];
        std::memset(widened + rows * PITCH, 0, (round_up(rows, 4) - rows) * PITCH * sizeof(Unit));
        std::memset(tile, 0, round_up(rows, 4) * panels * W * sizeof(float));
        for (int64_t begin = 0; begin < units; begin += step) {
            const int64_t end = units - begin < step ? units : begin + step;
            for (int64_t r = 0; r < rows; ++r) {
                if constexpr (BITS) {
                    unpack<BITS>(weight, first + r, begin * PER_UNIT, (end - begin) * PER_UNIT,
                                 reinterpret_cast<typename Policy::Value *>(widened + r * PITCH));
                } else {
                    widen(w + r * row_bytes, begin, end - begin, weight.depth, widened + r * PITCH);
                }
            }
            const char *next = end == units ? w + rows * row_bytes : w + end * UNIT_BITS / 8;
            multiply_panels(rows, {widened, next, end - begin, row_bytes}, x + begin * W,
                            Base::panel_floats(weight.depth), tile, panels);
        }
    }

    static void multiply(const Weight &weight, int64_t first, int64_t rows, const void *packed, int64_t M,
                         float *tile) {
        const int64_t panels = panels_of(M);
        for (int64_t r = 0; r < rows; r += ACCUMULATORS) {
            const int64_t count = rows - r < ACCUMULATORS ? rows - r : ACCUMULATORS;
            multiply_group(weight, first + r, count, static_cast<const float *>(packed), panels, tile + r * panels * W);
        }
    }

    // Units [begin : begin + count] of a row; elements after its end are zero.
    static void widen(const char *row, int64_t begin, int64_t count, int64_t depth, Unit *to) {
        const Element *w = reinterpret_cast<const Element *>(row) + begin * PER_UNIT;
        const int64_t elements = depth - begin * PER_UNIT;
        for (int64_t u = 0; u < count; u += W) {
            write(to + u, Policy::load(w + u * PER_UNIT, elements - u * PER_UNIT));
        }
    }

    static constexpr Kernel kernel = {
        ACCUMULATORS, Base::CHUNK,      W,       Base::packed_bytes, Base::pack,  multiply,
        Base::adjust, Base::put_packed, nullptr, Base::put_output,   Base::place, Base::gate};
};

}  // namespace
}  // namespace grasp

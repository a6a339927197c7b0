// Few rows of x (M ≤ 8): each row of the weight is read once, from start to end, and multiplied with all rows of x.
#pragma once

#include "activation.h"
#include "kernel.h"
#include "vector.h"

namespace grasp {
namespace {

// How STEP elements of the weight and of packed x are multiplied: one type per dtype, and more for instruction sets
// with faster instructions. `Packed` is the element type of packed x, PACKED the number of elements in a step.
template <class T>
struct Widen {
    using Element = T;
    using Packed = float;
    using Loaded = VF;
    static constexpr int STEP = W;
    static Loaded load(const T *w) { return grasp::load(w); }
    static Loaded load_part(const T *w, int64_t n) { return grasp::load_part(w, n); }
    static VF multiply(VF acc, Loaded w, const float *x) { return multiply_add(w, grasp::load(x), acc); }
    static void pack(const T *x, float *packed) { store(packed, grasp::load(x)); }
    static void put(float *packed, int64_t index, float value) { packed[index] = value; }
};

// bfloat16 is the upper half of a float: one operation each turns a vector of pairs into two vectors of floats. A
// packed step has its elements of even index first.
struct SplitPairs {
    using Element = BF16;
    using Packed = float;
    struct Loaded {
        VF even, odd;
    };
    static constexpr int STEP = 2 * W;
    static Loaded split(VU pairs) { return {bits_to_float(pairs << 16), bits_to_float(pairs & 0xffff0000)}; }
    static Loaded load(const BF16 *w) { return split(read<VU>(w)); }
    static Loaded load_part(const BF16 *w, int64_t n) { return split(read_part<VU>(w, n * sizeof(BF16))); }
    static VF multiply(VF acc, Loaded w, const float *x) {
        acc = multiply_add(w.even, grasp::load(x), acc);
        return multiply_add(w.odd, grasp::load(x + W), acc);
    }
    static void pack(const BF16 *x, float *packed) {
        const Loaded split = load(x);
        store(packed, split.even);
        store(packed + W, split.odd);
    }
    static void put(float *packed, int64_t index, float value) {
        packed[index / STEP * STEP + index % 2 * W + index % STEP / 2] = value;
    }
};

template <class Policy>
struct Dot {
    using Element = typename Policy::Element;
    using Packed = typename Policy::Packed;
    using Loaded = typename Policy::Loaded;
    static constexpr int STEP = Policy::STEP;
    static constexpr int64_t CHUNK = 64;

    static int64_t packed_bytes(int64_t M, int64_t depth) { return M * round_up(depth, STEP) * sizeof(Packed); }

    static void pack(const grasp_input &x, int64_t begin, int64_t end, void *packed) {
        const int64_t stride = round_up(x.K, STEP), whole = end - (end - begin) % STEP;
        for (int64_t m = 0; m < x.M; ++m) {
            const Element *row = static_cast<const Element *>(x.data) + m * x.stride;
            Packed *out = static_cast<Packed *>(packed) + m * stride;
            for (int64_t k = begin; k < whole; k += STEP) Policy::pack(row + k, out + k);
            if (whole < end) {
                Element buffer[STEP] = {};
                std::memcpy(buffer, row + whole, (end - whole) * sizeof(Element));
                Policy::pack(buffer, out + whole);
            }
        }
    }

    // Rows of the weight that are read together, `pitch` rows apart, and the distance of the prefetch.
    struct Rows {
        const Element *first;
        int64_t stride, pitch, depth;
        int64_t distance;    // elements
        int64_t left, skip;  // `left` elements after `first`, the next read is `skip` elements farther on

        int64_t ahead(int64_t k) const { return k + distance < left ? distance : distance + skip; }
    };

    // The order in which a chunk is read. The processor's own prefetching stops at the end of each page. So the chunk
    // is divided into parts that are longer than a page, and rows of all parts are read together: that streams faster
    // than row after row. The prefetch distances, into the first-level cache, are the best that were measured.
    template <int ROWS>
    struct Order {
        static constexpr int64_t PAGE = 4096 / sizeof(Element), NEAR = 1536 / sizeof(Element),
                                 FAR = 3072 / sizeof(Element);
        const Element *first;
        int64_t stride, depth, part;  // rows
        bool side_by_side;

        Order(const Element *first, const Weight &weight, int64_t count)
            : first(first), stride(count > 1 ? weight.stride : weight.depth), depth(weight.depth), part(count / ROWS) {
            side_by_side = part * stride >= PAGE;
        }

        int64_t row(int64_t i) const { return side_by_side ? i : i * ROWS; }

        Rows rows(int64_t i) const {
            const Element *at = first + row(i) * stride;
            if (side_by_side) return {at, stride, part, depth, NEAR, (part - i) * stride, (ROWS - 1) * part * stride};
            const int64_t group = ROWS * stride;
            return {at, stride, 1, depth, (FAR + group - 1) / group * group, INT64_MAX, 0};
        }
    };

    // Products of ROWS rows of the weight with M rows of packed x, per lane: sums[m * CHUNK + row * pitch].
    template <int ROWS, int M>
    static void multiply_rows(const Rows &rows, const Packed *x, VF *sums) {
        const int64_t depth = rows.depth, x_stride = round_up(depth, STEP), whole = depth - depth % STEP;
        VF acc[ROWS][M] = {};
        const auto step = [&](int64_t k, auto load_step) {
            const int64_t ahead = rows.ahead(k);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                const Element *at = rows.first + r * rows.pitch * rows.stride + k;
                __builtin_prefetch(at + ahead, 0, 3);
                const Loaded loaded = load_step(at);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) acc[r][m] = Policy::multiply(acc[r][m], loaded, x + m * x_stride + k);
            }
        };
        for (int64_t k = 0; k < whole; k += STEP) step(k, [](const Element *at) { return Policy::load(at); });
        if (whole < depth) step(whole, [&](const Element *at) { return Policy::load_part(at, depth - whole); });
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) sums[m * CHUNK + r * rows.pitch] = acc[r][m];
        }
    }

    template <int M>
    static void multiply_all(const Weight &weight, int64_t first, int64_t count, const Packed *x, float *tile) {
        constexpr int ROWS = M <= W / 4 ? 4 : 2;  // as many sums as fit in registers
        const Element *w = static_cast<const Element *>(weight.data) + first * weight.stride;
        const Order<ROWS> order(w, weight, count);
        VF sums[M * CHUNK];
        for (int64_t i = 0; i < order.part; ++i) multiply_rows<ROWS, M>(order.rows(i), x, sums + order.row(i));
        const Order<1> rest(w, weight, count);
        for (int64_t r = order.part * ROWS; r < count; ++r) multiply_rows<1, M>(rest.rows(r), x, sums + r);
        for (int m = 0; m < M; ++m) {
            for (int64_t r = count; r % W; ++r) sums[m * CHUNK + r] = VF{};
            for (int64_t r = 0; r < count; r += W) store(tile + m * CHUNK + r, reduce(sums + m * CHUNK + r));
        }
    }

    static void multiply(const Weight &weight, int64_t first, int64_t rows, const void *packed, int64_t M,
                         float *tile) {
        const Packed *x = static_cast<const Packed *>(packed);
        switch (M) {
            case 1: return multiply_all<1>(weight, first, rows, x, tile);
            case 2: return multiply_all<2>(weight, first, rows, x, tile);
            case 3: return multiply_all<3>(weight, first, rows, x, tile);
            case 4: return multiply_all<4>(weight, first, rows, x, tile);
            case 5: return multiply_all<5>(weight, first, rows, x, tile);
            case 6: return multiply_all<6>(weight, first, rows, x, tile);
            case 7: return multiply_all<7>(weight, first, rows, x, tile);
            default: return multiply_all<8>(weight, first, rows, x, tile);
        }
    }

    static void adjust(float *tile, int64_t M, int64_t rows, const float *scale, const float *shift) {
        for (int64_t m = 0; m < M; ++m) {
            for (int64_t r = 0; r < rows; ++r) {
                float &value = tile[m * CHUNK + r];
                value = (scale ? value * scale[r] : value) + (shift ? shift[r] : 0.0f);
            }
        }
    }

    static void put_packed(const float *tile, int64_t M, int64_t first, int64_t rows, int64_t depth, void *packed) {
        const int64_t stride = round_up(depth, STEP);
        for (int64_t m = 0; m < M; ++m) {
            Packed *out = static_cast<Packed *>(packed) + m * stride;
            for (int64_t r = 0; r < rows; ++r) Policy::put(out, first + r, tile[m * CHUNK + r]);
            for (int64_t r = depth; first + rows == depth && r < stride; ++r) Policy::put(out, r, 0.0f);
        }
    }

    static void put_output(const float *tile, int64_t M, int64_t rows, void *y, int64_t y_stride) {
        for (int64_t m = 0; m < M; ++m) {
            Element *out = static_cast<Element *>(y) + m * y_stride;
            for (int64_t r = 0; r < rows; r += W) {
                const VF value = grasp::load(tile + m * CHUNK + r);
                if (rows - r < W) {
                    store_part(out + r, value, rows - r);
                } else {
                    store(out + r, value);
                }
            }
        }
    }

    static void gate(float *gate, const float *up, int64_t M, int64_t rows, grasp_activation activation) {
        for (int64_t m = 0; m < M; ++m) {
            gate_span(gate + m * CHUNK, up + m * CHUNK, round_up(rows, W), activation);
        }
    }

    static constexpr Kernel kernel = {1,      CHUNK,      0,          packed_bytes, pack, multiply,
                                      adjust, put_packed, put_output, nullptr,      gate};
};

}  // namespace
}  // namespace grasp

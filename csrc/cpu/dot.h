// Few rows of x (M ≤ 8): each row of the weight is read once, from start to end, and multiplied with all rows of x.
#pragma once

#include "activation.h"
#include "kernel.h"
#include "quantized.h"
#include "vector.h"

namespace grasp {
namespace {

// How STEP columns of the weight and of packed x are multiplied: one type per dtype and per number of bits, and more
// for instruction sets with faster instructions. `Packed` is the element type of packed x, PACKED the number of them in
// a step. The weight has PER_ELEMENT columns in an element.
template <class T>
struct Widen {
    using Element = T;
    using Packed = float;
    using Loaded = VF;
    static constexpr int STEP = W, PACKED = STEP, PER_ELEMENT = 1;
    static constexpr bool SEALS = false;
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
    static constexpr int STEP = 2 * W, PACKED = STEP, PER_ELEMENT = 1;
    static constexpr bool SEALS = false;
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

// The part that does not depend on the dtype of x. With SCALED the weight has scales for groups of columns.
template <class Policy>
struct Products {
    using Element = typename Policy::Element;
    using Packed = typename Policy::Packed;
    using Loaded = typename Policy::Loaded;
    static constexpr int STEP = Policy::STEP;
    static constexpr int64_t CHUNK = 64;

    // Elements of a packed row of x, and of the distance of two: an odd number of cache lines, so that equal columns of
    // all rows have places in the first-level cache at once.
    static int64_t packed_size(int64_t depth) { return (depth + STEP - 1) / STEP * Policy::PACKED; }
    static int64_t packed_stride(int64_t depth) {
        constexpr int64_t LINE = 64 / sizeof(Packed);
        return ((packed_size(depth) + LINE - 1) / LINE | 1) * LINE;
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
    // than row after row. The prefetch is into the second-level cache, which waits for more lines at once than the
    // first. Its distance is the best that was measured.
    template <int ROWS>
    struct Order {
        static constexpr int64_t PAGE = 4096 / sizeof(Element), AHEAD = 8192 / sizeof(Element);
        const Element *first;
        int64_t stride, depth, part;  // rows
        bool side_by_side;
        int64_t distance;

        Order(const Element *first, const Weight &weight, int64_t count)
            : first(first), stride(count > 1 ? weight.stride : weight.depth), depth(weight.depth), part(count / ROWS) {
            side_by_side = part * stride >= PAGE;
            distance = side_by_side ? AHEAD : round_up(AHEAD, ROWS * stride);
        }

        int64_t row(int64_t i) const { return side_by_side ? i : i * ROWS; }

        Rows rows(int64_t i) const {
            const Element *at = first + row(i) * stride;
            if (!side_by_side) return {at, stride, 1, depth, distance, INT64_MAX, 0};
            return {at, stride, part, depth, distance, (part - i) * stride, (ROWS - 1) * part * stride};
        }
    };

    // Products of ROWS rows of the weight with M rows of packed x, per lane: sums[m * CHUNK + row * pitch].
    template <int ROWS, int M, bool SCALED>
    static void multiply_rows(const Rows &rows, const Scales &scales, int64_t row, const Packed *x, VF *sums) {
        constexpr int64_t ELEMENTS = STEP / Policy::PER_ELEMENT;
        const int64_t x_stride = packed_stride(rows.depth);
        const int64_t size = (rows.depth + Policy::PER_ELEMENT - 1) / Policy::PER_ELEMENT;
        const int64_t span = SCALED ? scales.span() / Policy::PER_ELEMENT : size;
        VF acc[ROWS][M] = {}, of_groups[ROWS];
        int64_t begin = 0;  // of the span
        const auto step = [&](int64_t element, auto load_step) {
            const int64_t ahead = rows.ahead(element);
            const Packed *packed = x + element / ELEMENTS * Policy::PACKED;
            VI groups;
            if constexpr (SCALED) groups = scales.template groups<STEP>((element - begin) * Policy::PER_ELEMENT);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                const Element *at = rows.first + r * rows.pitch * rows.stride + element;
                __builtin_prefetch(at + ahead, 0, 2);
                Loaded loaded = load_step(at);
                if constexpr (SCALED) Policy::scale(loaded, permute(of_groups[r], groups));
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) acc[r][m] = Policy::multiply(acc[r][m], loaded, packed + m * x_stride);
            }
        };
        for (; begin < size; begin += span) {
            const int64_t end = size - begin < span ? size : begin + span, whole = end - (end - begin) % ELEMENTS;
            if constexpr (SCALED) scales.load(row, rows.pitch, begin * Policy::PER_ELEMENT, of_groups);
            for (int64_t i = begin; i < whole; i += ELEMENTS) {
                step(i, [](const Element *at) { return Policy::load(at); });
            }
            if (whole < end) step(whole, [&](const Element *at) { return Policy::load_part(at, end - whole); });
        }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) sums[m * CHUNK + r * rows.pitch] = acc[r][m];
        }
    }

    template <int M, bool SCALED>
    static void multiply_all(const Weight &weight, int64_t first, int64_t count, const Packed *x, float *tile) {
        constexpr int ROWS = M <= W / 4 ? 4 : W == 16 ? 3 : 2;  // as many sums as fit in registers
        const Element *w = static_cast<const Element *>(weight.data) + first * weight.stride;
        const Scales scales(weight, first);
        const Order<ROWS> order(w, weight, count);
        VF sums[M * CHUNK];
        for (int64_t i = 0; i < order.part; ++i) {
            multiply_rows<ROWS, M, SCALED>(order.rows(i), scales, order.row(i), x, sums + order.row(i));
        }
        const Order<1> rest(w, weight, count);
        for (int64_t r = order.part * ROWS; r < count; ++r) {
            multiply_rows<1, M, SCALED>(rest.rows(r), scales, r, x, sums + r);
        }
        for (int m = 0; m < M; ++m) {
            for (int64_t r = count; r % W; ++r) sums[m * CHUNK + r] = VF{};
            for (int64_t r = 0; r < count; r += W) store(tile + m * CHUNK + r, reduce(sums + m * CHUNK + r));
        }
    }

    template <bool SCALED>
    static void multiply_by_rows(const Weight &weight, int64_t first, int64_t rows, const Packed *x, int64_t M,
                                 float *tile) {
        switch (M) {
            case 1: return multiply_all<1, SCALED>(weight, first, rows, x, tile);
            case 2: return multiply_all<2, SCALED>(weight, first, rows, x, tile);
            case 3: return multiply_all<3, SCALED>(weight, first, rows, x, tile);
            case 4: return multiply_all<4, SCALED>(weight, first, rows, x, tile);
            case 5: return multiply_all<5, SCALED>(weight, first, rows, x, tile);
            case 6: return multiply_all<6, SCALED>(weight, first, rows, x, tile);
            case 7: return multiply_all<7, SCALED>(weight, first, rows, x, tile);
            default: return multiply_all<8, SCALED>(weight, first, rows, x, tile);
        }
    }

    static void multiply(const Weight &weight, int64_t first, int64_t rows, const void *packed, int64_t M,
                         float *tile) {
        const Packed *x = static_cast<const Packed *>(packed);
        if constexpr (std::is_same_v<Element, uint8_t>) {
            if (weight.group) return multiply_by_rows<true>(weight, first, rows, x, M, tile);
        }
        multiply_by_rows<false>(weight, first, rows, x, M, tile);
    }
};

// T is the dtype of x and y.
template <class T, class Policy>
struct Dot : Products<Policy> {
    using Base = Products<Policy>;
    using Packed = typename Policy::Packed;
    using Base::CHUNK, Base::STEP, Base::packed_size, Base::packed_stride;

    static int64_t packed_bytes(int64_t M, int64_t depth) { return M * packed_stride(depth) * sizeof(Packed); }

    static void pack(const grasp_input &x, int64_t begin, int64_t end, void *packed) {
        const int64_t whole = end - (end - begin) % STEP;
        for (int64_t m = 0; m < x.M; ++m) {
            const T *row = static_cast<const T *>(x.data) + m * x.stride;
            Packed *out = static_cast<Packed *>(packed) + m * packed_stride(x.K);
            for (int64_t k = begin; k < whole; k += STEP) Policy::pack(row + k, out + packed_size(k));
            if (whole < end) {
                T buffer[STEP] = {};
                std::memcpy(buffer, row + whole, (end - whole) * sizeof(T));
                Policy::pack(buffer, out + packed_size(whole));
            }
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
        for (int64_t m = 0; m < M; ++m) {
            Packed *out = static_cast<Packed *>(packed) + m * packed_stride(depth);
            for (int64_t r = 0; r < rows; ++r) Policy::put(out, first + r, tile[m * CHUNK + r]);
            for (int64_t r = depth; first + rows == depth && r < round_up(depth, STEP); ++r) Policy::put(out, r, 0.0f);
        }
    }

    static void seal(int64_t M, int64_t depth, void *packed) {
        for (int64_t m = 0; m < M; ++m) {
            Packed *row = static_cast<Packed *>(packed) + m * packed_stride(depth);
            for (int64_t i = 0; i < packed_size(depth); i += Policy::PACKED) Policy::seal(row + i);
        }
    }

    static void put_output(const float *tile, int64_t M, int64_t rows, void *y, int64_t y_stride) {
        for (int64_t m = 0; m < M; ++m) {
            T *out = static_cast<T *>(y) + m * y_stride;
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

    static constexpr decltype(Kernel::seal) seal_if_needed() {
        if constexpr (Policy::SEALS) return seal;
        return nullptr;
    }

    static constexpr Kernel kernel = {
        1,          CHUNK,   0,   packed_bytes, pack, Base::multiply, adjust, put_packed, seal_if_needed(),
        put_output, nullptr, gate};
};

}  // namespace
}  // namespace grasp

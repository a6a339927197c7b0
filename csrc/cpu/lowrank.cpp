// The two products of a low-rank linear, or of a group of them, in one parallel region: pack x, shrink, expand.
#include "lowrank.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "floats.h"
#include "isa.h"
#include "memory.h"
#include "team.h"

namespace grasp {
namespace {

constexpr int64_t CHUNK_BYTES = 256 << 10;   // of a weight, or one block of rows if that is larger
constexpr int64_t ROW_STEP = 4;              // kernels multiply four weight rows at once
constexpr int64_t SERIAL_BYTES = 256 << 10;  // of all weights; below, starting threads costs more than they save
constexpr int64_t PACK_FLOATS = 16 << 10;    // of x in a chunk

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_in_range(const int32_t *columns, int64_t count, int64_t size) {
    uint32_t bits = 0;  // the highest is set if a column is negative or too large
    for (int64_t i = 0; i < count; ++i) bits |= columns[i] | (static_cast<uint32_t>(size - 1) - columns[i]);
    return bits >> 31 == 0;
}

// Whether the columns are 0 … size - 1, each once. `seen` has a byte for each; stores to bytes do not wait for others.
bool is_permutation(const int32_t *columns, int64_t size, char *seen) {
    if (!is_in_range(columns, size, size)) return false;
    std::memset(seen, 0, size);
    for (int64_t i = 0; i < size; ++i) seen[columns[i]] = 1;
    return std::memchr(seen, 0, size) == nullptr;
}

// Whether the pivots ascend, and the other columns too.
bool ascends(const grasp_factors &group) {
    const int32_t *order = group.order;
    bool good = true;
    for (int64_t i = 1; i < group.R; ++i) good &= order[i - 1] < order[i];
    for (int64_t i = group.R + 1; i < group.N; ++i) good &= order[i - 1] < order[i];
    return good;
}

int64_t rows_of_U(const grasp_factors &group) { return group.order ? group.N - group.R : group.N; }

constexpr int KINDS = 3;  // of weights: of the dtype of x, of 4 bits and of 8 bits

int kind_of(int32_t bits) { return bits / 4; }

int64_t row_bytes(int32_t bits, int64_t depth, int32_t dtype) {
    return bits ? ceil_div(depth * bits, 8) : depth * element_size(dtype);
}

Weight to_weight(const void *data, int64_t stride, int64_t depth, const void *scales, int32_t dtype, int32_t group) {
    if (group == 0) return {data, stride, depth};
    return {data, stride, depth, scales, static_cast<grasp_dtype>(dtype), group, ceil_div(depth, group)};
}

// How the rows of a weight are divided into chunks.
struct Chunks {
    int64_t rows, per_chunk, count;

    Chunks(const Kernel &kernel, int64_t rows, int64_t row_bytes, int members) : rows(rows), per_chunk(1), count(0) {
        if (rows == 0) return;
        const int64_t most = std::min(std::max(CHUNK_BYTES / row_bytes, kernel.block), kernel.chunk);
        const int64_t even = ceil_div(ceil_div(rows, most), members) * members;  // the same number for each
        per_chunk = std::min(ceil_div(ceil_div(rows, even), ROW_STEP) * ROW_STEP, kernel.chunk);
        count = ceil_div(rows, per_chunk);
    }

    int64_t first(int64_t chunk) const { return chunk * per_chunk; }
    int64_t size(int64_t chunk) const { return std::min(per_chunk, rows - first(chunk)); }
};

// One group: its first chunks among the chunks of all groups, and its h. `pivots` has the tiles of h of pivoted
// factors, whose columns are written in their natural order then; null: each chunk writes its own columns.
struct Member {
    const grasp_factors *factors;
    Chunks shrink, expand;
    int64_t shrink_begin, expand_begin;
    char *h;
    float *pivots;
};

class Job {
  public:
    // `first_row`: the row of the outputs that belongs to the first row of x. `kernels`: one for each kind of weight.
    Job(const grasp_input &x, int64_t first_row, const Kernel *const *kernels, int members, int32_t activation)
        : x_(x),
          first_row_(first_row),
          tile_(*kernels[0]),
          kernels_(kernels),
          team_(members),
          activation_(activation) {}

    // Lay out memory for `count` groups; false if there is none.
    bool prepare(const grasp_factors *groups, int64_t count) {
        thread_local Arena arena;
        Layout size(nullptr);
        lay_out(size, groups, count);
        char *base = arena.get(size.used());
        if (base == nullptr) return false;
        Layout layout(base);
        lay_out(layout, groups, count);
        return true;
    }

    void run(grasp_parallel parallel) {
        if (team_ > 1) {
            parallel([](void *job) { static_cast<Job *>(job)->join(); }, this, team_, 0);
        } else {
            join();
        }
    }

  private:
    void lay_out(Layout &layout, const grasp_factors *groups, int64_t count) {
        Range *ranges = reinterpret_cast<Range *>(layout.take(4 * team_ * sizeof(Range)));
        members_ = reinterpret_cast<Member *>(layout.take(count * sizeof(Member)));
        count_ = count;
        pack_step_ = std::max(PACK_FLOATS / x_.M / PACK_STEP, int64_t{1}) * PACK_STEP;
        packed_bytes_ = 0;
        for (int kind = 0; kind < KINDS; ++kind) {
            const auto uses = [=](const grasp_factors &group) { return kind_of(group.Vh_bits) == kind; };
            offsets_[kind] = std::any_of(groups, groups + count, uses) ? packed_bytes_ : -1;
            if (offsets_[kind] >= 0) packed_bytes_ += aligned(kernels_[kind]->packed_bytes(x_.M, x_.K));
        }
        packed_x_ = layout.take(packed_bytes_ * (shares_x() ? 1 : team_));
        int64_t shrinks = 0, expands = 0;
        for (int64_t i = 0; i < count; ++i) {
            const grasp_factors &group = groups[i];
            const Kernel &of_Vh = *kernels_[kind_of(group.Vh_bits)], &of_U = *kernels_[kind_of(group.U_bits)];
            const Chunks shrink(of_Vh, group.R, row_bytes(group.Vh_bits, x_.K, x_.dtype), team_);
            const Chunks expand(of_U, rows_of_U(group), row_bytes(group.U_bits, group.R, x_.dtype), team_);
            char *h = layout.take(of_U.packed_bytes(x_.M, group.R));
            const bool merges = group.order && group.N > group.R && tile_.lanes > 0 && ascends(group);
            char *pivots = merges ? layout.take(group.R * tile_row() * sizeof(float)) : nullptr;
            if (members_) {
                new (members_ + i)
                    Member{&group, shrink, expand, shrinks, expands, h, reinterpret_cast<float *>(pivots)};
            }
            shrinks += shrink.count;
            expands += expand.count;
        }
        if (members_ == nullptr) return;
        pack_.prepare(ceil_div(x_.K, pack_step_), team_, ranges);
        shrink_.prepare(shrinks, team_, ranges + team_);
        expand_.prepare(gated() ? members_[0].expand.count : expands, team_, ranges + 2 * team_);
        const auto seals = [this](const Member &member) { return kernel_of_U(member).seal; };
        seal_.prepare(std::any_of(members_, members_ + count, seals) ? count : 0, team_, ranges + 3 * team_);
    }

    // Every thread packs a small x for itself: waiting for another thread and reading from its cache takes longer.
    bool shares_x() const { return x_.K > pack_step_; }

    // Floats of a weight row in a tile.
    int64_t tile_row() const { return ceil_div(x_.M, tile_.lanes) * tile_.lanes; }

    const Kernel &kernel_of_U(const Member &member) const { return *kernels_[kind_of(member.factors->U_bits)]; }

    bool gated() const { return activation_ >= 0; }

    void join() {
        const int self = joined_.fetch_add(1, std::memory_order_relaxed);
        if (self >= team_) return;
        const char *packed_x = pack(self);
        shrink_.work(self, [=](int64_t chunk) { shrink(chunk, packed_x); });
        seal_.work(self, [this](int64_t i) {
            const Member &member = members_[i];
            if (const auto seal = kernel_of_U(member).seal) seal(x_.M, member.factors->R, member.h);
        });
        expand_.work(self, [this](int64_t chunk) { expand(chunk); });
    }

    // The packed x of this thread.
    const char *pack(int self) {
        char *packed = packed_x_ + (shares_x() ? 0 : self * packed_bytes_);
        const auto pack_columns = [=](int64_t begin, int64_t end) {
            for (int kind = 0; kind < KINDS; ++kind) {
                if (offsets_[kind] >= 0) kernels_[kind]->pack(x_, begin, end, packed + offsets_[kind]);
            }
        };
        if (!shares_x()) {
            pack_columns(0, x_.K);
        } else {
            pack_.work(self, [=](int64_t chunk) {
                pack_columns(chunk * pack_step_, std::min((chunk + 1) * pack_step_, x_.K));
            });
        }
        return packed;
    }

    void shrink(int64_t chunk, const char *packed_x) {
        const Member &member = find(chunk, &Member::shrink_begin);
        const grasp_factors &group = *member.factors;
        chunk -= member.shrink_begin;
        const int64_t first = member.shrink.first(chunk), rows = member.shrink.size(chunk);
        alignas(64) float tile[TILE_FLOATS], buffer[TILE_FLOATS / MAX_ROWS];
        if (group.order) fetch(group.order + first, rows);
        const int kind = kind_of(group.Vh_bits);
        const Weight Vh =
            to_weight(group.Vh, group.Vh_stride, x_.K, group.Vh_scales, group.scales_dtype, group.Vh_group);
        kernels_[kind]->multiply(Vh, first, rows, packed_x + offsets_[kind], x_.M, tile);
        const float *s = group.Vh_bits ? row_scales(group, group.Vh_scales, group.Vh_group, first, rows, buffer)
                                       : to_floats(group.s, group.s_dtype, first, rows, buffer);
        if (s) tile_.adjust(tile, x_.M, rows, s, nullptr);
        if (member.expand.count) kernel_of_U(member).put_packed(tile, x_.M, first, rows, group.R, member.h);
        if (member.pivots) {
            std::memcpy(member.pivots + first * tile_row(), tile, rows * tile_row() * sizeof(float));
        } else if (group.order) {
            scatter(group, tile, rows, group.order + first);
        }
    }

    void expand(int64_t chunk) {
        const Member &member = find(chunk, &Member::expand_begin);
        const grasp_factors &group = *member.factors;
        chunk -= member.expand_begin;
        const int64_t first = member.expand.first(chunk), rows = member.expand.size(chunk);
        alignas(64) float tile[TILE_FLOATS];
        if (group.order) fetch(group.order + group.R + first, rows);
        multiply_h(member, first, rows, tile);
        if (member.pivots) return merge(member, tile, first, rows);
        if (group.order) return scatter(group, tile, rows, group.order + group.R + first);
        if (gated()) {
            alignas(64) float up[TILE_FLOATS];
            multiply_h(members_[1], first, rows, up);
            tile_.gate(tile, up, x_.M, rows, static_cast<grasp_activation>(activation_));
        }
        put(group, tile, rows, first);
    }

    // tile → y[:, column : column + rows].
    void put(const grasp_factors &group, const float *tile, int64_t rows, int64_t column) const {
        char *y = static_cast<char *>(group.y) + (first_row_ * group.y_stride + column) * element_size(x_.dtype);
        tile_.put_output(tile, x_.M, rows, y, group.y_stride);
    }

    // The tile of rows [first : first + rows] of U, and the pivots between their columns, + bias → y.
    void merge(const Member &member, const float *tile, int64_t first, int64_t rows) const {
        const grasp_factors &group = *member.factors;
        const int32_t *other = group.order + group.R + first, *others_end = other + rows;
        const int64_t end = first + rows < member.expand.rows ? *others_end : group.N;
        int64_t column = first == 0 ? 0 : *other;
        const int32_t *pivots_end = group.order + group.R, *pivot = std::lower_bound(group.order, pivots_end, column);
        for (int64_t count; column < end; column += count) {
            count = std::min(tile_.chunk, end - column);
            alignas(64) float merged[TILE_FLOATS];
            float buffer[TILE_FLOATS / MAX_ROWS];
            const auto place = [&](const int32_t *&begin, const int32_t *stop, const float *from) {
                const int32_t *next = std::lower_bound(begin, std::min(stop, begin + count), column + count);
                tile_.place(from, x_.M, next - begin, begin, column, merged);
                begin = next;
            };
            place(other, others_end, tile + (other - others_end + rows) * tile_row());
            place(pivot, pivots_end, member.pivots + (pivot - group.order) * tile_row());
            if (const float *bias = to_floats(group.bias, x_.dtype, column, count, buffer)) {
                tile_.adjust(merged, x_.M, count, nullptr, bias);
            }
            put(group, merged, count, column);
        }
    }

    void multiply_h(const Member &member, int64_t first, int64_t rows, float *tile) {
        const grasp_factors &group = *member.factors;
        float scales[TILE_FLOATS / MAX_ROWS], buffer[TILE_FLOATS / MAX_ROWS];
        const Weight U = to_weight(group.U, group.U_stride, group.R, group.U_scales, group.scales_dtype, group.U_group);
        kernel_of_U(member).multiply(U, first, rows, member.h, x_.M, tile);
        const float *scale = row_scales(group, group.U_scales, group.U_group, first, rows, scales);
        const float *bias = group.order ? nullptr : to_floats(group.bias, x_.dtype, first, rows, buffer);
        if (scale || bias) tile_.adjust(tile, x_.M, rows, scale, bias);
    }

    // The scales of rows that have one each; else null.
    static const float *row_scales(const grasp_factors &group, const void *scales, int32_t columns, int64_t first,
                                   int64_t rows, float *buffer) {
        return columns ? nullptr : to_floats(scales, group.scales_dtype, first, rows, buffer);
    }

    static void fetch(const int32_t *columns, int64_t rows) {
        for (int64_t r = 0; r < rows; r += 16) __builtin_prefetch(columns + r);
    }

    // tile + bias → y[:, columns], of pivoted factors.
    void scatter(const grasp_factors &group, float *tile, int64_t rows, const int32_t *columns) {
        alignas(64) char block[TILE_FLOATS * sizeof(float)];  // [M, rows]
        float buffer[TILE_FLOATS / MAX_ROWS];
        for (int64_t r = 0; r < rows && group.bias; ++r) to_floats(group.bias, x_.dtype, columns[r], 1, buffer + r);
        if (group.bias) tile_.adjust(tile, x_.M, rows, nullptr, buffer);
        tile_.put_output(tile, x_.M, rows, block, rows);
        if (x_.dtype == GRASP_F32) {
            scatter<float>(group, block, rows, columns);
        } else {
            scatter<uint16_t>(group, block, rows, columns);
        }
    }

    template <class Element>
    void scatter(const grasp_factors &group, const void *block, int64_t rows, const int32_t *columns) const {
        const Element *from = static_cast<const Element *>(block);
        Element *y = static_cast<Element *>(group.y) + first_row_ * group.y_stride;
        int64_t m = 0;
        for (; m + 4 <= x_.M; m += 4) {
            scatter_rows<4>(from + m * rows, rows, columns, y + m * group.y_stride, group.y_stride);
        }
        for (; m < x_.M; ++m) {
            scatter_rows<1>(from + m * rows, rows, columns, y + m * group.y_stride, group.y_stride);
        }
    }

    // from[ROWS, count] → to[:, columns]. Four rows at once read a column's number once.
    template <int ROWS, class Element>
    static void scatter_rows(const Element *from, int64_t count, const int32_t *columns, Element *to, int64_t stride) {
        for (int64_t i = 0; i < count; ++i) {
            Element *at = to + columns[i];
#pragma GCC unroll 4
            for (int m = 0; m < ROWS; ++m) at[m * stride] = from[m * count + i];
        }
    }

    const Member &find(int64_t chunk, int64_t Member::*begin) const {
        int64_t i = gated() && begin == &Member::expand_begin ? 0 : count_ - 1;
        while (members_[i].*begin > chunk) --i;
        return members_[i];
    }

    const grasp_input x_;
    const int64_t first_row_;
    const Kernel &tile_;            // whose functions for tiles are those of every kind
    const Kernel *const *kernels_;  // by kind
    const int team_;
    const int32_t activation_;  // or -1
    Member *members_ = nullptr;
    int64_t count_ = 0, pack_step_ = 0, packed_bytes_ = 0;
    int64_t offsets_[KINDS];  // of x packed for a kind of weight; -1: no Vh is of this kind
    char *packed_x_ = nullptr;
    Phase pack_, shrink_, seal_, expand_;
    std::atomic<int> joined_{0};
};

bool is_dtype(int32_t dtype) { return dtype == GRASP_F32 || dtype == GRASP_F16 || dtype == GRASP_BF16; }

bool is_good(const grasp_input &x) {
    return x.M >= 0 && x.K >= 1 && is_dtype(x.dtype) && (x.M == 0 || x.data) && (x.M <= 1 || x.stride >= 0);
}

bool is_good(int32_t bits, int64_t rows, const void *scales, int32_t group, int32_t scales_dtype,
             const grasp_input &x) {
    if (bits == 0) return !scales && group == 0;
    return (bits == 4 || bits == 8) && (scales || rows == 0) &&
           (group == 0 || group == 32 || group == 64 || group == 128) &&
           (scales_dtype == GRASP_F32 || scales_dtype == x.dtype);
}

int64_t least_stride(int32_t bits, int64_t depth) { return bits ? ceil_div(depth * bits, 8) : depth; }

bool is_good(const grasp_factors &group, const grasp_input &x, bool has_output) {
    const int64_t rows = rows_of_U(group);
    return (group.U || rows == 0) && group.Vh && group.N >= 1 && group.R >= 1 && rows >= 0 &&
           is_good(group.Vh_bits, group.R, group.Vh_scales, group.Vh_group, group.scales_dtype, x) &&
           is_good(group.U_bits, rows, group.U_scales, group.U_group, group.scales_dtype, x) &&
           (group.R == 1 || group.Vh_stride >= least_stride(group.Vh_bits, x.K)) &&
           (rows <= 1 || group.U_stride >= least_stride(group.U_bits, group.R)) &&
           (!(group.order || group.Vh_bits) || !group.s) &&
           (!group.s || group.s_dtype == GRASP_F32 || group.s_dtype == x.dtype) &&
           (!has_output || x.M == 0 || (group.y && (x.M == 1 || group.y_stride >= group.N)));
}

bool is_good(const grasp_cpu_options &options) {
    return options.threads >= 1 && options.isa >= GRASP_ISA_AUTO && options.isa <= GRASP_ISA_AMX;
}

// Whether the orders of pivoted factors are permutations.
grasp_status check_orders(const grasp_factors *groups, int64_t count) {
    thread_local Arena arena;
    for (int64_t i = 0; i < count; ++i) {
        if (!groups[i].order) continue;
        char *seen = arena.get(groups[i].N);
        if (!seen) return GRASP_OUT_OF_MEMORY;
        if (!is_permutation(groups[i].order, groups[i].N, seen)) return GRASP_BAD_ARGUMENT;
    }
    return GRASP_OK;
}

int64_t weight_bytes(const grasp_input &x, const grasp_factors *groups, int64_t count) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < count; ++i) {
        bytes += groups[i].R * row_bytes(groups[i].Vh_bits, x.K, x.dtype);
        bytes += rows_of_U(groups[i]) * row_bytes(groups[i].U_bits, groups[i].R, x.dtype);
    }
    return bytes;
}

grasp_status run(const grasp_input &x, const grasp_factors *groups, int64_t count, int32_t activation,
                 const grasp_cpu_options &options) {
    if (!grasp_cpu_supports(options.isa)) return GRASP_UNSUPPORTED;
    if (const grasp_status status = check_orders(groups, count)) return status;
    const bool serial = options.parallel == nullptr || weight_bytes(x, groups, count) < SERIAL_BYTES;
    for (int64_t m = 0; m < x.M; m += MAX_ROWS) {
        grasp_input slice = x;
        slice.data = static_cast<const char *>(x.data) + m * x.stride * element_size(x.dtype);
        slice.M = std::min(MAX_ROWS, x.M - m);
        const Kernel *kernels[KINDS];
        for (int bits = 0; bits <= 8; bits += 4) {
            kernels[kind_of(bits)] = find_kernel(options.isa, static_cast<grasp_dtype>(x.dtype), bits, slice.M);
        }
        Job job(slice, m, kernels, serial ? 1 : options.threads, activation);
        if (!job.prepare(groups, count)) return GRASP_OUT_OF_MEMORY;
        job.run(options.parallel);
    }
    return GRASP_OK;
}

}  // namespace
}  // namespace grasp

grasp_status grasp_cpu_lowrank_linear(const grasp_input *x, const grasp_factors *groups, int64_t count,
                                      const grasp_cpu_options *options) {
    using namespace grasp;
    if (!x || !groups || count < 1 || !options || !is_good(*x) || !is_good(*options)) return GRASP_BAD_ARGUMENT;
    for (int64_t i = 0; i < count; ++i) {
        if (!is_good(groups[i], *x, true)) return GRASP_BAD_ARGUMENT;
    }
    return run(*x, groups, count, -1, *options);
}

grasp_status grasp_cpu_lowrank_glu(const grasp_input *x, const grasp_factors *gate, const grasp_factors *up,
                                   int32_t activation, const grasp_cpu_options *options) {
    using namespace grasp;
    if (!x || !gate || !up || !options || !is_good(*x) || !is_good(*options)) return GRASP_BAD_ARGUMENT;
    if (activation < GRASP_SILU || activation > GRASP_RELU || gate->N != up->N) return GRASP_BAD_ARGUMENT;
    if (gate->order || up->order) return GRASP_BAD_ARGUMENT;
    if (!is_good(*gate, *x, true) || !is_good(*up, *x, false)) return GRASP_BAD_ARGUMENT;
    const grasp_factors both[] = {*gate, *up};
    return run(*x, both, 2, activation, *options);
}

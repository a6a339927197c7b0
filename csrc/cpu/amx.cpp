// bfloat16 with AMX: a tile holds 32 elements of 16 rows of the weight, in the layout that they have in memory.
#include "pairs.h"

namespace grasp {
namespace {

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// The compiler does not know which memory the tile instructions read and write.
inline void fence(void *p) { __asm__ volatile("" : : "r"(p) : "memory"); }

// Tiles 0 to 3 hold sums [weight row, lane], tiles 4 and 6 parts of the weight, tiles 5 and 7 parts of panels.
void configure(int64_t weight_rows) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
        config.row_bytes[tile] = 64;
        config.rows[tile] = tile == 5 || tile == 7 ? 16 : weight_rows;
    }
    fence(&config);
    _tile_loadconfig(&config);
}

// The weight has BITS per value, and is unpacked in blocks; 0: it is bfloat16 and is read where it is.
template <int BITS>
struct Amx : Panels<Pairs, 64> {
    using Base = Panels<Pairs, 64>;
    static constexpr int64_t ROWS = 16, DEPTH = 32, AHEAD = 4;  // a tile; tiles to fetch ahead
    static constexpr int64_t BLOCK = 512;                       // columns to unpack at a time

    // PANELS sums += weight[16, 32] · panel[32, 16] for each panel. With one panel, even and odd steps have separate
    // sums: a dependent instruction waits three times as long for its predecessor as an independent one.
    template <int PANELS, bool ODD>
    static void step(const void *w, int64_t w_bytes, const float *x, int64_t panel_floats) {
        if constexpr (PANELS == 1 && ODD) {
            _tile_loadd(6, w, w_bytes);
            _tile_loadd(7, x, 64);
            _tile_dpbf16ps(1, 6, 7);
        } else {
            _tile_loadd(4, w, w_bytes);
            _tile_loadd(5, x, 64);
            _tile_dpbf16ps(0, 4, 5);
            if constexpr (PANELS > 1) {
                _tile_loadd(7, x + panel_floats, 64);
                _tile_dpbf16ps(1, 4, 7);
            }
            if constexpr (PANELS > 2) {
                _tile_loadd(5, x + 2 * panel_floats, 64);
                _tile_dpbf16ps(2, 4, 5);
            }
            if constexpr (PANELS > 3) {
                _tile_loadd(7, x + 3 * panel_floats, 64);
                _tile_dpbf16ps(3, 4, 7);
            }
        }
    }

    static const BF16 *element(const char *p) { return reinterpret_cast<const BF16 *>(p); }

    // Prefetches the tile that is AHEAD of tile t; it may belong to the following rows.
    static void fetch_ahead(const char *w, int64_t w_bytes, int64_t rows, int64_t t, int64_t tiles) {
        t += AHEAD < tiles ? AHEAD : tiles;
        const char *at = t < tiles ? w + t * 64 : w + rows * w_bytes + (t - tiles) * 64;
        for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(at + r * w_bytes, 0, 2);
    }

    // The sums of all panels += w[rows, depth] · panels[depth].
    template <int PANELS>
    static void accumulate(const char *w, int64_t w_bytes, int64_t rows, int64_t depth, const float *x,
                           int64_t panel_floats) {
        const int64_t whole = depth / DEPTH, tiles = (depth + DEPTH - 1) / DEPTH;
        for (int64_t t = 0; t < whole; ++t) {
            const char *at = w + t * 64;
            if constexpr (BITS == 0) fetch_ahead(w, w_bytes, rows, t, tiles);
            if (t % 2) {
                step<PANELS, true>(at, w_bytes, x + t * 256, panel_floats);
            } else {
                step<PANELS, false>(at, w_bytes, x + t * 256, panel_floats);
            }
        }
        if (whole * DEPTH < depth) {
            fetch_ahead(w, w_bytes, rows, whole, tiles);
            VF rest[ROWS];
            for (int64_t r = 0; r < rows; ++r)
                rest[r] = Pairs::load(element(w + r * w_bytes) + whole * DEPTH, depth % DEPTH);
            fence(rest);
            step<PANELS, false>(rest, 64, x + whole * 256, panel_floats);
        }
    }

    template <int PANELS>
    static void multiply_rows(const Weight &weight, int64_t first, int64_t rows, const float *x, float *tile) {
        const int64_t depth = weight.depth, stride = Base::panel_floats(depth);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        if constexpr (BITS) {
            for (int64_t begin = 0; begin < depth; begin += BLOCK) {
                const int64_t columns = depth - begin < BLOCK ? round_up(depth - begin, DEPTH) : BLOCK;
                alignas(64) BF16 block[ROWS * BLOCK];
                for (int64_t r = 0; r < rows; ++r) unpack<BITS>(weight, first + r, begin, columns, block + r * BLOCK);
                fence(block);
                accumulate<PANELS>(reinterpret_cast<const char *>(block), BLOCK * sizeof(BF16), rows, columns,
                                   x + begin / DEPTH * 256, stride);
            }
        } else {
            const int64_t w_bytes = weight.stride * sizeof(BF16);
            accumulate<PANELS>(static_cast<const char *>(weight.data) + first * w_bytes, w_bytes, rows, depth, x,
                               stride);
        }
        put_sums<PANELS>(tile, rows);
    }

    template <int PANELS>
    static void put_sums(float *tile, int64_t rows) {
        constexpr int64_t LANES = PANELS * W;
        _tile_stored(0, tile, LANES * 4);
        if constexpr (PANELS == 1) {
            float odd[ROWS * LANES];
            _tile_stored(1, odd, LANES * 4);
            fence(tile);
            fence(odd);
            for (int64_t i = 0; i < rows * LANES; i += W) store(tile + i, load(tile + i) + load(odd + i));
        }
        if constexpr (PANELS > 1) _tile_stored(1, tile + W, LANES * 4);
        if constexpr (PANELS > 2) _tile_stored(2, tile + 2 * W, LANES * 4);
        if constexpr (PANELS > 3) _tile_stored(3, tile + 3 * W, LANES * 4);
        fence(tile);
    }

    static void multiply(const Weight &weight, int64_t first, int64_t rows, const void *packed, int64_t M,
                         float *tile) {
        constexpr decltype(&multiply_rows<1>) BY_PANELS[] = {multiply_rows<1>, multiply_rows<2>, multiply_rows<3>,
                                                             multiply_rows<4>};
        const int64_t panels = panels_of(M);
        int64_t configured = 0;
        for (int64_t r = 0; r < rows; r += ROWS) {
            const int64_t count = rows - r < ROWS ? rows - r : ROWS;
            if (count != configured) configure(configured = count);
            BY_PANELS[panels - 1](weight, first + r, count, static_cast<const float *>(packed), tile + r * panels * W);
        }
        _tile_release();
    }

    static constexpr Kernel kernel = {
        ROWS,         Base::CHUNK,      W,       Base::packed_bytes, Base::pack,  multiply,
        Base::adjust, Base::put_packed, nullptr, Base::put_output,   Base::place, Base::gate};
};

}  // namespace

const Kernel *amx_kernel(grasp_dtype dtype, int bits, int64_t) {
    if (dtype != GRASP_BF16) return nullptr;
    return bits == 8 ? &Amx<8>::kernel : bits == 4 ? &Amx<4>::kernel : &Amx<0>::kernel;
}

}  // namespace grasp

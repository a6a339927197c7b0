// A CUDA device on the CPU, for kernels of csrc/cuda: threads are fibers, blocks run in waves, launches in order.
//
// It is unkind where CUDA may be: a warp runs as far as it gets before the next one does, in an order that a seed
// gives; a kernel launched as a dependent runs as far as it gets before the one it depends on begins; shared memory
// starts as NaN; device memory may be touched only where the call's matrices are; and threads that wait for what cannot
// happen are a fault, not a hang.
#include "emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "grid.h"

using emulator::Grid;
using emulator::Region;
using emulator::settings;
using grasp_cuda::Chunk;

emulator::Settings emulator::settings;
std::string emulator::fault;

namespace {

constexpr size_t STACK = 64 << 10;

void report(const std::string &what) {
    if (emulator::fault.empty()) emulator::fault = what;
}

// --- blocks ----------------------------------------------------------------------------------------------------------

struct Warp {
    uint32_t crossings = 0;
    int arrived = 0;
    float slots[2][32][emulator::EXCHANGED];
};

// NaN, and some more of it behind to see whether that stays.
class Shared {
  public:
    Shared(int tag, size_t bytes) : tag(tag), bytes(bytes), chunks_(bytes / sizeof(Chunk) + GUARD) {
        for (Chunk &chunk : chunks_) chunk = NANS;
    }
    void *data() { return chunks_.data(); }
    bool intact() const {
        return std::all_of(chunks_.end() - GUARD, chunks_.end(),
                           [](const Chunk &chunk) { return std::memcmp(&chunk, &NANS, sizeof NANS) == 0; });
    }
    const int tag;
    const size_t bytes;

  private:
    static constexpr int GUARD = 512;  // chunks
    static constexpr Chunk NANS = {{0x7fc07fc0, 0x7fc07fc0, 0x7fc07fc0, 0x7fc07fc0}};
    std::vector<Chunk> chunks_;
};

struct Block {
    int index;
    uint32_t crossings = 0;
    int arrived = 0;
    std::vector<Warp> warps;
    std::vector<std::unique_ptr<Shared>> shared;
};

struct Fiber {
    Block *block;
    int thread;
    std::unique_ptr<char[]> stack;
    jmp_buf state;
    bool started = false, done = false;
    const uint32_t *awaited = nullptr;  // runs again when this word is no longer `seen`
    uint32_t seen = 0;
    bool polled = false;
    uint32_t poll = 0;  // what its last poll gave
};

Grid *grid = nullptr;  // running
Fiber *fiber = nullptr;
jmp_buf scheduler;

void yield_until(const uint32_t *word, uint32_t seen) {
    fiber->awaited = word;
    fiber->seen = seen;
    if (_setjmp(fiber->state) == 0) _longjmp(scheduler, 1);
}

void enter() {
    grid->kernel(grid->problem);
    fiber->done = true;
    _longjmp(scheduler, 1);
}

void resume(Fiber &next) {
    fiber = &next;
    if (_setjmp(scheduler) == 0) {
        if (next.started) _longjmp(next.state, 1);
        next.started = true;
        next.stack.reset(new char[STACK]);
        ucontext_t context;
        getcontext(&context);
        context.uc_stack.ss_sp = next.stack.get();
        context.uc_stack.ss_size = STACK;
        context.uc_link = nullptr;
        makecontext(&context, enter, 0);
        setcontext(&context);
    }
    if (fiber->done) fiber->stack.reset();
    fiber = nullptr;
}

std::vector<int> order(int count) {
    std::vector<int> places(count);
    std::iota(places.begin(), places.end(), 0);
    uint32_t state = settings.seed;
    if (state == 0) return places;
    for (int i = count - 1; i > 0; --i) {
        state = state * 1664525 + 1013904223;
        std::swap(places[i], places[(state >> 8) % (i + 1)]);
    }
    return places;
}

// Run blocks [first, last) together, as far as they get: true when all have ended.
class Wave {
  public:
    Wave(Grid &whole, int first, int last) : grid_(whole) {
        for (int b = first; b < last; ++b) {
            blocks_.emplace_back(new Block{b, 0, 0, std::vector<Warp>(whole.threads / 32), {}});
            for (int t = 0; t < whole.threads; ++t) {
                fibers_.emplace_back(new Fiber());
                fibers_.back()->block = blocks_.back().get();
                fibers_.back()->thread = t;
            }
        }
        warps_ = order(static_cast<int>(fibers_.size()) / 32);
    }

    bool run() {
        grid = &grid_;
        for (bool moved = true; moved;) {
            moved = false;
            for (const int warp : warps_) {
                while (advance(warp)) moved = true;
            }
        }
        grid = nullptr;
        for (const std::unique_ptr<Block> &block : blocks_) {
            for (const std::unique_ptr<Shared> &shared : block->shared) {
                if (!shared->intact()) report("a store is outside of shared memory");
            }
        }
        return std::all_of(fibers_.begin(), fibers_.end(), [](const auto &fiber) { return fiber->done; });
    }

  private:
    // Resume each lane of a warp that can go on; false where there is none.
    bool advance(int warp) {
        bool moved = false;
        for (const int lane : lanes_) {
            Fiber &next = *fibers_[32 * warp + lane];
            if (next.done || (next.awaited && *next.awaited == next.seen)) continue;
            next.awaited = nullptr;
            resume(next);
            moved = true;
        }
        return moved;
    }

    Grid &grid_;
    std::vector<std::unique_ptr<Block>> blocks_;
    std::vector<std::unique_ptr<Fiber>> fibers_;
    const std::vector<int> lanes_ = order(32);
    std::vector<int> warps_;
};

bool is_inside(const Region &region, const char *at, int64_t bytes) {
    const int64_t offset = at - region.begin;
    if (offset < 0) return false;
    const int64_t row = region.stride > 0 ? std::min(offset / region.stride, region.rows - 1) : 0;
    return offset - row * region.stride + bytes <= region.width;
}

bool may_touch(const void *at, size_t bytes, size_t alignment, bool writes) {
    if (reinterpret_cast<uintptr_t>(at) % alignment != 0) {
        report("a load of " + std::to_string(bytes) + " bytes is not aligned");
        return false;
    }
    for (const Region &region : grid->regions) {
        if ((region.writable || !writes) && is_inside(region, static_cast<const char *>(at), bytes)) return true;
    }
    report((writes ? "a store of " : "a load of ") + std::to_string(bytes) + " bytes is outside of the matrices");
    return false;
}

}  // namespace

void emulator::run(Grid &whole, std::unique_ptr<Grid> before) {
    const int room = settings.processors * settings.occupancy;
    for (int first = 0; first < whole.blocks; first += room) {
        Wave wave(whole, first, std::min(first + room, whole.blocks));
        bool ended = before ? wave.run() : false;
        if (before) run(*before, nullptr);
        before = nullptr;
        whole.released = 1;
        ended = ended || wave.run();
        if (!ended) return report("threads wait for what does not happen");
    }
}

// --- threads ---------------------------------------------------------------------------------------------------------

int emulator::thread_index() { return fiber->thread; }
int emulator::block_index() { return fiber->block->index; }
int emulator::block_count() { return grid->blocks; }

void *emulator::shared_memory(int tag, size_t bytes) {
    for (const std::unique_ptr<Shared> &shared : fiber->block->shared) {
        if (shared->tag == tag && shared->bytes == bytes) return shared->data();
    }
    fiber->block->shared.emplace_back(new Shared(tag, bytes));
    return fiber->block->shared.back()->data();
}

bool emulator::may_read(const void *from, size_t bytes, size_t alignment) {
    return may_touch(from, bytes, alignment, false);
}

bool emulator::may_write(const void *to, size_t bytes) { return may_touch(to, bytes, bytes, true); }

const float *emulator::exchange(const float *values, int count) {
    Warp &warp = fiber->block->warps[fiber->thread / 32];
    const uint32_t crossing = warp.crossings;
    float (&slots)[32][EXCHANGED] = warp.slots[crossing % 2];
    std::memcpy(slots[fiber->thread % 32], values, count * sizeof(float));
    if (++warp.arrived == 32) {
        warp.arrived = 0;
        ++warp.crossings;
    } else {
        yield_until(&warp.crossings, crossing);
    }
    return slots[0];
}

void emulator::sync_block() {
    Block &block = *fiber->block;
    const uint32_t crossing = block.crossings;
    if (++block.arrived == grid->threads) {
        block.arrived = 0;
        ++block.crossings;
    } else {
        yield_until(&block.crossings, crossing);
    }
}

void emulator::wait_for_dependency() {
    if (grid->dependent && !grid->released) yield_until(&grid->released, 0);
}

uint32_t emulator::add(uint32_t *word, uint32_t value) {
    if (word != grid->problem.barrier || !grid->cooperative) report("an atomic is not a cooperative launch's barrier");
    const uint32_t before = *word;
    *word += value;
    return before;
}

uint32_t emulator::poll(const uint32_t *word) {
    if (fiber->polled && fiber->poll == *word) yield_until(word, *word);
    fiber->polled = true;
    return fiber->poll = *word;
}

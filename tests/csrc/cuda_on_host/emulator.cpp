// A CUDA device on the CPU, for kernels of csrc/cuda: threads are fibers, blocks run in waves, launches in order.
//
// It is unkind where CUDA may be: a warp runs as far as it gets before the next one does, in an order that a seed
// gives; a kernel launched as a dependent runs as far as it gets before the one it depends on begins; shared memory
// starts as NaN; device memory may be touched only where the call's matrices are; and threads that wait for what cannot
// happen are a fault, not a hang.
#include "emulator.h"

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstring>
#include <iterator>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include <ucontext.h>

#include "cuda/variants.cuh"

using grasp_cuda::Chunk;
using grasp_cuda::Member;
using grasp_cuda::Problem;
using grasp_cuda::Variant;

namespace {

constexpr size_t STACK = 64 << 10;

struct Settings {
    int capability = 90, processors = 3, occupancy = 2;
    unsigned seed = 0;
    std::string failing;  // name of the CUDA function that fails
    int error = 0;
} settings;

std::string fault;  // the first one

void report(const std::string &what) {
    if (fault.empty()) fault = what;
}

// --- grids -----------------------------------------------------------------------------------------------------------

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

struct Region {
    const char *begin;
    int64_t rows, stride, width;  // bytes
    bool writable;
};

struct Grid {
    void (*kernel)(Problem);
    Problem problem;
    int blocks, threads;
    bool cooperative, dependent;
    std::vector<Region> regions;
    uint32_t released = 0;  // what it depends on has ended
};

struct Launch {
    int kind, blocks, attribute;  // kind: 0 shrink, 1 expand, 2 both
    const void *stream;
};

std::vector<Launch> launches;
std::unique_ptr<Grid> pending;  // launched, not yet run
Grid *grid = nullptr;           // running
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

void run(Grid &whole, std::unique_ptr<Grid> before) {
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

void flush() {
    if (pending) run(*pending, nullptr);
    pending = nullptr;
}

// --- what a launch may touch -----------------------------------------------------------------------------------------

struct Found {
    int kind, element_size;
};

Found find(const void *kernel) {
    const auto search = [&](const Variant *begin, const Variant *end) {
        for (const Variant *variant = begin; variant != end; ++variant) {
            const void *kernels[] = {variant->shrink, variant->expand, variant->cooperative};
            for (int kind = 0; kind < 3; ++kind) {
                if (kernels[kind] == kernel) return kind;
            }
        }
        return -1;
    };
    using namespace grasp_cuda;
    const int single = search(variants_f32, std::end(variants_f32));
    if (single >= 0) return {single, 4};
    const int half = search(variants_f16, std::end(variants_f16));
    return {half >= 0 ? half : search(variants_bf16, std::end(variants_bf16)), 2};
}

std::vector<Region> regions_of(const Problem &problem, const Found &found) {
    std::vector<Region> regions;
    const auto add = [&](const void *begin, int64_t rows, int64_t stride, int64_t width, int64_t size, bool writable) {
        if (begin) regions.push_back({static_cast<const char *>(begin), rows, stride * size, width * size, writable});
    };
    const int64_t size = found.element_size;
    const bool shrinks = found.kind != 1, expands = found.kind != 0;
    if (shrinks) add(problem.x, problem.M, problem.x_stride, problem.K, size, false);
    add(problem.hidden, 1, 0, int64_t{problem.splits} * problem.M * 16 * problem.rank_tiles, 4, shrinks);
    for (int i = 0; i < problem.count; ++i) {
        const Member &member = problem.members[i];
        if (shrinks) add(member.Vh, member.R, member.Vh_stride, problem.K, size, false);
        if (!expands) continue;
        add(member.U, member.N, member.U_stride, member.R, size, false);
        add(member.s, 1, 0, member.R, member.s_is_float ? 4 : size, false);
        add(member.bias, 1, 0, member.N, size, false);
        add(member.y, problem.M, member.y_stride, member.N, size, true);
    }
    return regions;
}

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

cudaError_t fails(const char *function) {
    return settings.failing == function ? static_cast<cudaError_t>(settings.error) : cudaSuccess;
}

}  // namespace

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

// --- the runtime -----------------------------------------------------------------------------------------------------

cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return fails("cudaGetDevice");
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = settings.processors; break;
        case cudaDevAttrComputeCapabilityMajor: *value = settings.capability / 10; break;
        case cudaDevAttrComputeCapabilityMinor: *value = settings.capability % 10; break;
    }
    return fails("cudaDeviceGetAttribute");
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *, const void *kernel) {
    return find(kernel).kind < 0 ? cudaErrorInvalidConfiguration : fails("cudaFuncGetAttributes");
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *, int, size_t) {
    *blocks = settings.occupancy;
    return fails("cudaOccupancyMaxActiveBlocksPerMultiprocessor");
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **arguments) {
    if (const cudaError_t error = fails("cudaLaunchKernelExC")) return error;
    const Problem &problem = *static_cast<const Problem *>(arguments[0]);
    const Found found = find(kernel);
    const int attribute = config->numAttrs ? config->attrs[0].id : cudaLaunchAttributeIgnore;
    const int blocks = static_cast<int>(config->gridDim.x), threads = static_cast<int>(config->blockDim.x);
    const bool cooperative = attribute == cudaLaunchAttributeCooperative && config->attrs[0].val.cooperative;
    const bool dependent = attribute == cudaLaunchAttributeProgrammaticStreamSerialization &&
                           config->attrs[0].val.programmaticStreamSerializationAllowed;
    if (blocks < 1 || found.kind < 0) return cudaErrorInvalidConfiguration;
    if (cooperative && blocks > settings.processors * settings.occupancy) return cudaErrorCooperativeLaunchTooLarge;
    launches.push_back({found.kind, blocks, attribute, config->stream});
    const auto function = reinterpret_cast<void (*)(Problem)>(const_cast<void *>(kernel));
    std::unique_ptr<Grid> next(
        new Grid{function, problem, blocks, threads, cooperative, dependent, regions_of(problem, found)});
    if (dependent && pending) {
        run(*next, std::move(pending));
    } else {
        flush();
        pending = std::move(next);
    }
    return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char *cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaErrorNoDevice: return "cudaErrorNoDevice";
        case cudaErrorCooperativeLaunchTooLarge: return "cudaErrorCooperativeLaunchTooLarge";
        default: return "cudaErrorInvalidConfiguration";
    }
}

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaErrorNoDevice: return "no device";
        case cudaErrorCooperativeLaunchTooLarge: return "too many blocks";
        default: return "a grid that cannot be";
    }
}

// --- for the tests ---------------------------------------------------------------------------------------------------

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void emulator_set(int capability, int processors, int occupancy, unsigned seed, const char *failing, int error) {
    settings = {capability, processors, occupancy, seed, failing, error};
    launches.clear();
    fault.clear();
    pending = nullptr;
}

// Run what was launched; gives the first fault, or an empty string.
EXPORT const char *emulator_finish() {
    flush();
    return fault.c_str();
}

// Fill (kind, blocks, attribute, stream) of each launch since `emulator_set`; gives their number.
EXPORT int emulator_launches(int64_t (*records)[4], int most) {
    for (int i = 0; i < most && i < static_cast<int>(launches.size()); ++i) {
        const Launch &launch = launches[i];
        const int64_t record[] = {launch.kind, launch.blocks, launch.attribute,
                                  static_cast<int64_t>(reinterpret_cast<uintptr_t>(launch.stream))};
        std::memcpy(records[i], record, sizeof record);
    }
    return static_cast<int>(launches.size());
}

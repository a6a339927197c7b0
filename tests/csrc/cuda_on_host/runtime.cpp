// The CUDA runtime of the emulated device, and what the tests set and read.
#include "cuda_runtime.h"

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuda/variants.cuh"
#include "grid.h"

using emulator::Grid;
using emulator::Region;
using emulator::settings;
using grasp_cuda::Member;
using grasp_cuda::Problem;
using grasp_cuda::Variant;
using grasp_cuda::Weight;

namespace {

struct Launch {
    int kind, blocks, attribute;  // kind: 0 shrink, 1 expand, 2 both
    const void *stream;
};

std::vector<Launch> launches;
std::unique_ptr<Grid> pending;  // launched, not yet run

void flush() {
    if (pending) emulator::run(*pending, nullptr);
    pending = nullptr;
}

struct Found {
    int kind, element_size, bits;  // bits of a quantised weight, or 0
};

Found find(const void *kernel) {
    Found found = {-1, 0, 0};
    const auto search = [&](const auto &table, int element_size) {
        for (const Variant &variant : table) {
            const void *kernels[] = {variant.shrink, variant.expand, variant.cooperative};
            for (int kind = 0; kind < 3; ++kind) {
                if (kernels[kind] == kernel) found = {kind, element_size, variant.bits};
            }
        }
    };
    using namespace grasp_cuda;
    search(variants_f32, 4);
    search(variants_f16, 2), search(quantized_f16, 2);
    search(variants_bf16, 2), search(quantized_bf16, 2);
    return found;
}

std::vector<Region> regions_of(const Problem &problem, const Found &found) {
    std::vector<Region> regions;
    const auto add = [&](const void *begin, int64_t rows, int64_t stride, int64_t width, int64_t size, bool writable) {
        if (begin) regions.push_back({static_cast<const char *>(begin), rows, stride * size, width * size, writable});
    };
    const int64_t size = found.element_size;
    const auto add_weight = [&](const Weight &weight, int64_t columns) {
        const int64_t stored = found.bits ? (columns * found.bits + 7) / 8 : columns;
        add(weight.data, weight.rows, weight.stride, stored, found.bits ? 1 : size, false);
        const int64_t scales = int64_t{weight.rows} * (weight.groups ? weight.groups : 1);
        if (found.bits) add(weight.scales, 1, 0, scales, weight.scales_are_float ? 4 : size, false);
    };
    const bool shrinks = found.kind != 1, expands = found.kind != 0;
    if (shrinks) add(problem.x, problem.M, problem.x_stride, problem.K, size, false);
    add(problem.hidden, 1, 0, int64_t{problem.splits} * problem.M * 16 * problem.rank_tiles, 4, shrinks);
    for (int i = 0; i < problem.count; ++i) {
        const Member &member = problem.members[i];
        if (shrinks) add_weight(member.Vh, problem.K);
        if (!expands) continue;
        const int32_t *order = problem.orders[i];
        add_weight(member.U, member.R);
        add(member.s, 1, 0, member.R, member.s_is_float ? 4 : size, false);
        add(order, 1, 0, member.N, 4, false);
        add(member.bias, 1, 0, member.N, size, false);
        add(member.y, problem.M, member.y_stride, member.N, size, true);
    }
    return regions;
}

cudaError_t fails(const char *function) {
    return settings.failing == function ? static_cast<cudaError_t>(settings.error) : cudaSuccess;
}

}  // namespace

extern "C" {
__attribute__((visibility("default"))) int emulator_driver = 0;  // version; 0 is no driver
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = emulator_driver;
    return fails("cudaDriverGetVersion");
}

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
        emulator::run(*next, std::move(pending));
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
    emulator::fault.clear();
    pending = nullptr;
}

// Run what was launched; gives the first fault, or an empty string.
EXPORT const char *emulator_finish() {
    flush();
    return emulator::fault.c_str();
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

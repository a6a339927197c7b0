// The launcher: checks a call, lays out its tiles, and launches on the caller's stream.
#include "lowrank.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <iterator>

#include "cuda/variants.cuh"

namespace grasp_cuda {
namespace {

static_assert(MAX_ROWS == GRASP_CUDA_MAX_ROWS, "the header says how many rows the kernels serve");

constexpr int64_t MAX_SIZE = int64_t{1} << 27;  // of K, N and R, so that 32 bits count the columns of a group
constexpr int64_t MOST_SPLITS = MAX_SPLITS<1>, MOST_ROW_SPLITS = 8 * MAX_SPLITS<8>;  // the latter times rows
constexpr int OLDEST = 80, DEPENDENT_LAUNCH = 90;                                    // compute capabilities, times 10

static_assert(MAX_ROWS * MAX_SPLITS<MAX_ROWS> <= MOST_ROW_SPLITS, "the workspace has room for every variant");

thread_local char message[320] = "";

__attribute__((format(printf, 2, 3))) grasp_status fail(grasp_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return status;
}

// Reports an error of the runtime and clears it, so that the next call does not see it.
grasp_status cuda_failure(const char *call, cudaError_t error) {
    cudaGetLastError();
    return fail(GRASP_CUDA_ERROR, "%s: %s (%s)", call, cudaGetErrorString(error), cudaGetErrorName(error));
}

#define GRASP_TRY(EXPRESSION)                                        \
    do {                                                             \
        if (const grasp_status status = (EXPRESSION)) return status; \
    } while (false)

#define GRASP_TRY_CUDA(CALL, ...)                                                           \
    do {                                                                                    \
        if (const cudaError_t error = CALL(__VA_ARGS__)) return cuda_failure(#CALL, error); \
    } while (false)

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t padded(int64_t rank) { return ceil_div(rank, RANK_TILE) * RANK_TILE; }

// Bytes of h for the largest number of splits of any variant.
int64_t hidden_bytes(int64_t rows, int64_t columns) {
    return std::min(MOST_SPLITS * rows, MOST_ROW_SPLITS) * columns * 4;
}

int64_t element_size(int32_t dtype) { return dtype == GRASP_F32 ? 4 : 2; }

// --- the checks of a call --------------------------------------------------------------------------------------------

grasp_status check(const grasp_input &x) {
    if (x.M < 0 || x.M > MAX_ROWS) {
        return fail(GRASP_BAD_ARGUMENT, "x must have at most %d rows, got %lld", MAX_ROWS, static_cast<long long>(x.M));
    }
    if (x.K < 1 || x.K > MAX_SIZE || (x.M > 1 && x.stride < 0) || (x.M > 0 && x.data == nullptr)) {
        return fail(GRASP_BAD_ARGUMENT, "x must be [M, K] with 1 <= K <= 2^27, got K %lld, stride %lld, data %p",
                    static_cast<long long>(x.K), static_cast<long long>(x.stride), x.data);
    }
    if (x.dtype != GRASP_F32 && x.dtype != GRASP_F16 && x.dtype != GRASP_BF16) {
        return fail(GRASP_BAD_ARGUMENT, "dtype must be a grasp_dtype, got %d", x.dtype);
    }
    return GRASP_OK;
}

int64_t rows_of_U(const grasp_factors &group) { return group.order ? group.N - group.R : group.N; }

grasp_status check_storage(const char *name, int32_t bits, int32_t columns, const void *scales, int64_t rows,
                           const grasp_factors &group, const grasp_input &x) {
    if (bits == 0) return GRASP_OK;
    if (x.dtype == GRASP_F32) return fail(GRASP_UNSUPPORTED, "with quantised factors x must be in 16 bits");
    if ((bits != 8 && bits != 4) || (columns != 0 && columns != 32 && columns != 64 && columns != 128)) {
        return fail(GRASP_BAD_ARGUMENT,
                    "%s must have 8 or 4 bits and 0, 32, 64 or 128 columns per scale, got %d and %d", name, bits,
                    columns);
    }
    if ((!scales && rows > 0) || (group.scales_dtype != GRASP_F32 && group.scales_dtype != x.dtype)) {
        return fail(GRASP_BAD_ARGUMENT, "the scales of %s must be there, in float32 or dtype %d; got %p in %d", name,
                    x.dtype, scales, group.scales_dtype);
    }
    return GRASP_OK;
}

grasp_status check(const grasp_factors &group, const grasp_input &x) {
    if (group.N < 1 || group.N > MAX_SIZE || group.R < 1 || group.R > MAX_SIZE) {
        return fail(GRASP_BAD_ARGUMENT, "N and R must be between 1 and 2^27, got N %lld and R %lld",
                    static_cast<long long>(group.N), static_cast<long long>(group.R));
    }
    if ((!group.U && rows_of_U(group) > 0) || !group.Vh || (x.M > 0 && !group.y)) {
        return fail(GRASP_BAD_ARGUMENT, "U, Vh and y must not be null, got %p, %p, %p", group.U, group.Vh, group.y);
    }
    if (group.U_stride < 0 || group.Vh_stride < 0 || (x.M > 1 && group.y_stride < group.N)) {
        return fail(GRASP_BAD_ARGUMENT,
                    "strides must not be negative, nor that of y below N; got U %lld, Vh %lld, y %lld",
                    static_cast<long long>(group.U_stride), static_cast<long long>(group.Vh_stride),
                    static_cast<long long>(group.y_stride));
    }
    if (group.order && (group.s || group.N < group.R)) {
        return fail(GRASP_BAD_ARGUMENT, "with order, s must be null and N at least R, got s %p, N %lld and R %lld",
                    group.s, static_cast<long long>(group.N), static_cast<long long>(group.R));
    }
    if (group.s && group.s_dtype != GRASP_F32 && group.s_dtype != x.dtype) {
        return fail(GRASP_BAD_ARGUMENT, "s must be float32 or of dtype %d, got %d", x.dtype, group.s_dtype);
    }
    GRASP_TRY(check_storage("U", group.U_bits, group.U_group, group.U_scales, rows_of_U(group), group, x));
    GRASP_TRY(check_storage("Vh", group.Vh_bits, group.Vh_group, group.Vh_scales, group.R, group, x));
    if (group.Vh_bits && group.s) return fail(GRASP_BAD_ARGUMENT, "s must be null if Vh is quantised, got %p", group.s);
    return GRASP_OK;
}

grasp_status check(const grasp_cuda_options &options, int64_t workspace_bytes) {
    if (options.path < GRASP_CUDA_AUTO || options.path > GRASP_CUDA_COOPERATIVE || options.splits < 0) {
        return fail(GRASP_BAD_ARGUMENT, "path must be a grasp_cuda_path and splits at least 0, got %d and %d",
                    options.path, options.splits);
    }
    if (options.workspace == nullptr || reinterpret_cast<uintptr_t>(options.workspace) % 16 != 0 ||
        options.workspace_bytes < workspace_bytes) {
        return fail(GRASP_BAD_ARGUMENT, "the workspace must be aligned to 16 and have %lld bytes, got %lld at %p",
                    static_cast<long long>(workspace_bytes), static_cast<long long>(options.workspace_bytes),
                    options.workspace);
    }
    if (options.path == GRASP_CUDA_COOPERATIVE && options.barrier == nullptr) {
        return fail(GRASP_BAD_ARGUMENT, "the cooperative kernel needs a barrier, got null");
    }
    return GRASP_OK;
}

// --- the choice of the kernel ----------------------------------------------------------------------------------------

struct Variants {
    const Variant *begin, *end;
};

template <size_t SIZE>
Variants all(const Variant (&table)[SIZE]) {
    return {std::begin(table), std::end(table)};
}

Variants variants_of(int32_t dtype, bool quantized) {
    switch (dtype) {
        case GRASP_F32: return all(variants_f32);
        case GRASP_F16: return quantized ? all(quantized_f16) : all(variants_f16);
        default: return quantized ? all(quantized_bf16) : all(variants_bf16);
    }
}

const Variant &choose(int32_t dtype, int32_t bits, int64_t rows, bool aligned, bool pivoted) {
    const Variants all = variants_of(dtype, bits);
    return *std::find_if(all.begin, all.end, [&](const Variant &variant) {
        return variant.bits == bits && variant.rows >= rows && (aligned || !variant.vector) &&
               variant.pivoted == (bits || pivoted);
    });
}

// Whether rows start at multiples of what a lane loads, and their length is a multiple of it.
bool is_aligned(const void *data, int64_t rows, int64_t stride, int64_t columns, int32_t dtype, int32_t bits) {
    const int64_t load = bits ? 8 : 16, size = bits ? 1 : element_size(dtype);
    return reinterpret_cast<uintptr_t>(data) % load == 0 && columns * (bits ? bits : 8 * size) % (8 * load) == 0 &&
           (rows <= 1 || stride * size % load == 0);
}

// A group that one launch can run together with another.
bool stored_alike(const grasp_factors &a, const grasp_factors &b) {
    return a.U_bits == b.U_bits && a.Vh_bits == b.Vh_bits;
}

// --- the launches ----------------------------------------------------------------------------------------------------

struct Card {
    int capability, processors;
};

grasp_status read_card(Card &card) {
    int device = 0, major = 0, minor = 0;
    GRASP_TRY_CUDA(cudaGetDevice, &device);
    GRASP_TRY_CUDA(cudaDeviceGetAttribute, &major, cudaDevAttrComputeCapabilityMajor, device);
    GRASP_TRY_CUDA(cudaDeviceGetAttribute, &minor, cudaDevAttrComputeCapabilityMinor, device);
    GRASP_TRY_CUDA(cudaDeviceGetAttribute, &card.processors, cudaDevAttrMultiProcessorCount, device);
    card.capability = 10 * major + minor;
    if (card.capability < OLDEST) {
        return fail(GRASP_UNSUPPORTED, "this card has compute capability %d.%d, the kernels need 8.0", major, minor);
    }
    return GRASP_OK;
}

Weight weight(const void *data, int64_t stride, int64_t rows, int32_t columns_per_scale, int64_t columns,
              const void *scales, int32_t scales_dtype) {
    Weight weight = {data, stride, static_cast<int32_t>(rows), 0, 0, scales, scales_dtype == GRASP_F32};
    if (columns_per_scale == 0) return weight;
    weight.groups = static_cast<int32_t>(ceil_div(columns, columns_per_scale));
    while (1 << weight.shift < columns_per_scale) ++weight.shift;
    return weight;
}

// The members, their tiles, and the splits of K: as many as fill the card once with tiles of h.
Problem lay_out(const grasp_input &x, const grasp_factors *groups, int64_t count, const grasp_cuda_options &options,
                const Card &card, const Variant &shrink, const Variant &expand) {
    Problem problem = {};
    problem.x = x.data;
    problem.x_stride = x.M > 1 ? x.stride : 0;
    problem.hidden = static_cast<float *>(options.workspace);
    problem.barrier = options.barrier;
    problem.M = static_cast<int32_t>(x.M);
    problem.K = static_cast<int32_t>(x.K);
    problem.count = static_cast<int32_t>(count);
    for (int64_t i = 0; i < count; ++i) {
        const grasp_factors &group = groups[i];
        problem.members[i] = {
            weight(group.U, group.U_stride, rows_of_U(group), group.U_group, group.R, group.U_scales,
                   group.scales_dtype),
            weight(group.Vh, group.Vh_stride, group.R, group.Vh_group, x.K, group.Vh_scales, group.scales_dtype),
            group.s,
            group.bias,
            group.y,
            x.M > 1 ? group.y_stride : 0,
            static_cast<int32_t>(group.N),
            static_cast<int32_t>(group.R),
            problem.rank_tiles,
            problem.width_tiles,
            group.s_dtype == GRASP_F32};
        problem.orders[i] = group.order;
        problem.rank_tiles += static_cast<int32_t>(ceil_div(group.R, RANK_TILE));
        problem.width_tiles += static_cast<int32_t>(ceil_div(rows_of_U(group), WIDTH_TILE));
        if (group.order) problem.width_tiles += static_cast<int32_t>(ceil_div(group.R, WIDTH_TILE));
    }
    const int64_t granules = ceil_div(x.K, shrink.granule);
    const int64_t wanted = options.splits > 0 ? options.splits : ceil_div(card.processors, problem.rank_tiles);
    const int64_t most = std::min<int64_t>({MOST_SPLITS, expand.splits, granules});
    const int64_t length = ceil_div(granules, std::min(wanted, most));
    problem.length = static_cast<int32_t>(length * shrink.granule);
    problem.splits = static_cast<int32_t>(ceil_div(granules, length));
    return problem;
}

grasp_status launch(const char *what, const void *kernel, int64_t blocks, const Problem &problem, cudaStream_t stream,
                    cudaLaunchAttributeID property) {
    cudaLaunchAttribute attribute = {};
    attribute.id = property;
    if (property == cudaLaunchAttributeCooperative) attribute.val.cooperative = 1;
    if (property == cudaLaunchAttributeProgrammaticStreamSerialization) {
        attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(THREADS);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = property == cudaLaunchAttributeIgnore ? 0 : 1;
    void *arguments[] = {const_cast<Problem *>(&problem)};
    const cudaError_t error = cudaLaunchKernelExC(&config, kernel, arguments);
    return error ? cuda_failure(what, error) : GRASP_OK;
}

grasp_status launch_pair(const Variant &shrink, const Variant &expand, const Problem &problem, cudaStream_t stream,
                         bool dependent) {
    GRASP_TRY(launch("launch of lowrank_shrink_kernel", shrink.shrink, int64_t{problem.rank_tiles} * problem.splits,
                     problem, stream, cudaLaunchAttributeIgnore));
    return launch("launch of lowrank_expand_kernel", expand.expand, problem.width_tiles, problem, stream,
                  dependent ? cudaLaunchAttributeProgrammaticStreamSerialization : cudaLaunchAttributeIgnore);
}

// As many blocks as can run at once, because the barrier waits for all of them.
grasp_status launch_cooperative(const Variant &variant, const Problem &problem, cudaStream_t stream, const Card &card) {
    int occupancy = 0;
    GRASP_TRY_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor, &occupancy, variant.cooperative, THREADS, 0);
    const int64_t room = int64_t{occupancy} * card.processors;
    const int64_t tasks = std::max<int64_t>(int64_t{problem.rank_tiles} * problem.splits, problem.width_tiles);
    return launch("launch of lowrank_cooperative_kernel", variant.cooperative, std::min(tasks, room), problem, stream,
                  cudaLaunchAttributeCooperative);
}

// Up to MAX_MEMBERS groups that are stored alike.
grasp_status run(const grasp_input &x, const grasp_factors *groups, int64_t count, const grasp_cuda_options &options,
                 const Card &card) {
    const int32_t Vh_bits = groups->Vh_bits, U_bits = groups->U_bits;
    bool shrink_aligned = is_aligned(x.data, x.M, x.stride, x.K, x.dtype, 0), expand_aligned = true, pivoted = false;
    for (int64_t i = 0; i < count; ++i) {
        const grasp_factors &group = groups[i];
        shrink_aligned = shrink_aligned && is_aligned(group.Vh, group.R, group.Vh_stride, x.K, x.dtype, Vh_bits);
        expand_aligned =
            expand_aligned && (is_aligned(group.U, rows_of_U(group), group.U_stride, group.R, x.dtype, U_bits));
        pivoted = pivoted || group.order;
    }
    const bool cooperative = options.path == GRASP_CUDA_COOPERATIVE;
    if (cooperative) shrink_aligned = expand_aligned = shrink_aligned && expand_aligned;
    const Variant &shrink = choose(x.dtype, Vh_bits, x.M, shrink_aligned, pivoted);
    const Variant &expand = choose(x.dtype, U_bits, x.M, expand_aligned, pivoted);
    const Problem problem = lay_out(x, groups, count, options, card, shrink, expand);
    const cudaStream_t stream = static_cast<cudaStream_t>(options.stream);
    if (cooperative) return launch_cooperative(expand, problem, stream, card);
    const bool able = card.capability >= DEPENDENT_LAUNCH;
    return launch_pair(shrink, expand, problem, stream, able && options.path != GRASP_CUDA_PAIR);
}

}  // namespace
}  // namespace grasp_cuda

int64_t grasp_cuda_workspace_bytes(int64_t M, const int64_t *ranks, int64_t count) {
    int64_t columns = 0;
    for (int64_t i = 0; i < count; ++i) columns += grasp_cuda::padded(ranks[i]);
    return grasp_cuda::hidden_bytes(M, columns);
}

grasp_status grasp_cuda_load() {
    using namespace grasp_cuda;
    Card card;
    GRASP_TRY(read_card(card));
    for (const int32_t dtype : {GRASP_F32, GRASP_F16, GRASP_BF16}) {
        for (const bool quantized : {false, dtype != GRASP_F32}) {
            const Variants all = variants_of(dtype, quantized);
            for (const Variant *variant = all.begin; variant != all.end; ++variant) {
                for (const void *kernel : {variant->shrink, variant->expand, variant->cooperative}) {
                    cudaFuncAttributes attributes;
                    if (kernel) GRASP_TRY_CUDA(cudaFuncGetAttributes, &attributes, kernel);
                }
            }
        }
    }
    return GRASP_OK;
}

grasp_status grasp_cuda_lowrank_linear(const grasp_input *x, const grasp_factors *groups, int64_t count,
                                       const grasp_cuda_options *options) {
    using namespace grasp_cuda;
    if (!x || !groups || count < 1 || !options) return fail(GRASP_BAD_ARGUMENT, "x, groups and options must be there");
    GRASP_TRY(check(*x));
    int64_t columns = 0;
    for (int64_t i = 0; i < count; ++i) {
        GRASP_TRY(check(groups[i], *x));
        if (options->path == GRASP_CUDA_COOPERATIVE && (groups[i].U_bits || groups[i].Vh_bits)) {
            return fail(GRASP_UNSUPPORTED,
                        "the cooperative kernel takes no quantised factors, got U of %d and Vh of %d bits",
                        groups[i].U_bits, groups[i].Vh_bits);
        }
        columns += padded(groups[i].R);
    }
    if (x->M == 0) return GRASP_OK;
    GRASP_TRY(check(*options, hidden_bytes(x->M, columns)));
    Card card;
    GRASP_TRY(read_card(card));
    if (options->path == GRASP_CUDA_DEPENDENT && card.capability < DEPENDENT_LAUNCH) {
        return fail(GRASP_UNSUPPORTED, "dependent launches need compute capability 9.0, this card has %d.%d",
                    card.capability / 10, card.capability % 10);
    }
    for (int64_t first = 0, end; first < count; first = end) {
        for (end = first + 1; end < count && end - first < MAX_MEMBERS; ++end) {
            if (!stored_alike(groups[first], groups[end])) break;
        }
        GRASP_TRY(run(*x, groups + first, end - first, *options, card));
    }
    return GRASP_OK;
}

const char *grasp_cuda_message() { return grasp_cuda::message; }

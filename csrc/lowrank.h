/* Low-rank linear layers without a framework: y = ((x · Vhᵀ) ∘ s) · Uᵀ + bias, on raw pointers.
 *
 * With `order` the factors are pivoted: y[:, order] = [h, h · Uᵀ] + bias[order] with h = x · Vhᵀ, without s. U then has
 * N - R rows, which give the entries of y that h does not give. R may be N: U has no rows and may be null, and
 * the linear is dense with the weight Vh. `order` is a permutation of 0 … N - 1; many rows of x are fastest if its
 * first R entries ascend, and the others too. On the CPU anything else gives GRASP_BAD_ARGUMENT, and nothing is
 * written. On CUDA it is not checked: nothing is written for an entry outside of this range, and an output that no
 * entry names is left as it was.
 *
 * Vh and U, each or both, may be quantised to integers: weight[r, k] = value[r, k] * scales[r, k / group]. With 8 bits
 * a value is an int8_t. With 4 bits a byte holds two values between -8 and 7, each plus 8: value 2b in the low half of
 * byte b of a row, value 2b + 1 in its high half. The last high half of a row of odd depth has no meaning. The depth is
 * K for Vh and R for U. The last group of a row may be shorter. s is null if Vh is quantised.
 *
 * Matrices are row-major. A stride is the distance of two rows, in elements, or in bytes if the matrix is quantised;
 * the elements of a row are contiguous. x, y, bias and matrices that are not quantised have one dtype. Nothing outside
 * the shapes is read or written, and no pointer needs more alignment than its element.
 *
 * Sums are in float32. With AVX512_BF16 and at most 8 rows (of bf16 x 3 with 8 bits, and 4 with AMX), quantised factors
 * multiply x and h in fixed point instead: 15 bits, or 22 for float32, below the largest of each 64 or 128 neighbours.
 * An infinity in x then gives NaN.
 */
#ifndef GRASP_LOWRANK_H
#define GRASP_LOWRANK_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GRASP_EXPORT __attribute__((visibility("default")))

typedef enum { GRASP_F32 = 0, GRASP_F16 = 1, GRASP_BF16 = 2 } grasp_dtype;

/* The activation of a gated linear unit. GELU is x·Φ(x); GELU_TANH is its approximation by tanh. */
typedef enum { GRASP_SILU = 0, GRASP_GELU = 1, GRASP_GELU_TANH = 2, GRASP_RELU = 3 } grasp_activation;

typedef enum {
    GRASP_OK = 0,
    GRASP_BAD_ARGUMENT = 1,  /* a null pointer, an invalid size, stride or order, an unknown dtype or activation */
    GRASP_UNSUPPORTED = 2,   /* this processor, this card or this build does not support the call */
    GRASP_OUT_OF_MEMORY = 3, /* no memory for the intermediate h */
    GRASP_CUDA_ERROR = 4     /* a CUDA call failed */
} grasp_status;

typedef struct {
    const void *data; /* [M, K] */
    int64_t stride;
    int64_t M, K;
    int32_t dtype; /* grasp_dtype, of everything but s */
} grasp_input;

typedef struct {
    const void *U;    /* [N, R]; [N - R, R] with order */
    const void *Vh;   /* [R, K] */
    const void *s;    /* [R], or null if it is folded into the factors */
    const void *bias; /* [N], or null */
    void *y;          /* [M, N] */
    int64_t U_stride, Vh_stride, y_stride;
    int64_t N, R;
    int32_t s_dtype;       /* grasp_dtype: GRASP_F32 or that of the input */
    const int32_t *order;  /* [N], or null if the factors are not pivoted, as those of a GLU */
    const void *U_scales;  /* [rows of U, groups], contiguous, zero and negative ones too; null if U is not quantised or
                              has no rows */
    const void *Vh_scales; /* [R, groups], likewise */
    int32_t scales_dtype;  /* grasp_dtype of both: GRASP_F32 or that of the input */
    int32_t U_bits, Vh_bits;   /* 8 or 4; 0 if the matrix is not quantised */
    int32_t U_group, Vh_group; /* columns per scale: 32, 64 or 128; 0: one scale for each row */
} grasp_factors;

/* --- CPU ---------------------------------------------------------------------------------------------------------- */

/* Each set includes those before it. AUTO takes the best one for the call; others run or give GRASP_UNSUPPORTED. */
typedef enum {
    GRASP_ISA_AUTO = 0,
    GRASP_ISA_PORTABLE = 1,
    GRASP_ISA_AVX2 = 2, /* with FMA and F16C */
    GRASP_ISA_AVX512 = 3,
    GRASP_ISA_AVX512_BF16 = 4, /* with VNNI; differs from AVX512 for bfloat16 and for quantised factors only */
    GRASP_ISA_AMX = 5          /* differs from AVX512_BF16 for bfloat16 only */
} grasp_isa;

/* Calls body(context) on up to `threads` threads at once, including the caller, and returns when all are finished. It
 * may use fewer. GNU OpenMP's GOMP_parallel has this type and can be passed; flags are 0. */
typedef void (*grasp_parallel)(void (*body)(void *), void *context, unsigned threads, unsigned flags);

typedef struct {
    int32_t isa;             /* grasp_isa */
    int32_t threads;         /* at least 1 */
    grasp_parallel parallel; /* null: everything runs on the caller */
} grasp_cpu_options;

/* Whether this build has the instruction set and this processor runs it: 1 or 0. */
GRASP_EXPORT int grasp_cpu_supports(int32_t isa);

/* y of each of `count` groups from one x. Reentrant; the result does not depend on the number of threads. */
GRASP_EXPORT grasp_status grasp_cpu_lowrank_linear(const grasp_input *x, const grasp_factors *groups, int64_t count,
                                                   const grasp_cpu_options *options);

/* activation(gate) ∘ up, written to the y of the gate. Both have the same N; the y of `up` is ignored. */
GRASP_EXPORT grasp_status grasp_cpu_lowrank_glu(const grasp_input *x, const grasp_factors *gate,
                                                const grasp_factors *up, int32_t activation,
                                                const grasp_cpu_options *options);

/* --- CUDA --------------------------------------------------------------------------------------------------------- */

#define GRASP_CUDA_MAX_ROWS 16

typedef enum {
    GRASP_CUDA_AUTO = 0,       /* DEPENDENT if the card can, else PAIR */
    GRASP_CUDA_PAIR = 1,       /* two launches, one after the other */
    GRASP_CUDA_DEPENDENT = 2,  /* the second launch starts before the first ends; compute capability 9.0 and later */
    GRASP_CUDA_COOPERATIVE = 3 /* one launch with a grid barrier */
} grasp_cuda_path;

typedef struct {
    void *stream;            /* cudaStream_t of the current device; null: its default stream */
    void *workspace;         /* device memory, 16-byte aligned, not shared with a call that runs at the same time */
    int64_t workspace_bytes; /* at least grasp_cuda_workspace_bytes of the call */
    uint32_t *barrier; /* COOPERATIVE only: device memory, 0 before its first use, not written by others after it */
    int32_t path;      /* grasp_cuda_path */
    int32_t splits;    /* of K; 0, or more than the card has room for: as many as it has room for */
} grasp_cuda_options;

/* Bytes of workspace that suffice for x [M, K] and groups of these ranks on any card. */
GRASP_EXPORT int64_t grasp_cuda_workspace_bytes(int64_t M, const int64_t *ranks, int64_t count);

/* Loads the kernels onto the current device, so that a CUDA graph can capture a call before any has run.
 * GRASP_UNSUPPORTED below compute capability 8.0. */
GRASP_EXPORT grasp_status grasp_cuda_load(void);

/* y of each of `count` groups from one x of at most GRASP_CUDA_MAX_ROWS rows, all on the current device. Launches on
 * the stream and returns; neither allocates nor waits. Two runs agree bit for bit. */
GRASP_EXPORT grasp_status grasp_cuda_lowrank_linear(const grasp_input *x, const grasp_factors *groups, int64_t count,
                                                    const grasp_cuda_options *options);

/* The reason why the calling thread's last call failed: the bad and the expected argument, or the failed CUDA call. */
GRASP_EXPORT const char *grasp_cuda_message(void);

#ifdef __cplusplus
}
#endif

#endif

/* Low-rank linear layers without a framework: y = ((x · Vhᵀ) ∘ s) · Uᵀ + bias, on raw pointers.
 *
 * Matrices are row-major. Strides are those of rows, in elements; the elements of a row lie next to each other. U, Vh,
 * bias, x and y have one dtype; sums are taken in float32. Nothing is read or written beyond what the shapes say, and
 * no pointer needs an alignment beyond its element's.
 */
#ifndef GRASP_LOWRANK_H
#define GRASP_LOWRANK_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GRASP_EXPORT __attribute__((visibility("default")))

typedef enum { GRASP_F32 = 0, GRASP_F16 = 1, GRASP_BF16 = 2 } grasp_dtype;

/* Of a gated linear unit. GELU is x·Φ(x); GELU_TANH its approximation by tanh. */
typedef enum { GRASP_SILU = 0, GRASP_GELU = 1, GRASP_GELU_TANH = 2, GRASP_RELU = 3 } grasp_activation;

typedef enum {
    GRASP_OK = 0,
    GRASP_BAD_ARGUMENT = 1,  /* a null pointer, a size or stride that cannot be, an unknown dtype or activation */
    GRASP_UNSUPPORTED = 2,   /* this processor, or this build, lacks the instruction set */
    GRASP_OUT_OF_MEMORY = 3  /* for the intermediate h */
} grasp_status;

typedef struct {
    const void *data; /* [M, K] */
    int64_t stride;
    int64_t M, K;
    int32_t dtype; /* grasp_dtype, of everything but s */
} grasp_input;

typedef struct {
    const void *U;    /* [N, R] */
    const void *Vh;   /* [R, K] */
    const void *s;    /* [R], or null where it is folded into the factors */
    const void *bias; /* [N], or null */
    void *y;          /* [M, N] */
    int64_t U_stride, Vh_stride, y_stride;
    int64_t N, R;
    int32_t s_dtype; /* grasp_dtype: GRASP_F32 or that of the input */
} grasp_factors;

/* --- CPU ---------------------------------------------------------------------------------------------------------- */

/* Each includes those before it. AUTO takes the best for the call; the others run or give GRASP_UNSUPPORTED. */
typedef enum {
    GRASP_ISA_AUTO = 0,
    GRASP_ISA_PORTABLE = 1,
    GRASP_ISA_AVX2 = 2, /* with FMA and F16C */
    GRASP_ISA_AVX512 = 3,
    GRASP_ISA_AVX512_BF16 = 4, /* differs from AVX512 for bfloat16 only */
    GRASP_ISA_AMX = 5          /* differs from AVX512_BF16 for bfloat16 only */
} grasp_isa;

/* Calls body(context) on up to `threads` threads at once, the caller's among them, and returns when all are done. It
 * may use fewer. The type is that of GNU OpenMP's GOMP_parallel, which can be passed as it is; flags are 0. */
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

/* activation(gate) ∘ up, into the y of the gate. Both have one N; the y of `up` is not looked at. */
GRASP_EXPORT grasp_status grasp_cpu_lowrank_glu(const grasp_input *x, const grasp_factors *gate,
                                                const grasp_factors *up, int32_t activation,
                                                const grasp_cpu_options *options);

#ifdef __cplusplus
}
#endif

#endif

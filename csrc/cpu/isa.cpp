#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace grasp {
namespace {

#if defined(__x86_64__)
bool bit(unsigned word, int index) { return word >> index & 1; }

// AMX: the processor has it, and Linux grants this process its registers (arch_prctl ARCH_REQ_XCOMP_PERM).
bool has_amx() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !bit(d, 22) || !bit(d, 24)) return false;
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

// The set itself, not those that it includes.
bool has(int32_t isa) {
    __builtin_cpu_init();
    unsigned a = 0, b = 0, c = 0, d = 0;
    switch (isa) {
        case GRASP_ISA_PORTABLE: return true;
        case GRASP_ISA_AVX2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
                   bit(c, 29);  // F16C
        case GRASP_ISA_AVX512:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
        case GRASP_ISA_AVX512_BF16: return __get_cpuid_count(7, 1, &a, &b, &c, &d) && bit(a, 5);
        case GRASP_ISA_AMX: return has_amx();
        default: return false;
    }
}
#else
bool has(int32_t isa) { return isa == GRASP_ISA_PORTABLE; }
#endif

constexpr int64_t WIDENED_ROWS = 4;

using Finder = const Kernel *(*)(grasp_dtype, int64_t);

// What this build has, by grasp_isa.
constexpr Finder FINDERS[] = {
    nullptr,
    portable_kernel,
#if defined(GRASP_HAS_AVX2)
    avx2_kernel,
#else
    nullptr,
#endif
#if defined(GRASP_HAS_AVX512)
    avx512_kernel,
#else
    nullptr,
#endif
#if defined(GRASP_HAS_AVX512_BF16)
    avx512_bf16_kernel,
#else
    nullptr,
#endif
#if defined(GRASP_HAS_AMX)
    amx_kernel,
#else
    nullptr,
#endif
};

int32_t best_isa() {
    int32_t isa = GRASP_ISA_PORTABLE;
    while (isa < GRASP_ISA_AMX && FINDERS[isa + 1] && has(isa + 1)) ++isa;
    return isa;
}

}  // namespace

bool supports(int32_t isa) {
    static const int32_t best = best_isa();
    return isa >= GRASP_ISA_AUTO && isa <= best;
}

const Kernel *find_kernel(int32_t isa, grasp_dtype dtype, int64_t M) {
    if (isa == GRASP_ISA_AUTO) {
        // For few rows memory sets the pace, and widening bfloat16 is exact; the instructions made for it pay later.
        isa = dtype == GRASP_BF16 && M <= WIDENED_ROWS ? GRASP_ISA_AVX512 : GRASP_ISA_AMX;
        while (!supports(isa)) --isa;
    }
    const Kernel *kernel = nullptr;
    for (; !kernel; --isa) kernel = FINDERS[isa](dtype, M);
    return kernel;
}

}  // namespace grasp

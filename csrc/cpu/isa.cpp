#include "isa.h"

#include <algorithm>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace grasp {
namespace {

#if defined(__x86_64__)
struct Registers {
    unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
    Registers r;
    __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);  // zeros if there is no such leaf
    return r;
}

bool bits(unsigned word, std::initializer_list<int> wanted) {
    return std::all_of(wanted.begin(), wanted.end(), [word](int index) { return word >> index & 1; });
}

// Whether the operating system saves these parts of the registers when it switches threads.
bool system_keeps(std::initializer_list<int> parts) {
    if (!bits(cpuid(1, 0).c, {27})) return false;  // OSXSAVE
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return bits(low, parts);
}

// A process must request the tile registers from Linux (arch_prctl ARCH_REQ_XCOMP_PERM).
bool system_grants_tiles() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

// Only the set itself, not the sets that it includes. Names of bits: Intel's manual, under CPUID.
bool has(int32_t isa) {
    switch (isa) {
        case GRASP_ISA_PORTABLE: return true;
        case GRASP_ISA_AVX2:  // and FMA, F16C
            return system_keeps({1, 2}) && bits(cpuid(1, 0).c, {12, 28, 29}) && bits(cpuid(7, 0).b, {5});
        case GRASP_ISA_AVX512:  // F, DQ, BW, VL
            return system_keeps({1, 2, 5, 6, 7}) && bits(cpuid(7, 0).b, {16, 17, 30, 31});
        case GRASP_ISA_AVX512_BF16:  // and VNNI
            return bits(cpuid(7, 1).a, {5}) && bits(cpuid(7, 0).c, {11});
        case GRASP_ISA_AMX:  // BF16, TILE
            return bits(cpuid(7, 0).d, {22, 24}) && system_keeps({17, 18}) && system_grants_tiles();
        default: return false;
    }
}
#else
bool has(int32_t isa) { return isa == GRASP_ISA_PORTABLE; }
#endif

constexpr int64_t WIDENED_ROWS = 4;

using Finder = const Kernel *(*)(grasp_dtype, int, int64_t);

// The kernels of this build, by grasp_isa.
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

const Kernel *find_kernel(int32_t isa, grasp_dtype dtype, int bits, int64_t M) {
    if (isa == GRASP_ISA_AUTO) {
        // With few rows, memory bandwidth is the limit, and widening bfloat16 is exact; its special instructions help
        // only with more rows.
        isa = GRASP_ISA_AMX;
        if (dtype == GRASP_BF16 && M <= WIDENED_ROWS) isa = bits ? GRASP_ISA_AVX512_BF16 : GRASP_ISA_AVX512;
        while (!grasp_cpu_supports(isa)) --isa;
    }
    const Kernel *kernel = nullptr;
    for (; !kernel; --isa) kernel = FINDERS[isa](dtype, bits, M);
    return kernel;
}

}  // namespace grasp

int grasp_cpu_supports(int32_t isa) {
    static const int32_t best = grasp::best_isa();  // the processor is asked once
    return isa >= GRASP_ISA_AUTO && isa <= best;
}

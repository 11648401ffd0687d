/* cpu: asks CPUID what the CPU has, and XGETBV which registers the operating system saves. A bit of CPUID
 * alone is not enough: a system that does not save the registers would mix those of two programs. */
#include "cpu.h"

#include "dispatch.h"

#ifdef X86
#include <cpuid.h>

/* The register states that the system saves: bit 1 SSE, 2 AVX, 5 to 7 AVX-512. 0 where it cannot say. */
static unsigned saved_states(unsigned leaf_1_c) {
    unsigned low, high;
    if (!(leaf_1_c >> 27 & 1)) return 0; /* OSXSAVE: the instruction may be used */
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

/* Whether all bits of `mask` are in x. */
static int all(unsigned x, unsigned mask) { return (x & mask) == mask; }

/* From registers of CPUID, by leaf, and the saved states. */
static cpu_features features_of(unsigned c_1, unsigned b_7, unsigned c_7, unsigned a_7_1, unsigned states) {
    const unsigned FMA = 1u << 12, F16C = 1u << 29, AVX2 = 1u << 5, AVX_VNNI = 1u << 4, VNNI = 1u << 11;
    const unsigned F_DQ_BW_VL = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    const int avx2 = all(states, 0x06) && all(c_1, FMA | F16C) && all(b_7, AVX2);
    return (cpu_features){
        .avx2 = avx2,
        .avx512 = avx2 && all(states, 0xe6) && all(b_7, F_DQ_BW_VL) && all(c_7, VNNI),
        .avx_vnni = avx2 && all(a_7_1, AVX_VNNI),
    };
}

cpu_features cpu_has(void) {
    unsigned a, b, c, d, c_1, a_7_1;
    if (!__get_cpuid(1, &a, &b, &c_1, &d)) return (cpu_features){0};
    if (!__get_cpuid_count(7, 1, &a_7_1, &b, &c, &d)) a_7_1 = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return (cpu_features){0};
    return features_of(c_1, b, c, a_7_1, saved_states(c_1));
}
#else
cpu_features cpu_has(void) { return (cpu_features){0}; }
#endif

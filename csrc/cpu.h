/* cpu: what this CPU can run, and its operating system with it. A compiler's own word for that may be wrong:
 * zig's __builtin_cpu_supports is always 0. */
#ifndef NUMPY_LLAMA_CPU_H
#define NUMPY_LLAMA_CPU_H

typedef struct {
    int avx2;     /* with FMA and F16C */
    int avx512;   /* F, BW, DQ, VL and VNNI, beside avx2 */
    int avx_vnni; /* beside avx2 */
} cpu_features;

/* The features of this machine, 1 or 0 each. */
cpu_features cpu_has(void);

#endif

/* dispatch: the choice of an instruction set, once, when the module is loaded. It is the fastest that this
 * CPU and its operating system can run. All other files call through `chosen_kernels()`. */
#include "dispatch.h"

#include <stddef.h>
#include <string.h>

#include "cpu.h"

/* ISA has the functions for quantized activations, OTHER all else. */
#define TABLE(ISA, OTHER)                                                                                    \
    static const kernels ISA = {                                                                             \
        .name = #ISA,                                                                                        \
        .linear = linear_##OTHER,                                                                            \
        .linear_exact = linear_exact_##OTHER,                                                                \
        .linear_quantized = linear_quantized_##ISA,                                                          \
        .quantize_activations = quantize_activations_##ISA,                                                  \
        .round_activations = round_activations_##OTHER,                                                      \
        .restore_activations = restore_activations_##OTHER,                                                  \
        .pack_a = pack_a_##OTHER,                                                                            \
        .pack_b = pack_b_##OTHER,                                                                            \
        .multiply = multiply_##OTHER,                                                                        \
        .attention = attention_##OTHER,                                                                      \
        .attention_backward = attention_backward_##OTHER,                                                    \
        .norm = norm_##OTHER,                                                                                \
        .project = project_##OTHER,                                                                          \
        .update = update_##OTHER,                                                                            \
        .low_gradient = low_gradient_##OTHER,                                                                \
        .swiglu = swiglu_##OTHER,                                                                            \
        .store_head = store_head_##OTHER,                                                                    \
        .norm_backward = norm_backward_##OTHER,                                                              \
        .swiglu_backward = swiglu_backward_##OTHER,                                                          \
        .cross_entropy = cross_entropy_##OTHER,                                                              \
        .adamw = adamw_##OTHER,                                                                              \
        .squares = squares_##OTHER,                                                                          \
        .exp = exp_##OTHER,                                                                                  \
        .read = read_##OTHER,                                                                                \
        .fma = fma_##OTHER,                                                                                  \
    };
TABLE(scalar, scalar)
#ifdef X86
TABLE(avx2, avx2)
TABLE(avx512, avx512)
#endif
#ifdef ARM64
TABLE(neon, neon)
#endif
#ifdef HAS_AVX_VNNI
TABLE(avx_vnni, avx2)
#endif

/* The index-th table that can run here, fastest first. */
static const kernels *available(int index) {
#ifdef X86
    const cpu_features cpu = cpu_has();
    if (cpu.avx512 && index-- == 0) return &avx512;
#ifdef HAS_AVX_VNNI
    if (cpu.avx_vnni && index-- == 0) return &avx_vnni;
#endif
    if (cpu.avx2 && index-- == 0) return &avx2;
#endif
#ifdef ARM64
    if (index-- == 0) return &neon;
#endif
    return index == 0 ? &scalar : NULL;
}

static const kernels *chosen = NULL;

const kernels *chosen_kernels(void) {
    if (!chosen) chosen = available(0);
    return chosen;
}

const char *nl_isa_name(int index) {
    const kernels *k = index < 0 ? NULL : available(index);
    return k ? k->name : NULL;
}

int nl_use_isa(const char *name) {
    const kernels *k;
    for (int i = 0; (k = available(i)); i++)
        if (strcmp(k->name, name) == 0) {
            chosen = k;
            return 0;
        }
    return -1;
}

const char *nl_isa(void) { return chosen_kernels()->name; }

int nl_openmp(void) {
#ifdef NL_POOL
    return 1;
#elif defined(_OPENMP)
    return _OPENMP;
#else
    return 0;
#endif
}

const char *nl_compiler(void) {
#ifdef __VERSION__
    return __VERSION__;
#else
    return "unknown";
#endif
}

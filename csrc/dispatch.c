/* The choice of an instruction set: once, when the module is loaded, by what this CPU and its
 * operating system can do. Everything else calls through `chosen_kernels()`. */
#include "dispatch.h"

#include <stddef.h>
#include <string.h>

#include "kernels.h"
#include "vec.h"

static const kernels scalar = {
    .name = "scalar",
    .linear = linear_scalar,
    .linear_exact = linear_scalar,
    .quantize_activations = quantize_activations_scalar,
    .linear_quantized = linear_scalar,
    .attention = attention_scalar,
    .norm = norm_scalar,
    .swiglu = swiglu_scalar,
    .store_head = store_head_scalar,
    .exp = exp_scalar,
    .read = read_scalar,
    .fma = fma_scalar,
};
#ifdef X86
static const kernels avx2 = {
    .name = "avx2",
    .linear = linear_avx2,
    .linear_exact = linear_exact_avx2,
    .quantize_activations = quantize_activations_avx2,
    .linear_quantized = linear_quantized_avx2,
    .attention = attention_avx2,
    .norm = norm_avx2,
    .swiglu = swiglu_avx2,
    .store_head = store_head_avx2,
    .exp = exp_avx2,
    .read = read_avx2,
    .fma = fma_avx2,
};
static const kernels avx512 = {
    .name = "avx512",
    .linear = linear_avx512,
    .linear_exact = linear_exact_avx512,
    .quantize_activations = quantize_activations_avx512,
    .linear_quantized = linear_quantized_avx512,
    .attention = attention_avx512,
    .norm = norm_avx512,
    .swiglu = swiglu_avx512,
    .store_head = store_head_avx512,
    .exp = exp_avx512,
    .read = read_avx512,
    .fma = fma_avx512,
};
#endif

/* The index-th of the tables that can run here, fastest first. */
static const kernels *available(int index) {
#ifdef X86
    __builtin_cpu_init(); /* the questions below also ask whether the system saves these registers */
    /* F16C is older than AVX2 and in every CPU that has it; clang 14 has no name to ask for it. */
    const int has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const int has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    if (has_avx512 && index-- == 0) return &avx512;
    if (has_avx2 && index-- == 0) return &avx2;
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
#ifdef _OPENMP
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

/* The choice of an instruction set: once, when the module is loaded, by what this CPU and its
 * operating system can do. Everything else calls through `chosen_kernels()`. */
#include "dispatch.h"

#include <stddef.h>
#include <string.h>

#include "kernels.h"
#include "vec.h"

#ifdef HAVE_AVX2
static const kernels avx2 = {"avx2", linear_rows_avx2, attention_item_avx2, exp_avx2};
#endif
static const kernels scalar = {"scalar", linear_rows_scalar, attention_item_scalar, exp_scalar};

static const kernels *available(int index) {
#ifdef HAVE_AVX2
    __builtin_cpu_init(); /* the support test below also asks whether the system saves these registers */
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        if (index-- == 0) return &avx2;
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

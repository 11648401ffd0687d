/* The kernel files share this: the arguments of linear, the layout of activations, and one table of functions
 * for each instruction set. dispatch.c chooses the table when the module is loaded. */
#ifndef NUMPY_LLAMA_DISPATCH_H
#define NUMPY_LLAMA_DISPATCH_H

#include <stdint.h>

#include "kernels.h"

#if defined(__x86_64__) || defined(__i386__)
#define X86 1
#endif

/* gcc 11 and clang 12 have AVX_VNNI, and this header. An older compiler leaves these kernels out. */
#if defined(X86) && defined(__has_include)
#if __has_include(<avxvnniintrin.h>)
#define HAS_AVX_VNNI 1
#endif
#endif

typedef struct {
    float *y;
    const void *x; /* float32 (T, IN), or quantized activations */
    int64_t T;
    nl_matrix w;
    int scalar_micro_kernel; /* for its test: see linear_gemm.c */
} linear_args;

/* Quantized activations: the largest whole number of a pair, and of a first and a second byte together. The
 * most tokens of a GEMV. For GEMM TOKEN_GROUP tokens lie side by side, in panels of KC weights of a row. */
enum { X_MAX = 8191, X_MAX_BYTES = 127 * 128, GEMV_TOKENS = NL_GEMV_TOKENS, TOKEN_GROUP = 12, KC = 256 };

/* One call of `quantize_activations` makes one token group: 1, 2, 4 or 8 tokens for GEMV, TOKEN_GROUP for
 * GEMM. The tokens behind the last one are zeros. */
static inline int64_t group_tokens(int64_t T) {
    return T > GEMV_TOKENS ? TOKEN_GROUP : T > 4 ? 8 : T > 2 ? 4 : T;
}
static inline int64_t activation_groups(int64_t T) { return (T + group_tokens(T) - 1) / group_tokens(T); }

/* Room for a token in any layout: float32 is the largest. */
static inline int64_t token_bytes(int64_t IN) { return IN * 4 + 64; }

typedef void linear_rows(const linear_args *a, int64_t begin, int64_t end);
typedef void quantize_group(void *activations, const float *x, int format, int bits, int64_t T, int64_t IN,
                            int64_t group);
/* memory = the softmax state of the index-th query block over the KV span that begins at span_begin. */
typedef void attention_span(const nl_attention_args *a, int64_t index, int64_t span_begin, float *memory,
                            float *scratch);
typedef void norm_token(float *y, const float *x, const float *weight, float eps, int64_t D);
typedef void project_token(float *low, const float *x, const nl_lora *lora, int64_t IN);
typedef void update_token(float *y, const float *low, const nl_lora *lora, int64_t OUT, int64_t begin,
                          int64_t end);
typedef void swiglu_many(float *gate, const float *up, int64_t n);
typedef void store_one_head(uint8_t *to, int format, const float *x, const float *freqs_cis, int64_t Dh);
typedef void exp_many(float *y, const float *x, int64_t n);
typedef uint32_t read_all(const uint8_t *p, int64_t nbytes);
typedef float fma_chains(int64_t operations);

typedef struct {
    const char *name;
    linear_rows *linear;
    linear_rows *linear_exact;
    linear_rows *linear_quantized;
    quantize_group *quantize_activations;
    attention_span *attention;
    norm_token *norm;
    project_token *project;
    update_token *update;
    swiglu_many *swiglu;
    store_one_head *store_head;
    exp_many *exp;
    read_all *read;
    fma_chains *fma;
} kernels;

const kernels *chosen_kernels(void);

/* Every function of the table, for each instruction set. */
#define DECLARE(ISA)                                                                                         \
    linear_rows linear_##ISA, linear_exact_##ISA, linear_quantized_##ISA;                                    \
    quantize_group quantize_activations_##ISA;                                                               \
    attention_span attention_##ISA;                                                                          \
    norm_token norm_##ISA;                                                                                   \
    project_token project_##ISA;                                                                             \
    update_token update_##ISA;                                                                               \
    swiglu_many swiglu_##ISA;                                                                                \
    store_one_head store_head_##ISA;                                                                         \
    exp_many exp_##ISA;                                                                                      \
    read_all read_##ISA;                                                                                     \
    fma_chains fma_##ISA;
DECLARE(scalar)
DECLARE(avx2)
DECLARE(avx512)
#undef DECLARE
linear_rows linear_quantized_avx_vnni; /* the others are those of avx2 */
quantize_group quantize_activations_avx_vnni;

#endif

/* What the forms of a kernel have in common: their arguments, and one table of functions for each
 * instruction set, of which dispatch.c chooses one when the module is loaded. */
#ifndef NUMPY_LLAMA_DISPATCH_H
#define NUMPY_LLAMA_DISPATCH_H

#include <stdint.h>

#include "kernels.h"

typedef struct {
    const void *x; /* float32, or what `fixed` made of it */
    const uint8_t *w;
    float *y;
    int format;
    int64_t T, OUT, IN;
} linear_args;

typedef struct {
    const float *q;
    const uint8_t *k, *v;
    float *out;
    int format;
    int64_t B, T, S, H, K, Dh;
    int64_t k_strides[3], v_strides[3]; /* in numbers: batch, position, head */
    int64_t begin, end;                 /* the queries to compute */
} attention_args;

/* Fixed point: the largest whole number. A few tokens go one by one, more in groups of so many; and in chunks
 * of so many numbers. */
enum { X_MAX = 8191, GEMV_TOKENS = NL_GEMV_TOKENS, TOKEN_GROUP = 8, KC = 256 };
static inline int64_t activation_groups(int64_t T) {
    return T <= GEMV_TOKENS ? T : (T + TOKEN_GROUP - 1) / TOKEN_GROUP;
}
/* Room for the forms of all instruction sets: 4 bytes a number, and one block more where two make a step. */
static inline int64_t token_bytes(int64_t IN) { return (IN + 32) * 4; }

typedef void linear_rows(const linear_args *a, int64_t begin, int64_t end);
typedef void quantize_group(void *fixed, const float *x, int format, int64_t T, int64_t IN, int64_t group);
typedef void attention_span(const attention_args *a, int64_t item, int64_t begin, float *known,
                            float *scratch);
typedef void norm_token(float *y, const float *x, const float *weight, float eps, int64_t D);
typedef void swiglu_many(float *gate, const float *up, int64_t n);
typedef void store_one_head(uint8_t *to, int format, const float *x, const float *angles, int64_t Dh);
typedef void exp_many(float *y, const float *x, int64_t n);
typedef uint32_t read_all(const uint8_t *p, int64_t nbytes);
typedef float fma_chains(int64_t operations);

typedef struct {
    const char *name;
    linear_rows *linear;
    linear_rows *linear_exact;
    quantize_group *quantize_activations;
    linear_rows *linear_quantized;
    attention_span *attention;
    norm_token *norm;
    swiglu_many *swiglu;
    store_one_head *store_head;
    exp_many *exp;
    read_all *read;
    fma_chains *fma;
} kernels;

const kernels *chosen_kernels(void);

/* How many of T tokens one call of `fixed` rounds. */
int64_t group_tokens(int64_t T);

linear_rows linear_scalar, linear_avx2, linear_avx512;
linear_rows linear_exact_avx2, linear_exact_avx512;
quantize_group quantize_activations_scalar, quantize_activations_avx2, quantize_activations_avx512;
linear_rows linear_quantized_avx2, linear_quantized_avx512;
attention_span attention_scalar, attention_avx2, attention_avx512;
norm_token norm_scalar, norm_avx2, norm_avx512;
swiglu_many swiglu_scalar, swiglu_avx2, swiglu_avx512;
store_one_head store_head_scalar, store_head_avx2, store_head_avx512;
exp_many exp_scalar, exp_avx2, exp_avx512;
read_all read_scalar, read_avx2, read_avx512;
fma_chains fma_scalar, fma_avx2, fma_avx512;

#endif

/* The kernel files share this: the arguments of linear, the layout of activations, and one table of functions
 * for each instruction set. dispatch.c chooses the table when the module is loaded. */
#ifndef NUMPY_LLAMA_DISPATCH_H
#define NUMPY_LLAMA_DISPATCH_H

#include <stdint.h>

#include "kernels.h"

#if (defined(__x86_64__) || defined(__i386__)) && !defined(SCALAR_ONLY)
#define X86 1
#endif
#if defined(__aarch64__) && !defined(SCALAR_ONLY)
#define ARM64 1
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

/* c (M, N) = a (M, K) @ b (K, N), or c += a @ b: linear_backward.c. Numbers of c and of a in the next row,
 * and of a in the next column, lie so far apart. b is columns b_begin .. b_begin + N - 1 of a matrix. */
typedef struct {
    float *c;
    int64_t c_row;
    int add;
    const float *a;
    int64_t a_row, a_column; /* one of them is 1 */
    nl_matrix b;             /* not transposed F32, F16 and BF16: any number of columns */
    int transpose_b;
    int64_t b_begin, M, N, K, k_begin; /* k_begin > 0: the product of these k is added to c */
} float_product;

/* Threads share out whole groups of rows of c, which are whole tiles of every instruction set. */
enum { ROW_GROUP = 12 };

typedef struct {
    int64_t begin, end;
} range;

/* The part of 0 .. total - 1 that one worker computes. It begins at a multiple of `step`. */
static inline range range_of(int64_t total, int64_t step, int64_t worker, int64_t workers) {
    const int64_t size = ((total + workers - 1) / workers + step - 1) / step * step;
    const int64_t begin = worker * size < total ? worker * size : total;
    return (range){begin, total - begin < size ? total : begin + size};
}

typedef void linear_rows(const linear_args *a, int64_t begin, int64_t end);
typedef void quantize_group(void *activations, const float *x, int format, int bits, int64_t T, int64_t IN,
                            int64_t group);
typedef void round_many(void *rounded, const float *x, int format, int64_t n);
typedef void restore_many(float *x, const void *rounded, int format, int64_t n);
typedef void pack_rows(const float_product *p, float *to, int64_t ps, range rows);
typedef void pack_columns(const float_product *p, void *to, int64_t ps, range columns);
typedef void multiply_floats(const float_product *p, const float *packed_a, const void *panels, int64_t ps,
                             range rows, range columns);
/* memory = the softmax state of the index-th query block over the KV span that begins at span_begin. */
typedef void attention_span(const nl_attention_args *a, int64_t index, int64_t span_begin, float *memory,
                            float *scratch);
/* Of one sequence and query head: dq, and a part of dk and dv (2, end - begin, Dh). */
typedef void attention_backward_head(const nl_attention_backward_args *a, int64_t b, int64_t h, float *part,
                                     float *scratch);
typedef void norm_token(float *y, const float *x, const float *weight, float eps, int64_t D);
/* LoRA: lora.c. Tokens T, rank r, and N columns of the wide array and of a or b. */
typedef void project_tokens(float *low, const float *x, const float *a, float scale, int64_t T, int64_t r,
                            int64_t N);
typedef void update_tokens(float *y, const float *low, const float *b, int64_t T, int64_t r, int64_t N,
                           range columns);
typedef void low_gradient_tokens(float *da, const float *low, const float *x, int64_t T, int64_t r, int64_t N,
                                 range columns);
typedef void swiglu_many(float *gate, const float *up, int64_t n);
typedef void store_one_head(uint8_t *to, int format, const float *x, const float *freqs_cis, int64_t Dh);
typedef void norm_backward_row(float *dx, float *dweight, const float *dy, const float *x,
                               const float *weight, float eps, int64_t D);
typedef void swiglu_backward_many(float *dgate, float *dup, const float *ds, const float *gate,
                                  const float *up, int64_t n);
typedef float cross_entropy_row(float *z, int64_t target, float weight, int64_t V);
typedef void adamw_many(float *p, const float *g, float *m, float *v, const nl_adamw_step *s, int64_t n);
typedef double squares_many(const float *x, int64_t n);
typedef void exp_many(float *y, const float *x, int64_t n);
typedef uint32_t read_all(const uint8_t *p, int64_t nbytes);
typedef float fma_chains(int64_t operations);

typedef struct {
    const char *name;
    linear_rows *linear;
    linear_rows *linear_exact;
    linear_rows *linear_quantized;
    quantize_group *quantize_activations;
    round_many *round_activations;
    restore_many *restore_activations;
    pack_rows *pack_a;
    pack_columns *pack_b;
    multiply_floats *multiply;
    attention_span *attention;
    attention_backward_head *attention_backward;
    norm_token *norm;
    project_tokens *project;
    update_tokens *update;
    low_gradient_tokens *low_gradient;
    swiglu_many *swiglu;
    store_one_head *store_head;
    norm_backward_row *norm_backward;
    swiglu_backward_many *swiglu_backward;
    cross_entropy_row *cross_entropy;
    adamw_many *adamw;
    squares_many *squares;
    exp_many *exp;
    read_all *read;
    fma_chains *fma;
} kernels;

const kernels *chosen_kernels(void);

/* Every function of the table, for each instruction set. */
#define DECLARE(ISA)                                                                                         \
    linear_rows linear_##ISA, linear_exact_##ISA, linear_quantized_##ISA;                                    \
    quantize_group quantize_activations_##ISA;                                                               \
    round_many round_activations_##ISA;                                                                      \
    restore_many restore_activations_##ISA;                                                                  \
    pack_rows pack_a_##ISA;                                                                                  \
    pack_columns pack_b_##ISA;                                                                               \
    multiply_floats multiply_##ISA;                                                                          \
    attention_span attention_##ISA;                                                                          \
    attention_backward_head attention_backward_##ISA;                                                        \
    norm_token norm_##ISA;                                                                                   \
    project_tokens project_##ISA;                                                                            \
    update_tokens update_##ISA;                                                                              \
    low_gradient_tokens low_gradient_##ISA;                                                                  \
    swiglu_many swiglu_##ISA;                                                                                \
    store_one_head store_head_##ISA;                                                                         \
    norm_backward_row norm_backward_##ISA;                                                                   \
    swiglu_backward_many swiglu_backward_##ISA;                                                              \
    cross_entropy_row cross_entropy_##ISA;                                                                   \
    adamw_many adamw_##ISA;                                                                                  \
    squares_many squares_##ISA;                                                                              \
    exp_many exp_##ISA;                                                                                      \
    read_all read_##ISA;                                                                                     \
    fma_chains fma_##ISA;
DECLARE(scalar)
DECLARE(avx2)
DECLARE(avx512)
DECLARE(neon)
#undef DECLARE
linear_rows linear_quantized_avx_vnni; /* the others are those of avx2 */
quantize_group quantize_activations_avx_vnni;

#endif

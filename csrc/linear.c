/* linear: y = x @ w.T, with the weights in the bytes in which they are stored.
 *
 *            IN                         IN                      OUT
 *      +-----------+              +-----------+            +-----------+
 *    T |     x     |          OUT |     w     |          T |     y     |
 *      +-----------+              |  row by   |            +-----------+
 *        float32                  |    row    |              float32
 *                                 +-----------+
 *
 * There are two ways to multiply. The exact way uses each weight as the float32 of
 * numpy_llama/backend/formats.py. The default way quantizes the activations, and a block format keeps its
 * stored whole numbers q:
 *
 *     x[t]  =  dx * q_x                         whole numbers of 8 or 15 bits, one dx for 32 of them
 *     w[r]  =  d * (q - zero) + m               in a K format d and m are those of a sub-block
 *     y     =  sum over blocks of  d * dx * (sum of (q - zero) * q_x)  +  m * dx * (sum of q_x)
 *                                           `------ exact: int32 -----'
 *
 * A CPU multiplies four bytes in the time of one float (vpdpbusd, vpmaddubsw). F16, BF16 and FP8 weights have
 * no whole numbers: with more than GEMV_TOKENS tokens both sides are rounded to 14 bits, and pairs of 16-bit
 * integers are multiplied; with fewer tokens nothing is rounded. The 16 numbers of NF4 and of FP4 are rounded
 * to bytes. The result is linear(x rounded, w) within the rounding of float32 sums, and of those weights:
 * tests/kernels/test_quantized_activations.py compares it with NumPy.
 *
 * Rows of a block format are packed (formats.h). Threads share out the rows of w. The vector forms are in
 * linear_gemv.c, for one to eight tokens, and in linear_gemm.c, for more. Both add in the same order, so with
 * weights that are whole numbers a token has the same bits in any number of tokens.
 *
 * Compiled once as it stands: the loop over threads and the scalar forms. Compiled once more for each
 * instruction set: the part under VECTOR_FORMS (README.md). */
#include "dispatch.h"
#include "formats.h"
#include "vec.h"

#ifndef VECTOR_FORMS
#ifdef _OPENMP
#include <omp.h>
#endif

/* Rows begin .. end, whole panels to each thread. */
static void share_rows(linear_rows *multiply, const linear_args *a, int64_t begin, int64_t end, int threads) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            int64_t n = omp_get_num_threads(), i = omp_get_thread_num(), panel = NL_PANEL_ROWS;
            int64_t share = ((end - begin + n - 1) / n + panel - 1) / panel * panel;
            int64_t from = begin + i * share, to = from + share;
            if (from < end) multiply(a, from, to < end ? to : end);
        }
        return;
    }
#endif
    (void)threads;
    multiply(a, begin, end);
}

static int linear(linear_rows *multiply, const linear_args *a, int64_t begin, int64_t end, int threads) {
    if (!is_known(a->w.format)) return NL_UNKNOWN_FORMAT;
    share_rows(multiply, a, begin, end, threads);
    return 0;
}

int nl_linear(float *y, const float *x, int64_t T, const nl_matrix *w, int64_t begin, int64_t end,
              int threads) {
    const linear_args a = {.y = y, .x = x, .T = T, .w = *w};
    return linear(chosen_kernels()->linear, &a, begin, end, threads);
}

int nl_linear_exact(float *y, const float *x, int64_t T, const nl_matrix *w, int64_t begin, int64_t end,
                    int threads) {
    const linear_args a = {.y = y, .x = x, .T = T, .w = *w};
    return linear(chosen_kernels()->linear_exact, &a, begin, end, threads);
}

int nl_linear_quantized(float *y, const void *activations, int64_t T, const nl_matrix *w, int64_t begin,
                        int64_t end, int threads) {
    if (!nl_quantizes_activations(w->format, T)) return NL_UNKNOWN_FORMAT;
    const linear_args a = {.y = y, .x = activations, .T = T, .w = *w};
    return linear(chosen_kernels()->linear_quantized, &a, begin, end, threads);
}

int nl_linear_scalar_micro_kernel(float *y, const void *x, int64_t T, const nl_matrix *w, int exact) {
    const linear_args a = {.y = y, .x = x, .T = T, .w = *w, .scalar_micro_kernel = 1};
    const kernels *k = chosen_kernels();
    return linear(exact ? k->linear_exact : k->linear_quantized, &a, 0, w->OUT, 1);
}

/* ---------------------------------------------------------------- scalar: the definition in C */

INLINE void rows_scalar(const int format, const int exact, const linear_args *a, int64_t begin, int64_t end) {
    const int64_t OUT = a->w.OUT, IN = a->w.IN, weights = block_weights(format);
    for (int64_t r = begin; r < end; r++) {
        for (int64_t t = 0; t < a->T; t++) a->y[t * OUT + r] = 0;
        for (int64_t b = 0; b < IN; b += weights) {
            uint8_t room[QK_K];
            const uint8_t *block = block_of(format, room, &a->w, r, b);
            float w[QK_K];
            for (int i = 0; i < weights; i++)
                w[i] = exact ? weight(format, block, i / 16, i % 16)
                             : rounded_weight(format, block, i / 16, i % 16);
            for (int64_t t = 0; t < a->T; t++) {
                const float *x = (const float *)a->x + t * IN + b;
                float sum = a->y[t * OUT + r];
                for (int i = 0; i < weights; i++) sum += w[i] * x[i];
                a->y[t * OUT + r] = sum;
            }
        }
    }
}

/* The scalar form has one order of summing, and its quantized activations are float32. */
INLINE void scalar(const int exact, const linear_args *a, int64_t begin, int64_t end) {
    switch (a->w.format) {
#define CASE(FORMAT, ...)                                                                                    \
    case FORMAT: rows_scalar(FORMAT, exact, a, begin, end); break;
        EACH_FORMAT(CASE)
#undef CASE
    }
}
void linear_scalar(const linear_args *a, int64_t begin, int64_t end) { scalar(1, a, begin, end); }
void linear_exact_scalar(const linear_args *a, int64_t begin, int64_t end) { scalar(1, a, begin, end); }
void linear_quantized_scalar(const linear_args *a, int64_t begin, int64_t end) { scalar(0, a, begin, end); }

#else
/* ---------------------------------------------------------------- vectors: GEMV or GEMM
 *
 * Each loop is compiled once for each format. `format` is a constant there, so no branch on it is left. */

#ifndef AVX_VNNI /* where these are those of avx2 */
VEC_TARGET void VEC(linear_exact)(const linear_args *a, int64_t begin, int64_t end) {
    switch (a->w.format) {
#define CASE(FORMAT, ...)                                                                                    \
    case FORMAT: gemm(FORMAT, 1, a, begin, end); break;
        EACH_FORMAT(CASE)
#undef CASE
    }
}

VEC_TARGET void VEC(linear)(const linear_args *a, int64_t begin, int64_t end) {
    if (a->T > GEMV_TOKENS || in_bytes(a->w.format)) {
        VEC(linear_exact)(a, begin, end);
        return;
    }
    switch (a->w.format) {
    case F32: gemv_floats(F32, a, begin, end); break;
    case F16: gemv_floats(F16, a, begin, end); break;
    case BF16: gemv_floats(BF16, a, begin, end); break;
    case FP8: gemv_packed(FP8, a, begin, end); break;
    }
}
#endif

VEC_TARGET void VEC(linear_quantized)(const linear_args *a, int64_t begin, int64_t end) {
    switch (a->w.format) {
#define CASE(FORMAT, ...)                                                                                    \
    case FORMAT:                                                                                             \
        if (a->T > GEMV_TOKENS || !in_bytes(FORMAT))                                                         \
            gemm(FORMAT, 0, a, begin, end);                                                                  \
        else                                                                                                 \
            gemv_packed(FORMAT, a, begin, end);                                                              \
        break;
        EACH_FORMAT(CASE)
#undef CASE
    }
}
#endif

/* linear: y = x @ w.T, with the weights in the bytes in which they are stored.
 *
 *            IN                         IN                      OUT
 *      +-----------+              +-----------+            +-----------+
 *    T |     x     |          OUT |     w     |          T |     y     |
 *      +-----------+              |  row by   |            +-----------+
 *        float32                  |    row    |              float32
 *                                 +-----------+
 *
 * Two ways. Exact: a weight is the float32 that numpy_llama/quantize.py says it is, and is multiplied as
 * that. Fixed point, the default: x is rounded to 14 bits, and what is stored is multiplied as the whole
 * number it is.
 *
 *     x[t]  =  dx * q,  q a whole number of -8191 .. 8191        one dx for 32 numbers, for K formats for 256
 *     w[r]  =  d * q' + m                                        sub-scales are whole numbers too: part of q'
 *     y     =  sum over blocks of  d * dx * (sum of q' * q)  +  m * dx * (sum of q)
 *                                   `---- exact: int32 ---'
 *
 * 16-bit numbers, multiplied in pairs (vpmaddwd, vpdpwssd), go through twice as fast as floats, and x keeps
 * 80 dB: more than the weights of any block format have, more than bfloat16. What is computed is exactly
 * linear(x rounded, w), but for the rounding of float32 sums: so tests/kernels/test_fixed.py holds it to
 * NumPy.
 *
 * Threads share out the rows of w. This file has the loop over threads and the scalar forms; the vector forms
 * are in linear_gemv.c, for one to four tokens, and in linear_gemm.c. */
#include "dispatch.h"
#include "kernels.h"
#include "vec.h"

#ifdef _OPENMP
#include <omp.h>
#endif

/* Rows begin .. end, in whole panels for each thread. */
static void share_rows(linear_rows *multiply, const linear_args *a, int64_t begin, int64_t end, int threads) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            int64_t n = omp_get_num_threads(), i = omp_get_thread_num();
            int64_t share = ((end - begin + n - 1) / n + 31) / 32 * 32;
            int64_t from = begin + i * share, to = from + share;
            if (from < end) multiply(a, from, to < end ? to : end);
        }
        return;
    }
#endif
    (void)threads;
    multiply(a, begin, end);
}

void nl_linear(float *y, const float *x, const void *w, int format, int64_t T, int64_t OUT, int64_t IN,
               int64_t begin, int64_t end, int threads) {
    const linear_args a = {x, w, y, format, T, OUT, IN};
    share_rows(chosen_kernels()->linear, &a, begin, end, threads);
}

void nl_linear_exact(float *y, const float *x, const void *w, int format, int64_t T, int64_t OUT, int64_t IN,
                     int64_t begin, int64_t end, int threads) {
    const linear_args a = {x, w, y, format, T, OUT, IN};
    share_rows(chosen_kernels()->linear_exact, &a, begin, end, threads);
}

void nl_linear_quantized(float *y, const void *fixed, const void *w, int format, int64_t T, int64_t OUT,
                         int64_t IN, int64_t begin, int64_t end, int threads) {
    const linear_args a = {fixed, w, y, format, T, OUT, IN};
    share_rows(chosen_kernels()->linear_quantized, &a, begin, end, threads);
}

int64_t group_tokens(int64_t T) { return T <= GEMV_TOKENS ? 1 : TOKEN_GROUP; }

int64_t nl_activations_bytes(int64_t T, int64_t IN) {
    return activation_groups(T) * group_tokens(T) * token_bytes(IN);
}

int nl_quantizes_activations(int format, int64_t T) {
    return format != F32 && (T > GEMV_TOKENS || !is_single(format));
}

void nl_quantize_activations(void *fixed, const float *x, int format, int64_t T, int64_t IN, int threads) {
    const kernels *k = chosen_kernels();
    (void)threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t g = 0; g < activation_groups(T); g++) k->quantize_activations(fixed, x, format, T, IN, g);
}

/* ---------------------------------------------------------------- scalar: the definition in C */

INLINE void rows_scalar(const int format, const linear_args *a, int64_t begin, int64_t end) {
    const int64_t weights = block_weights(format), bytes = block_bytes(format), blocks = a->IN / weights;
    for (int64_t r = begin; r < end; r++) {
        for (int64_t t = 0; t < a->T; t++) a->y[t * a->OUT + r] = 0;
        for (int64_t b = 0; b < blocks; b++) {
            float w[QK_K];
            for (int s = 0; s < weights / 16; s++)
                for (int i = 0; i < 16; i++)
                    w[16 * s + i] = weight(format, a->w + (r * blocks + b) * bytes, s, i);
            for (int64_t t = 0; t < a->T; t++) {
                const float *x = (const float *)a->x + t * a->IN + b * weights;
                float sum = a->y[t * a->OUT + r];
                for (int i = 0; i < weights; i++) sum += w[i] * x[i];
                a->y[t * a->OUT + r] = sum;
            }
        }
    }
}

void linear_scalar(const linear_args *a, int64_t begin, int64_t end) {
#define CASE(FORMAT)                                                                                         \
    case FORMAT: rows_scalar(FORMAT, a, begin, end); break;
    switch (a->format) { EACH_FORMAT(CASE) }
#undef CASE
}

/* Fixed point: x rounded, as floats again; then the same. */
void quantize_activations_scalar(void *fixed, const float *x, int format, int64_t T, int64_t IN,
                                 int64_t group) {
    const int64_t block = block_weights(format), first = group * group_tokens(T);
    for (int64_t t = first; t < T && t < first + group_tokens(T); t++)
        for (int64_t b = 0; b < IN; b += block) {
            const float *from = x + t * IN + b;
            float *to = (float *)fixed + t * IN + b, largest = 0;
            for (int64_t i = 0; i < block; i++)
                largest = fabsf(from[i]) <= largest ? largest : fabsf(from[i]);
            const float d = largest / X_MAX, inverse = largest < 1e-30f ? 0 : X_MAX / largest;
            for (int64_t i = 0; i < block; i++) to[i] = rintf(from[i] * inverse) * d;
        }
}

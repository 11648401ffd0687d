/* quantized_activations: x as whole numbers of -8191 .. 8191, times one scale dx for 32 of them, or in K
 * formats for 256. They are computed once for all rows of w, and lie in the order in which the loops over w
 * read them. The rounding is that of `quantize_activations` in numpy_llama/backend/formats.py.
 *
 * Compiled once as it stands: the loop over threads and the scalar form. Compiled once more for each
 * instruction set: the part under VECTOR_FORMS (README.md). */
#include "dispatch.h"
#include "formats.h"
#include "vec.h"

#ifndef VECTOR_FORMS

int64_t nl_activations_bytes(int64_t T, int64_t IN) {
    return activation_groups(T) * group_tokens(T) * token_bytes(IN);
}

int nl_quantizes_activations(int format, int64_t T) {
    return is_known(format) && format != F32 && (T > GEMV_TOKENS || !is_single(format));
}

int nl_quantize_activations(void *activations, const float *x, int format, int64_t T, int64_t IN,
                            int threads) {
    const kernels *k = chosen_kernels();
    if (!is_known(format) || format == F32) return NL_UNKNOWN_FORMAT;
    (void)threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t g = 0; g < activation_groups(T); g++)
        k->quantize_activations(activations, x, format, T, IN, g);
    return 0;
}

/* ---------------------------------------------------------------- scalar: x rounded, as float32 */

void quantize_activations_scalar(void *activations, const float *x, int format, int64_t T, int64_t IN,
                                 int64_t group) {
    const int64_t block = block_weights(format), first = group * group_tokens(T);
    for (int64_t t = first; t < T && t < first + group_tokens(T); t++)
        for (int64_t b = 0; b < IN; b += block) {
            const float *from = x + t * IN + b;
            float *to = (float *)activations + t * IN + b, largest = 0;
            for (int64_t i = 0; i < block; i++)
                largest = fabsf(from[i]) <= largest ? largest : fabsf(from[i]);
            const float d = largest / X_MAX, inverse = largest < 1e-30f ? 0 : X_MAX / largest;
            for (int64_t i = 0; i < block; i++) to[i] = rintf(from[i] * inverse) * d;
        }
}

#else
/* ---------------------------------------------------------------- vectors */

/* q = round(x / dx) for a block of n numbers, 32 or 256; -> dx. A NaN or infinity makes dx NaN or infinite,
 * and so every output of its token. */
VEC_INLINE float quantize_block(int16_t *q, const float *x, int64_t n) {
    ints largest = ints_zero();
    for (int64_t i = 0; i < n; i += LANES)
        largest = ints_max(largest, ints_and(bits_of_vec(vec_load(x + i)), ints_all(0x7fffffff)));
    const float max = float_of_bits((uint32_t)ints_largest(largest));
    const vec inverse = vec_all(max < 1e-30f ? 0 : X_MAX / max);
    for (int64_t i = 0; i < n; i += LANES)
        shorts_store_ints(q + i, ints_from_vec(vec_mul(vec_load(x + i), inverse)));
    return max < 1e-30f ? 0 : max / X_MAX;
}

VEC_INLINE int32_t sum_of(const int16_t *q, int n) {
    int32_t sum = 0;
    for (int i = 0; i < n; i++) sum += q[i];
    return sum;
}

/* ---------------------------------------------------------------- for GEMV
 *
 * The tokens lie one after the other, each in the order of the weights' bytes. Byte i of Q4_0 holds weights i
 * and i + 16. So a step has the first sixteen numbers of each of its BLOCKS_PER_STEP blocks, and then the
 * second sixteen.
 *
 *     q          int16[IN]
 *     dx, sums   for each step float[4][BLOCKS_PER_STEP], four times the same: one for each of four rows
 *                sums: dx * (sum of q) in formats with minima, -zero * (sum of q) in formats with a zero
 *
 * A K format reads bytes, q = 128 hi + lo, and its sums in the same two parts:
 *
 *     bytes      int8[IN / 256][hi, lo][256]
 *     dx         float[IN / 256]
 *     k_sums     int16[IN / 256][hi, lo][16]     Q4_K, Q5_K: minus the sum of 32 numbers, eight of them
 *                                                Q6_K: minus 32 times the sum of 16; 32 is its zero point
 */
typedef struct {
    int16_t *q;
    int8_t *bytes;
    float *dx, *sums;
    int16_t *k_sums;
} gemv_activations;

VEC_INLINE gemv_activations gemv_activations_of(const void *activations, const int format, int64_t IN,
                                                int64_t token) {
    const int64_t steps = (IN / QK + BLOCKS_PER_STEP - 1) / BLOCKS_PER_STEP;
    const int64_t n = is_k(format) ? IN : steps * BLOCKS_PER_STEP * QK;
    int16_t *q = (int16_t *)((uint8_t *)activations + token * token_bytes(IN));
    float *dx = (float *)(void *)(q + n);
    float *sums = dx + (is_k(format) ? IN / QK_K : steps * 4 * BLOCKS_PER_STEP);
    return (gemv_activations){q, (int8_t *)q, dx, sums, (int16_t *)sums};
}

VEC_INLINE void quantize_k_block(const gemv_activations *to, const float *x, const int format, int64_t b) {
    int16_t q[QK_K];
    int8_t *hi = to->bytes + 2 * QK_K * b, *lo = hi + QK_K;
    int16_t *sums_hi = to->k_sums + 32 * b, *sums_lo = sums_hi + 16;
    to->dx[b] = quantize_block(q, x + b * QK_K, QK_K);
    for (int i = 0; i < QK_K; i++) hi[i] = (int8_t)(q[i] >> 7), lo[i] = q[i] & 127;
    const int run = format == Q6_K ? 16 : QK, times = format == Q6_K ? -32 : -1;
    for (int i = 0; i < QK_K / run; i++) {
        const int32_t sum = times * sum_of(q + run * i, run);
        sums_hi[i] = (int16_t)(sum >> 7), sums_lo[i] = (int16_t)(sum & 127); /* 32 * 16 * 8191 / 128 < 2^15 */
    }
}

VEC_INLINE void quantize_for_gemv(void *activations, const float *x, const int format, int64_t IN,
                                  int64_t token) {
    const gemv_activations to = gemv_activations_of(activations, format, IN, token);
    const int64_t blocks = IN / QK, steps = (blocks + BLOCKS_PER_STEP - 1) / BLOCKS_PER_STEP;
    x += token * IN;
    for (int64_t b = 0; b < (is_k(format) ? IN / QK_K : 0); b++) quantize_k_block(&to, x, format, b);
    for (int64_t b = 0; b < (is_k(format) ? 0 : steps * BLOCKS_PER_STEP); b++) {
        int16_t q[QK] = {0};
        const float dx = b < blocks ? quantize_block(q, x + b * QK, QK) : 0;
        const int32_t sum = sum_of(q, QK);
        const int64_t step = b / BLOCKS_PER_STEP, place = b % BLOCKS_PER_STEP;
        int16_t *halves = to.q + step * BLOCKS_PER_STEP * QK + place * 16;
        memcpy(halves, q, 32);
        memcpy(halves + BLOCKS_PER_STEP * 16, q + 16, 32);
        for (int i = 0; i < 4; i++) {
            const int64_t at = (step * 4 + i) * BLOCKS_PER_STEP + place;
            to.dx[at] = dx;
            to.sums[at] = has_minima(format) ? dx * (float)sum : (float)(-format_of(format).zero * sum);
        }
    }
}

/* ---------------------------------------------------------------- for GEMM
 *
 * The tokens lie in token groups of TOKEN_GROUP, side by side; kc is KC, and less in the last panel of a row.
 *
 *     pairs      int32[IN / KC][groups][kc / 2][TOKEN_GROUP]       numbers k and k + 2: see unpack.h
 *     dx, sums   float[IN / KC][groups][kc / 32][TOKEN_GROUP]      sums: dx * (sum of q)
 */
typedef struct {
    int32_t *pairs;
    float *dx, *sums;
} gemm_activations;

/* The activations of one token from number pc on. A panel begins there. */
VEC_INLINE gemm_activations gemm_activations_of(const void *activations, int64_t T, int64_t IN, int64_t token,
                                                int64_t pc) {
    const int64_t groups = activation_groups(T), kc = pc + KC < IN ? KC : IN - pc;
    const int64_t before = (pc * groups + token / TOKEN_GROUP * kc) * TOKEN_GROUP; /* numbers */
    int32_t *pairs = (int32_t *)activations;
    float *dx = (float *)(void *)(pairs + groups * TOKEN_GROUP * IN / 2);
    float *sums = dx + groups * TOKEN_GROUP * IN / QK;
    const int64_t t = token % TOKEN_GROUP;
    return (gemm_activations){pairs + before / 2 + t, dx + before / QK + t, sums + before / QK + t};
}

VEC_INLINE void quantize_for_gemm(void *activations, const float *x, const int format, int64_t T, int64_t IN,
                                  int64_t group) {
    const int64_t block = block_weights(format), first = group * TOKEN_GROUP;
    for (int64_t t = first; t < first + TOKEN_GROUP && t < T; t++)
        for (int64_t pc = 0; pc < IN; pc += KC) {
            const gemm_activations to = gemm_activations_of(activations, T, IN, t, pc);
            uint32_t *pairs = (uint32_t *)to.pairs;
            for (int64_t k = 0; k < KC && pc + k < IN; k += block) {
                int16_t q[QK_K];
                const float dx = quantize_block(q, x + t * IN + pc + k, block);
                for (int64_t i = 0; i < block; i += QK) {
                    to.dx[(k + i) / QK * TOKEN_GROUP] = dx;
                    if (has_minima(format))
                        to.sums[(k + i) / QK * TOKEN_GROUP] = dx * (float)sum_of(q + i, QK);
                }
                for (int64_t i = 0; i < block; i += 4, pairs += 2 * TOKEN_GROUP) {
                    uint64_t four;
                    memcpy(&four, q + i, sizeof four);
                    pairs[0] = (uint32_t)(four & 0xffff) | (uint32_t)(four >> 16 & 0xffff0000);
                    pairs[TOKEN_GROUP] =
                        (uint32_t)(four >> 16 & 0xffff) | (uint32_t)(four >> 32 & 0xffff0000);
                }
            }
        }
}

VEC_TARGET void VEC(quantize_activations)(void *activations, const float *x, int format, int64_t T,
                                          int64_t IN, int64_t group) {
    switch (format) {
#define CASE(FORMAT, ...)                                                                                    \
    case FORMAT:                                                                                             \
        T > GEMV_TOKENS ? quantize_for_gemm(activations, x, FORMAT, T, IN, group)                            \
                        : quantize_for_gemv(activations, x, FORMAT, IN, group);                              \
        break;
        EACH_FORMAT(CASE)
#undef CASE
    }
}
#endif

/* x in fixed point: whole numbers of -8191 .. 8191 times one scale dx for each 32 of them, for K formats for
 * each 256; rounded as `fixed_point` of numpy_llama/quantize.py rounds, and laid as the loops over w want it.
 * Done once for an x, however many rows it is multiplied with.
 *
 * Compiled from avx2.c and avx512.c; the scalar form is in linear.c. */
#include "dispatch.h"
#include "vec.h"

/* 32 or 256 numbers as words; -> dx. Not finite numbers make dx not finite, and so all they touch. */
VEC_INLINE float quantize_block(int16_t *words, const float *x, int64_t n) {
    ints largest = ints_zero();
    for (int64_t i = 0; i < n; i += LANES)
        largest = ints_max(largest, ints_and(bits_of_vec(vec_load(x + i)), ints_all(0x7fffffff)));
    const float max = float_of_bits((uint32_t)ints_largest(largest));
    const vec inverse = vec_all(max < 1e-30f ? 0 : X_MAX / max);
    for (int64_t i = 0; i < n; i += LANES)
        shorts_store_ints(words + i, ints_from_vec(vec_mul(vec_load(x + i), inverse)));
    return max < 1e-30f ? 0 : max / X_MAX;
}

VEC_INLINE int32_t sum_of(const int16_t *words, int n) {
    int32_t sum = 0;
    for (int i = 0; i < n; i++) sum += words[i];
    return sum;
}

/* A few tokens lie one after the other, each as the bytes of the weights want it: of BLOCKS_PER_STEP blocks
 * the first sixteens, then the second ones, for byte i of Q4_0 holds weights i and i + 16.
 *
 *     words      int16[IN]
 *     dx, sums   for four rows at once: those of a step's blocks, four times over
 *
 * K formats want bytes, x = 128 hi + lo, and so the sums, too:
 *
 *     bytes      [IN / 256][hi, lo][256]
 *     dx         [IN / 256]
 *     k_sums     [IN / 256][hi, lo][16]      minus the sum of 32 numbers (eight of them); Q6_K, whose q' is
 *                                            32 more than the weight: minus 32 times the sum of 16 */
typedef struct {
    int16_t *words;
    int8_t *bytes;
    float *dx, *sums;
    int16_t *k_sums;
} gemv_activations;

VEC_INLINE gemv_activations gemv_activations_at(const void *fixed, const int format, int64_t IN,
                                                int64_t token) {
    const int64_t steps = (IN / QK + BLOCKS_PER_STEP - 1) / BLOCKS_PER_STEP,
                  n = is_k(format) ? IN : steps * BLOCKS_PER_STEP * QK;
    int16_t *words = (int16_t *)((uint8_t *)fixed + token * token_bytes(IN));
    float *dx = (float *)(void *)(words + n),
          *sums = dx + (is_k(format) ? IN / QK_K : steps * 4 * BLOCKS_PER_STEP);
    return (gemv_activations){words, (int8_t *)words, dx, sums, (int16_t *)sums};
}

VEC_INLINE void quantize_k_block(const gemv_activations *to, const float *x, const int format, int64_t b) {
    int16_t words[QK_K];
    int8_t *hi = to->bytes + 2 * QK_K * b, *lo = hi + QK_K;
    int16_t *sums_hi = to->k_sums + 32 * b, *sums_lo = sums_hi + 16;
    to->dx[b] = quantize_block(words, x + b * QK_K, QK_K);
    for (int i = 0; i < QK_K; i++) hi[i] = (int8_t)(words[i] >> 7), lo[i] = words[i] & 127;
    const int run = format == Q6_K ? 16 : QK, times = format == Q6_K ? -32 : -1;
    for (int i = 0; i < QK_K / run; i++) {
        const int32_t sum = times * sum_of(words + run * i, run);
        sums_hi[i] = (int16_t)(sum >> 7), sums_lo[i] = (int16_t)(sum & 127); /* 32 * 16 * 8191 / 128 < 2^15 */
    }
}

VEC_INLINE void quantize_for_gemv(void *fixed, const float *x, const int format, int64_t IN, int64_t token) {
    const gemv_activations to = gemv_activations_at(fixed, format, IN, token);
    const int64_t blocks = IN / QK;
    x += token * IN;
    for (int64_t b = 0; b < (is_k(format) ? IN / QK_K : 0); b++) quantize_k_block(&to, x, format, b);
    for (int64_t b = 0;
         b < (is_k(format) ? 0 : (blocks + BLOCKS_PER_STEP - 1) / BLOCKS_PER_STEP * BLOCKS_PER_STEP); b++) {
        int16_t words[QK] = {0};
        const float dx = b < blocks ? quantize_block(words, x + b * QK, QK) : 0;
        const int32_t sum = sum_of(words, QK);
        int16_t *halves = to.words + b / BLOCKS_PER_STEP * BLOCKS_PER_STEP * QK + b % BLOCKS_PER_STEP * 16;
        memcpy(halves, words, 32);
        memcpy(halves + BLOCKS_PER_STEP * 16, words + 16, 32);
        for (int i = 0; i < 4; i++) {
            const int64_t at =
                b / BLOCKS_PER_STEP * 4 * BLOCKS_PER_STEP + i * BLOCKS_PER_STEP + b % BLOCKS_PER_STEP;
            to.dx[at] = dx;
            to.sums[at] = has_minima(format) ? dx * (float)sum : (float)(zero_of(format) * sum);
        }
    }
}

/* Many tokens lie in groups of TOKEN_GROUP, token beside token.
 *
 *     pairs      [IN / KC][groups][KC / 2][TOKEN_GROUP], k and k + 2 together: see linear_gemm.c
 *     dx, sums   [IN / KC][groups][KC / 32][TOKEN_GROUP] */
typedef struct {
    int32_t *pairs;
    float *dx, *sums;
} gemm_activations;

VEC_INLINE gemm_activations gemm_activations_at(const void *fixed, int64_t T, int64_t IN) {
    const int64_t n = activation_groups(T) * TOKEN_GROUP * IN;
    int32_t *pairs = (int32_t *)fixed;
    float *dx = (float *)(void *)(pairs + n / 2);
    return (gemm_activations){pairs, dx, dx + n / QK};
}

/* Where number k of a group's first token lies: in the k-th place of its chunk. */
INLINE int64_t place_of(int64_t T, int64_t IN, int64_t group, int64_t k) {
    const int64_t c = k / KC * KC, n = c + KC < IN ? KC : IN - c;
    return (c * activation_groups(T) + group * n + k - c) * TOKEN_GROUP;
}

VEC_INLINE void quantize_for_gemm(void *fixed, const float *x, const int format, int64_t T, int64_t IN,
                                  int64_t group) {
    const gemm_activations to = gemm_activations_at(fixed, T, IN);
    const int64_t block = is_k(format) ? QK_K : QK, first = group * TOKEN_GROUP;
    for (int64_t t = 0; t < TOKEN_GROUP && first + t < T; t++)
        for (int64_t b = 0; b < IN; b += block) {
            int16_t words[QK_K];
            const float dx = quantize_block(words, x + (first + t) * IN + b, block);
            const int64_t at = place_of(T, IN, group, b);
            for (int64_t i = 0; i < block; i += QK) {
                to.dx[at / QK + i / QK * TOKEN_GROUP + t] = dx;
                if (has_minima(format))
                    to.sums[at / QK + i / QK * TOKEN_GROUP + t] = dx * (float)sum_of(words + i, QK);
            }
            uint32_t *pairs = (uint32_t *)to.pairs + at / 2 + t;
            for (int64_t i = 0; i < block; i += 4, pairs += 2 * TOKEN_GROUP) {
                uint64_t four;
                memcpy(&four, words + i, sizeof four);
                pairs[0] = (uint32_t)(four & 0xffff) | (uint32_t)(four >> 16 & 0xffff0000);
                pairs[TOKEN_GROUP] = (uint32_t)(four >> 16 & 0xffff) | (uint32_t)(four >> 32 & 0xffff0000);
            }
        }
}

VEC_TARGET void VEC(quantize_activations)(void *fixed, const float *x, int format, int64_t T, int64_t IN,
                                          int64_t group) {
#define CASE(FORMAT)                                                                                         \
    case FORMAT:                                                                                             \
        T > GEMV_TOKENS ? quantize_for_gemm(fixed, x, FORMAT, T, IN, group)                                  \
                        : quantize_for_gemv(fixed, x, FORMAT, IN, group);                                    \
        break;
    switch (format) { EACH_FORMAT(CASE) }
#undef CASE
}

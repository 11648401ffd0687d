/* quantized_activations: x as whole numbers, times one scale for 32 of them. They are computed once for all
 * rows of w, and lie in the order in which the loops over w read them.
 *
 * Block formats multiply bytes. Each 32 numbers of a token are rounded to q in -16256 .. 16256 and cut:
 *
 *     x  =  dx * q,    q = 128 first + second,    first in -127 .. 127,  second in -64 .. 63
 *
 * With 15 bits both are used. With 8 bits the second byte is used where the largest number of the block is
 * more than BLOCKS_ABOVE times the mean of those of the token's blocks: a few channels of a LLaMA have
 * numbers that are much larger than all others, and the error of the rounding is in their blocks. Each token
 * chooses its own blocks, so its bits do not depend on the other tokens.
 *
 * F16, BF16 and FP8 weights multiply pairs of 16-bit integers, q in -8191 .. 8191.
 *
 * The rounding is that of `quantize_activations` in numpy_llama/backend/formats.py.
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
    return is_known(format) && format != F32 && (T > GEMV_TOKENS || in_bytes(format));
}

int nl_quantize_activations(void *activations, const float *x, int format, int bits, int64_t T, int64_t IN,
                            int threads) {
    const kernels *k = chosen_kernels();
    if (!nl_quantizes_activations(format, T)) return NL_UNKNOWN_FORMAT;
    (void)threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t g = 0; g < activation_groups(T); g++)
        k->quantize_activations(activations, x, format, bits, T, IN, g);
    return 0;
}

void nl_round_activations(void *rounded, const float *x, int format, int64_t n) {
    chosen_kernels()->round_activations(rounded, x, format, n);
}

void nl_restore_activations(float *x, const void *rounded, int format, int64_t n) {
    chosen_kernels()->restore_activations(x, rounded, format, n);
}
#endif

/* The largest number of a block that needs no second byte: of the token's blocks, in their order. */
INLINE float first_byte_limit(int bits, const float *largest, int64_t stride, int64_t blocks) {
    enum { BLOCKS_ABOVE = 3 };
    float sum = 0;
    for (int64_t b = 0; b < blocks; b++) sum += largest[b * stride];
    return bits == 8 ? sum * BLOCKS_ABOVE / (float)blocks : -1;
}

/* The numbers of a block are multiplied by this and rounded. Below 1e-30 all become 0. */
INLINE float inverse_scale(float max, float largest_q) { return max < 1e-30f ? 0 : largest_q / max; }
INLINE float scale(float max, float largest_q) { return max < 1e-30f ? 0 : max / largest_q; }

/* ---------------------------------------------------------------- between ranks
 *
 * A rank rounds what it sends to q, as below, and the others restore x = dx * q. Where |q| is the largest
 * they take the largest |x| itself. So rounding x again gives the same dx and q.
 *
 *     largest    float          |x|
 *     q          int16[32]
 */
INLINE float largest_q_of(const int format) { return in_bytes(format) ? X_MAX_BYTES : X_MAX; }

INLINE void store_rounded(uint8_t *to, float largest, const int16_t q[QK]) {
    memcpy(to, &largest, sizeof largest);
    memcpy(to + sizeof largest, q, QK * sizeof *q);
}

INLINE void restore_block(float *x, const uint8_t *from, const float largest_q) {
    float max;
    int16_t q[QK];
    memcpy(&max, from, sizeof max);
    memcpy(q, from + sizeof max, sizeof q);
    const float dx = scale(max, largest_q);
    int has_largest = 0;
    for (int i = 0; i < QK; i++) {
        const float a = q[i];
        has_largest |= fabsf(a) == largest_q;
        x[i] = a == largest_q ? max : a == -largest_q ? -max : a * dx;
    }
    if (!has_largest) x[0] = max; /* below 1e-30, or not finite */
}

#ifndef VECTOR_FORMS
/* ---------------------------------------------------------------- scalar: x rounded, as float32 */

static float largest_of(const float *x) {
    float largest = 0;
    for (int64_t i = 0; i < QK; i++) largest = fabsf(x[i]) <= largest ? largest : fabsf(x[i]);
    return largest;
}

void quantize_activations_scalar(void *activations, const float *x, int format, int bits, int64_t T,
                                 int64_t IN, int64_t group) {
    const int64_t first = group * group_tokens(T), blocks = IN / QK;
    for (int64_t t = first; t < T && t < first + group_tokens(T); t++) {
        float *to = (float *)activations + t * IN;
        for (int64_t b = 0; b < blocks; b++) to[b * QK] = largest_of(x + t * IN + b * QK);
        const float limit = first_byte_limit(bits, to, QK, blocks);
        const float largest_q = largest_q_of(format);
        for (int64_t b = 0; b < blocks; b++, to += QK) {
            const float max = *to, inverse = inverse_scale(max, largest_q), dx = max / largest_q;
            const int one_byte = largest_q == X_MAX_BYTES && !(max > limit);
            for (int64_t i = 0; i < QK; i++) {
                const float q = rintf(x[t * IN + b * QK + i] * inverse);
                to[i] = one_byte ? floorf((q + 64) / 128) * (128 * dx) : q * dx;
            }
        }
    }
}

void round_activations_scalar(void *rounded, const float *x, int format, int64_t n) {
    const float largest_q = largest_q_of(format);
    for (int64_t b = 0; b < n / QK; b++, x += QK) {
        float max = largest_of(x);
        const float inverse = inverse_scale(max, largest_q);
        int16_t q[QK];
        for (int64_t i = 0; i < QK; i++) {
            const float one = rintf(x[i] * inverse);
            q[i] = isfinite(one) ? (int16_t)one : 0;
            if (!isfinite(one)) max = NAN; /* then so is every output of the token */
        }
        store_rounded((uint8_t *)rounded + b * NL_ROUNDED_BYTES, max, q);
    }
}

void restore_activations_scalar(float *x, const void *rounded, int format, int64_t n) {
    for (int64_t b = 0; b < n / QK; b++)
        restore_block(x + b * QK, (const uint8_t *)rounded + b * NL_ROUNDED_BYTES, largest_q_of(format));
}

#else
/* ---------------------------------------------------------------- vectors */

/* The largest |x| of 32. NaN and infinity are larger than all numbers: then dx is NaN or infinite, and so is
 * every output of the token. */
VEC_INLINE float largest_of_block(const float *x) {
    ints largest = ints_zero();
    for (int i = 0; i < QK; i += LANES)
        largest = ints_max(largest, ints_and(bits_of_vec(vec_load(x + i)), ints_all(0x7fffffff)));
    return float_of_bits((uint32_t)ints_largest(largest));
}

/* q = round(x / dx) for 32 numbers; -> dx. */
VEC_INLINE float quantize_block(int16_t *q, const float *x, float max, float largest_q) {
    const vec inverse = vec_all(inverse_scale(max, largest_q));
    for (int i = 0; i < QK; i += LANES)
        shorts_store_ints(q + i, ints_from_vec(vec_mul(vec_load(x + i), inverse)));
    return scale(max, largest_q);
}

VEC_TARGET void VEC(round_activations)(void *rounded, const float *x, int format, int64_t n) {
    for (int64_t b = 0; b < n / QK; b++, x += QK) {
        const float max = largest_of_block(x);
        int16_t q[QK];
        quantize_block(q, x, max, largest_q_of(format));
        store_rounded((uint8_t *)rounded + b * NL_ROUNDED_BYTES, max, q);
    }
}

VEC_TARGET void VEC(restore_activations)(float *x, const void *rounded, int format, int64_t n) {
    const float largest_q = largest_q_of(format);
    for (int64_t b = 0; b < n / QK; b++)
        restore_block(x + b * QK, (const uint8_t *)rounded + b * NL_ROUNDED_BYTES, largest_q);
}

/* ---------------------------------------------------------------- bytes
 *
 * G tokens of a group lie side by side: T of a GEMV, TOKEN_GROUP of a GEMM. A block of x is 32 numbers of
 * each of them, in arrays whose elements have 4 bytes:
 *
 *     fours      int8[8][G][4]       numbers 4 k .. 4 k + 3 of a token are the four bytes k
 *     dx         float[G]            of the first bytes 128 dx
 *     sums       float[G]            dx * (sum of the bytes), for the minima of weights
 *     start      int32[2][G]         where a sum of products begins: -zero * (sum of the bytes). Q6_K: of the
 *                                    first 16 and of the last 16; all others: start[0] of all 32
 *
 *     first      block[IN / KC][groups][kc / 32]
 *     place      for each group      int32[IN / 32], which of `second` belongs to a block; -1: none
 *     second     for each group      block[IN / 32], and fewer are used */
INLINE int64_t x_block_size(int64_t G) { return 12 * G; }
INLINE const float *x_dx(const int32_t *block, int64_t G) { return (const float *)(block + 8 * G); }
INLINE const float *x_sums(const int32_t *block, int64_t G) { return (const float *)(block + 9 * G); }
INLINE const int32_t *x_start(const int32_t *block, int64_t G, int half) { return block + (10 + half) * G; }

/* The first bytes of a group from number pc on. A panel begins there. */
INLINE const int32_t *first_bytes_of(const void *activations, int64_t G, int64_t groups, int64_t IN,
                                     int64_t group, int64_t pc) {
    const int64_t kc = pc + KC < IN ? KC : IN - pc;
    return (const int32_t *)activations + (pc * groups + group * kc) / QK * x_block_size(G);
}

/* The second bytes of a group. */
typedef struct {
    int32_t *place, *blocks;
} second_bytes;

INLINE second_bytes second_bytes_of(const void *activations, int64_t G, int64_t groups, int64_t IN,
                                    int64_t group) {
    const int64_t blocks = IN / QK;
    int32_t *place = (int32_t *)activations + groups * blocks * x_block_size(G);
    int32_t *second = place + groups * blocks;
    return (second_bytes){place + group * blocks, second + group * blocks * x_block_size(G)};
}
/* Those of block b, or NULL. */
INLINE const int32_t *second_block(const second_bytes *s, int64_t b, int64_t G) {
    return s->place[b] < 0 ? NULL : s->blocks + s->place[b] * x_block_size(G);
}

/* Token t of a block, from whole numbers that fit bytes. */
VEC_INLINE void store_bytes(int32_t *block, int64_t G, int64_t t, const ints q[QK / LANES], float dx,
                            const int format) {
    enum { HALF = QK / LANES / 2 };
    int8_t bytes[QK];
    ints sums[2] = {q[0], q[HALF]};
    for (int i = 0; i < QK / LANES; i++) bytes_store_ints(bytes + i * LANES, q[i]);
    for (int i = 1; i < HALF; i++)
        sums[0] = ints_add(sums[0], q[i]), sums[1] = ints_add(sums[1], q[HALF + i]);
    const int32_t first_16 = ints_sum(sums[0]), last_16 = ints_sum(sums[1]), all = first_16 + last_16;
    for (int k = 0; k < 8; k++) memcpy(block + k * G + t, bytes + 4 * k, 4);
    float *d = (float *)(block + 8 * G) + t;
    d[0] = dx, d[G] = dx * (float)all;
    int32_t *start = block + 10 * G + t;
    start[0] = -byte_zero(format) * (format == Q6_K ? first_16 : all);
    start[G] = -byte_zero(format) * last_16;
}

VEC_INLINE void quantize_to_bytes(void *activations, const float *x, const int format, int bits, int64_t T,
                                  int64_t IN, int64_t group) {
    const int64_t G = group_tokens(T), groups = activation_groups(T), blocks = IN / QK, first = group * G;
    const int64_t tokens = T - first < G ? T - first : G;
    const size_t block_bytes = (size_t)x_block_size(G) * sizeof(int32_t);
    const second_bytes second = second_bytes_of(activations, G, groups, IN, group);
    int32_t *more = second.blocks, seconds = 0;
    /* The largest number of each block, for now: behind the second bytes of all earlier blocks. */
    float *largest = (float *)(second.blocks + (x_block_size(G) - G) * blocks), limit[TOKEN_GROUP];
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t b = 0; b < blocks; b++)
            largest[b * G + t] = largest_of_block(x + (first + t) * IN + b * QK);
        limit[t] = first_byte_limit(bits, largest + t, G, blocks);
    }
    for (int64_t b = 0; b < blocks; b++, largest += G) {
        int32_t *to = (int32_t *)first_bytes_of(activations, G, groups, IN, group, b * QK / KC * KC) +
                      b % (KC / QK) * x_block_size(G);
        int any = 0;
        for (int64_t t = 0; t < tokens; t++) any |= largest[t] > limit[t];
        float max[TOKEN_GROUP]; /* the second bytes may be stored where `largest` is */
        memcpy(max, largest, (size_t)tokens * sizeof(float));
        if (tokens < G) memset(to, 0, block_bytes);
        if (any) memset(more, 0, block_bytes);
        for (int64_t t = 0; t < tokens; t++) {
            const float *from = x + (first + t) * IN + b * QK;
            const vec inverse = vec_all(inverse_scale(max[t], X_MAX_BYTES));
            const float dx = scale(max[t], X_MAX_BYTES);
            ints one[QK / LANES], two[QK / LANES];
            for (int i = 0; i < QK / LANES; i++) {
                /* NaN becomes the smallest integer, then -X_MAX_BYTES: its dx is not finite */
                const ints q = ints_max(ints_all(-X_MAX_BYTES),
                                        ints_from_vec(vec_mul(vec_load(from + i * LANES), inverse)));
                one[i] = ints_signed_right(ints_add(q, ints_all(64)), 7);
                two[i] = ints_sub(q, ints_left(one[i], 7));
            }
            store_bytes(to, G, t, one, 128 * dx, format);
            if (max[t] > limit[t]) store_bytes(more, G, t, two, dx, format);
        }
        second.place[b] = any ? seconds++ : -1;
        if (any) more += x_block_size(G);
    }
}

/* ---------------------------------------------------------------- pairs, for GEMM with F16, BF16, FP8
 *
 * The tokens lie in token groups of TOKEN_GROUP, side by side; kc is KC, and less in the last panel of a row.
 *
 *     pairs      int32[IN / KC][groups][kc / 2][TOKEN_GROUP]       numbers 2 k and 2 k + 1
 *     dx         float[IN / KC][groups][kc / 32][TOKEN_GROUP]
 */
typedef struct {
    int32_t *pairs;
    float *dx;
} pair_activations;

/* The activations of one token from number pc on. A panel begins there. */
INLINE pair_activations pair_activations_of(const void *activations, int64_t T, int64_t IN, int64_t token,
                                            int64_t pc) {
    const int64_t groups = activation_groups(T), kc = pc + KC < IN ? KC : IN - pc;
    const int64_t before = (pc * groups + token / TOKEN_GROUP * kc) * TOKEN_GROUP; /* numbers */
    int32_t *pairs = (int32_t *)activations;
    float *dx = (float *)(void *)(pairs + groups * TOKEN_GROUP * IN / 2);
    const int64_t t = token % TOKEN_GROUP;
    return (pair_activations){pairs + before / 2 + t, dx + before / QK + t};
}

VEC_INLINE void quantize_to_pairs(void *activations, const float *x, int64_t T, int64_t IN, int64_t group) {
    const int64_t first = group * TOKEN_GROUP;
    for (int64_t t = first; t < first + TOKEN_GROUP && t < T; t++)
        for (int64_t b = 0; b < IN / QK; b++) {
            const pair_activations to = pair_activations_of(activations, T, IN, t, b * QK / KC * KC);
            const float *from = x + t * IN + b * QK;
            const int64_t k = b % (KC / QK) * QK;
            int16_t q[QK];
            to.dx[k / QK * TOKEN_GROUP] = quantize_block(q, from, largest_of_block(from), X_MAX);
            for (int i = 0; i < QK; i += 2) memcpy(to.pairs + (k + i) / 2 * TOKEN_GROUP, q + i, 4);
        }
}

VEC_TARGET void VEC(quantize_activations)(void *activations, const float *x, int format, int bits, int64_t T,
                                          int64_t IN, int64_t group) {
    if (!in_bytes(format)) {
        quantize_to_pairs(activations, x, T, IN, group);
        return;
    }
    switch (format) {
#define CASE(FORMAT, ...)                                                                                    \
    case FORMAT: quantize_to_bytes(activations, x, FORMAT, bits, T, IN, group); break;
        EACH_FORMAT(CASE)
#undef CASE
    }
}
#endif

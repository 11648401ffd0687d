/* linear in fixed point: y = x @ w.T for block formats, with whole numbers inside.
 *
 *     x[t]  =  dx * q,  q a whole number of -8191 .. 8191        one dx for 32 numbers, for K formats for 256
 *     w[r]  =  d * q' + m                                        as stored; sub-scales are whole numbers too
 *     y     =  sum over blocks of  d * dx * (sum of q' * q)  +  m * dx * (sum of q)
 *                                   `---- exact: int32 ---'
 *
 * Multiplying 16-bit numbers in pairs (vpmaddwd, vpdpwssd) is twice as fast as an FMA, and x, rounded to 14
 * bits, keeps 80 dB: more than any block format's weights, more than bfloat16. So this is the default, and
 * what it computes is exactly linear(x rounded, w) but for the rounding of float32 sums: that is how
 * tests/test_fixed.py holds it to NumPy. For many tokens F16 and BF16 weights are rounded likewise.
 *
 * Compiled like linear.c: as it is, for the loops over threads and the scalar form, and in vectors. */
#include "dispatch.h"
#include "kernels.h"
#include "vec.h"

/* TOKENS: as many as a tile takes at once. PANEL_K: a chunk of IN that is unpacked at once. */
enum { X_MAX = 8191, TOKENS = 6, PANEL_K = 256, TOKENS_AT_ONCE = 86 * TOKENS };

INLINE int is_k(int format) { return block_weights(format) == QK_K; }
INLINE int has_minima(int format) {
    return format == Q4_1 || format == Q5_1 || format == Q4_K || format == Q5_K;
}
/* What a stored number stands for, less itself. */
INLINE int zero_of(int format) { return format == Q4_0 ? -8 : format == Q5_0 ? -16 : 0; }
INLINE int64_t groups_of(int64_t T) { return T == 1 ? 1 : (T + TOKENS - 1) / TOKENS; }

#ifndef LANES
#ifdef _OPENMP
#include <omp.h>
#endif

/* Room for the forms of all instruction sets: 4 bytes a number, and one block more where two make a step. */
int64_t nl_fixed_bytes(int64_t T, int64_t IN) { return groups_of(T) * (T == 1 ? 1 : TOKENS) * (IN + QK) * 4; }

void nl_fixed(void *fixed, const float *x, int format, int64_t T, int64_t IN, int threads) {
    const kernels *k = chosen_kernels();
    (void)threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t g = 0; g < groups_of(T); g++) k->fixed(fixed, x, format, T, IN, g);
}

void nl_linear_fixed(float *y, const void *fixed, const void *w, int format, int64_t T, int64_t OUT,
                     int64_t IN, int64_t begin, int64_t end, int threads) {
    const linear_args a = {fixed, w, y, format, T, OUT, IN};
    const kernels *k = chosen_kernels();
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            int64_t n = omp_get_num_threads(), i = omp_get_thread_num();
            int64_t share = ((end - begin + n - 1) / n + 31) / 32 * 32; /* whole panels */
            int64_t from = begin + i * share, to = from + share;
            if (from < end) k->linear_fixed(&a, from, to < end ? to : end);
        }
        return;
    }
#endif
    (void)threads;
    k->linear_fixed(&a, begin, end);
}

/* ---------------------------------------------------------------- scalar: the definition in C
 *
 * x rounded, as floats again; then linear.c. */

void fixed_scalar(void *fixed, const float *x, int format, int64_t T, int64_t IN, int64_t group) {
    const int64_t block = block_weights(format), first = T == 1 ? 0 : group * TOKENS;
    for (int64_t t = first; t < T && t < first + TOKENS; t++)
        for (int64_t b = 0; b < IN; b += block) {
            const float *from = x + t * IN + b;
            float *to = (float *)fixed + t * IN + b, largest = 0;
            for (int64_t i = 0; i < block; i++)
                largest = fabsf(from[i]) <= largest ? largest : fabsf(from[i]);
            const float d = largest / X_MAX, inverse = largest < 1e-30f ? 0 : X_MAX / largest;
            for (int64_t i = 0; i < block; i++) to[i] = rintf(from[i] * inverse) * d;
        }
}

void linear_fixed_scalar(const linear_args *a, int64_t begin, int64_t end) { linear_scalar(a, begin, end); }

#else
/* ---------------------------------------------------------------- vectors: x
 *
 * One token lies as the bytes of the weights want it: of BESIDE blocks the first sixteens, then the second
 * ones (byte i of Q4_0 holds weights i and i + 16); K formats as it is. Many tokens lie in groups of TOKENS,
 * token beside token in pairs (k, k + 2): a byte's neighbour but one is half of the same 32 bits.
 *
 *     one    words: int16[IN]     dx, sums: for four rows at once, those of a step's blocks four times over;
 *            K formats: dx for each 256, sums for each 32
 *     many   pairs: [groups][IN / 2][TOKENS]     dx, sums: [groups][IN / 32][TOKENS] */

typedef struct {
    int16_t *words;
    float *dx, *sums;
} fixed_x;

WORD fixed_x parts_of(const void *fixed, const int format, int64_t T, int64_t IN) {
    const int64_t steps = (IN / QK + BESIDE - 1) / BESIDE;
    const int64_t n = T > 1 ? groups_of(T) * TOKENS * IN : is_k(format) ? IN : steps * BESIDE * QK;
    const int64_t scales = T > 1 || is_k(format) ? n / QK : steps * 4 * BESIDE;
    int16_t *words = (int16_t *)fixed;
    float *dx = (float *)(void *)(words + n);
    return (fixed_x){words, dx, dx + scales};
}

/* 32 or 256 numbers as words; -> dx. Not finite numbers make dx not finite, and so all they touch. */
WORD float round_block(int16_t *words, const float *x, int64_t n) {
    ints largest = ints_zero();
    for (int64_t i = 0; i < n; i += LANES)
        largest = ints_max(largest, ints_and(bits_of_vec(vec_load(x + i)), ints_all(0x7fffffff)));
    const float max = float_of_bits((uint32_t)ints_largest(largest));
    const vec inverse = vec_all(max < 1e-30f ? 0 : X_MAX / max);
    for (int64_t i = 0; i < n; i += LANES)
        store_words(words + i, ints_from_vec(vec_mul(vec_load(x + i), inverse)));
    return max < 1e-30f ? 0 : max / X_MAX;
}

WORD int32_t sum_of(const int16_t *words, int n) {
    int32_t sum = 0;
    for (int i = 0; i < n; i++) sum += words[i];
    return sum;
}

WORD void fixed_one(void *fixed, const float *x, const int format, int64_t IN) {
    const fixed_x to = parts_of(fixed, format, 1, IN);
    const int64_t blocks = IN / QK;
    if (is_k(format)) {
        for (int64_t b = 0; b < blocks; b++) {
            if (b % 8 == 0) to.dx[b / 8] = round_block(to.words + b * QK, x + b * QK, QK_K);
            to.sums[b] = -to.dx[b / 8] * (float)sum_of(to.words + b * QK, QK);
        }
        return;
    }
    for (int64_t b = 0; b < (blocks + BESIDE - 1) / BESIDE * BESIDE; b++) {
        int16_t words[QK] = {0};
        const float dx = b < blocks ? round_block(words, x + b * QK, QK) : 0;
        const int32_t sum = sum_of(words, QK);
        int16_t *halves = to.words + b / BESIDE * BESIDE * QK + b % BESIDE * 16;
        memcpy(halves, words, 32);
        memcpy(halves + BESIDE * 16, words + 16, 32);
        for (int i = 0; i < 4; i++) {
            const int64_t at = b / BESIDE * 4 * BESIDE + i * BESIDE + b % BESIDE;
            to.dx[at] = dx;
            to.sums[at] = has_minima(format) ? dx * (float)sum : (float)(zero_of(format) * sum);
        }
    }
}

WORD void fixed_many(void *fixed, const float *x, const int format, int64_t T, int64_t IN, int64_t group) {
    const fixed_x to = parts_of(fixed, format, T, IN);
    const int64_t block = is_k(format) ? QK_K : QK, first = group * TOKENS;
    for (int64_t t = 0; t < TOKENS && first + t < T; t++)
        for (int64_t b = 0; b < IN; b += block) {
            int16_t words[QK_K];
            const float dx = round_block(words, x + (first + t) * IN + b, block);
            const int64_t at = (group * IN + b) * TOKENS;
            for (int64_t i = 0; i < block; i += QK) {
                to.dx[at / QK + i / QK * TOKENS + t] = dx;
                if (has_minima(format))
                    to.sums[at / QK + i / QK * TOKENS + t] = dx * (float)sum_of(words + i, QK);
            }
            uint32_t *pairs = (uint32_t *)(void *)to.words + at / 2 + t;
            for (int64_t i = 0; i < block; i += 4, pairs += 2 * TOKENS) {
                uint64_t four;
                memcpy(&four, words + i, sizeof four);
                pairs[0] = (uint32_t)(four & 0xffff) | (uint32_t)(four >> 16 & 0xffff0000);
                pairs[TOKENS] = (uint32_t)(four >> 16 & 0xffff) | (uint32_t)(four >> 32 & 0xffff0000);
            }
        }
}

TARGET void VEC(fixed)(void *fixed, const float *x, int format, int64_t T, int64_t IN, int64_t group) {
    if (T > 1) {
        fixed_many(fixed, x, format, T, IN, group);
        return;
    }
#define CASE(FORMAT)                                                                                         \
    case FORMAT: fixed_one(fixed, x, FORMAT, IN); break;
    switch (format) { EACH_FORMAT(CASE) }
#undef CASE
}

/* ---------------------------------------------------------------- vectors: one token
 *
 * As in linear.c four rows together, a quarter of the thread's share apart. A lane holds the sum over its
 * places of a block; it is scaled as a float, and the lanes are summed at the end. */

/* The first and the second sixteen weights of each of BESIDE blocks: q' without its zero point. */
WORD void halves_of(const int format, ints half[2], const uint8_t *p, int64_t next) {
    const int start = format == Q8_0 ? 2 : format == Q4_0 ? 2 : format == Q4_1 ? 4 : format == Q5_0 ? 6 : 8;
    if (format == Q8_0) {
        half[0] = runs_from_i8(p + start, next);
        half[1] = runs_from_i8(p + start + 16, next);
        return;
    }
    const ints bytes = runs_from_u8(p + start, next);
    half[0] = ints_and(bytes, words_all(15));
    half[1] = words_right(bytes, 4);
    if (format == Q5_0 || format == Q5_1)
        for (int i = 0; i < 2; i++)
            half[i] = ints_or(half[i], words_left(runs_from_bits(p + start - 4 + 2 * i, next), 4));
}

/* The float16 at p of the step's blocks of four rows, as floats: row beside row. */
WORD vec_scales four_rows_f16(const uint8_t *const w[4], int64_t at, int64_t next) {
    uint64_t halves[2] = {0, 0};
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < BESIDE; j++) {
            const int place = i * BESIDE + j;
            halves[place / 4] |= (uint64_t)load_u16(w[i] + at + j * next) << 16 * (place % 4);
        }
    return scales_from_f16(halves);
}

/* A step of four rows: BESIDE blocks of each. `minima` sums what is the same for all 32 weights of a block.
 */
WORD void block_sums(const int format, vec sum[4], vec_scales *minima, const uint8_t *const w[4], int64_t at,
                     int64_t next, const fixed_x *x, int64_t step) {
    const int16_t *words = x->words + step * 4 * LANES;
    const vec_scales sums = scales_load(x->sums + step * 4 * BESIDE);
    const vec_scales d = scales_mul(four_rows_f16(w, at, next), scales_load(x->dx + step * 4 * BESIDE));
    if (has_minima(format)) *minima = scales_fma(four_rows_f16(w, at + 2, next), sums, *minima);
    if (zero_of(format)) *minima = scales_fma(d, sums, *minima);
    float scale[4 * BESIDE];
    scales_store(scale, d);
    STAYS_STORED(scale);
    for (int i = 0; i < 4; i++) {
        ints half[2];
        halves_of(format, half, w[i] + at, next);
        const ints dot = dot_pairs(dot_pairs(ints_zero(), half[0], ints_load(words)), half[1],
                                   ints_load(words + 2 * LANES));
        sum[i] = vec_fma(vec_from_ints(dot), runs_from_floats(scale + i * BESIDE), sum[i]);
    }
}

/* The eight sub-scales of a Q4_K or Q5_K block, each as a pair of words; -> its minima. */
WORD vec k_scales(uint32_t pairs[8], const uint8_t *p) {
    const uint32_t low = load_u32(p + 4), middle = load_u32(p + 8), high = load_u32(p + 12);
    const uint32_t upper_sc = (high & 0x0f0f0f0f) | (low >> 2 & 0x30303030);
    const uint32_t upper_m = (high >> 4 & 0x0f0f0f0f) | (middle >> 2 & 0x30303030);
    store_pairs(pairs, (low & 0x3f3f3f3f) | (uint64_t)upper_sc << 32);
    STAYS_STORED(*(uint32_t (*)[8])pairs);
    return vec_from_8_bytes((middle & 0x3f3f3f3f) | (uint64_t)upper_m << 32);
}

/* A block of 256: its sub-scales are multiplied into the words, 13 bits at most, so that one sum goes
 * through. */
WORD vec k_block_sum(const int format, vec sum, const uint8_t *p, const fixed_x *x, int64_t b, float d,
                     float dmin) {
    const int16_t *words = x->words + b * QK_K;
    const uint8_t *fifth = p + 16, *pairs = p + 16 + (format == Q5_K ? 32 : 0);
    ints dot = ints_zero();
    if (format == Q6_K) {
        sixteens sc16;
        load_sixteens(&sc16, p + 192);
        for (int i = 0; i < 8; i++)
            for (int h = 0; h < 32; h += 2 * LANES) {
                const ints low = words_from_u8(p + i / 4 * 64 + i % 2 * 32 + h);
                const ints upper = words_from_u8(p + 128 + i / 4 * 32 + h);
                const ints q = ints_or(ints_and(words_right(low, i % 4 / 2 * 4), words_all(15)),
                                       words_left(ints_and(words_right(upper, i % 4 * 2), words_all(3)), 4));
                const ints sc = words_of_sixteens(&sc16, 2 * i + h / 16);
                dot = dot_pairs(dot, words_mul(words_add(q, words_all(-32)), sc),
                                ints_load(words + 32 * i + h));
            }
    } else {
        uint32_t sc[8];
        const vec m = k_scales(sc, p);
        sum = vec_fma(vec_mul(m, vec_all(dmin)), vec_load_8(x->sums + 8 * b), sum);
        for (int i = 0; i < 8; i += 2)
            for (int h = 0; h < 32; h += 2 * LANES) {
                const ints bytes = words_from_u8(pairs + 16 * i + h);
                ints q[2] = {ints_and(bytes, words_all(15)), words_right(bytes, 4)};
                for (int j = 0; j < 2; j++) {
                    if (format == Q5_K)
                        q[j] = ints_or(q[j], words_left(ints_and(words_right(words_from_u8(fifth + h), i + j),
                                                                 words_all(1)),
                                                        4));
                    dot = dot_pairs(dot, words_mul(q[j], ints_all((int32_t)sc[i + j])),
                                    ints_load(words + 32 * (i + j) + h));
                }
            }
    }
    return vec_fma(vec_from_ints(dot), vec_all(d), sum);
}

WORD void k_block_sums(const int format, vec sum[4], const uint8_t *const w[4], int64_t at, const fixed_x *x,
                       int64_t b) {
    float d[4 * BESIDE], dmin[4 * BESIDE] = {0};
    scales_store(d, scales_mul(four_rows_f16(w, at + (format == Q6_K ? 208 : 0), 0), scales_all(x->dx[b])));
    if (has_minima(format)) scales_store(dmin, four_rows_f16(w, at + 2, 0));
    STAYS_STORED(d);
    STAYS_STORED(dmin);
    for (int i = 0; i < 4; i++)
        sum[i] = k_block_sum(format, sum[i], w[i] + at, x, b, d[i * BESIDE], dmin[i * BESIDE]);
}

WORD void one_token_fixed(const int format, const linear_args *a, int64_t begin, int64_t end) {
    const int64_t weights = block_weights(format), bytes = block_bytes(format), blocks = a->IN / weights;
    const int64_t quarter = (end - begin + 3) / 4;
    const fixed_x x = parts_of(a->x, format, 1, a->IN);
    for (int64_t r = begin; r < begin + quarter; r++) {
        const uint8_t *w[4];
        vec sum[4] = {vec_zero(), vec_zero(), vec_zero(), vec_zero()};
        vec_scales minima = scales_zero();
        for (int i = 0; i < 4; i++) {
            const int64_t row = r + i * quarter;
            w[i] = a->w + (row < end ? row : end - 1) * blocks * bytes;
        }
        if (is_k(format))
            for (int64_t b = 0; b < blocks; b++) k_block_sums(format, sum, w, b * bytes, &x, b);
        else
            for (int64_t b = 0; b < blocks; b += BESIDE) {
                const int64_t next =
                    b + 1 < blocks ? bytes : 0; /* beside the last lies itself, with dx = 0 */
                block_sums(format, sum, &minima, w, b * bytes, next, &x, b / BESIDE);
            }
        float four[4], more[4 * BESIDE];
        _mm_storeu_ps(four, vec_sums(sum[0], sum[1], sum[2], sum[3]));
        scales_store(more, minima);
        for (int i = 0; i < 4; i++)
            if (r + i * quarter < end) {
                float y = four[i];
                for (int j = 0; j < BESIDE; j++) y += more[i * BESIDE + j];
                a->y[r + i * quarter] = y;
            }
    }
}

/* ---------------------------------------------------------------- vectors: many tokens
 *
 * A panel: 2 LANES rows side by side, one row in each lane, PANEL_K weights of each as pairs of words.
 *
 *              row 0     row 1           row 31
 *     pair 0   q0 q2     q0 q2    ...    q0 q2         one register, or two of them
 *     pair 1   q1 q3     q1 q3
 *     pair 2   q4 q6     ...
 *
 * It is unpacked once and multiplied with all tokens. The tile: two registers of the panel x 6 tokens are 12
 * sums; a step loads the two, and for each token one pair of x into all lanes, and does 12 dot_pairs. 8
 * loads take 4 cycles, 12 vpdpwssd take 6 (AVX2, with vpmaddwd and vpaddd: 12). After a unit of 32 weights
 * (K formats: 64 or 128) sums may be scaled, and after it they must: 32 * 8191 * 8191 < 2^31;
 * Q6_K 64 * 4096 * 8191; Q5_K 128 * 31 * 63 * 8191. */
typedef struct {
    int32_t pairs[PANEL_K / 2][2][LANES];
    float d[PANEL_K / QK][2][LANES], m[PANEL_K / QK][2][LANES];
} panel;

INLINE int unit_of(int format) { return format == Q6_K ? 64 : format == Q4_K || format == Q5_K ? 128 : 32; }

/* Bits of four bytes, from `shift` on: of bytes 0 and 2, and of 1 and 3, as two pairs. */
WORD void split(ints out[2], ints four, const int shift, const int mask) {
    for (int i = 0; i < 2; i++)
        out[i] = ints_and(ints_right(four, shift + 8 * i), ints_all(mask | mask << 16));
}
WORD void put(panel *to, int64_t pair, int half, ints a) { ints_store(to->pairs[pair][half], a); }
WORD ints both_words(ints a) { return ints_or(ints_and(a, ints_all(0xffff)), ints_left(a, 16)); }

WORD void unpack_block(const int format, panel *to, int64_t b, int half, const uint8_t *p, ints rows) {
    const int64_t at = b * 16;
    const vec d = vec_from_low_f16(rows_u32(p, rows));
    vec m = vec_zero();
    if (format == Q4_1 || format == Q5_1) m = vec_from_low_f16(ints_right(rows_u32(p, rows), 16));
    const int start = format == Q8_0 || format == Q4_0 ? 2 : format == Q4_1 ? 4 : format == Q5_0 ? 6 : 8;
    if (format == Q8_0) {
        for (int j = 0; j < 8; j++) {
            const ints four = rows_u32(p + start + 4 * j, rows);
            put(to, at + 2 * j, half, words_signed_right(words_left(four, 8), 8));
            put(to, at + 2 * j + 1, half, words_signed_right(four, 8));
        }
    } else {
        ints fifth = ints_zero();
        if (format == Q5_0 || format == Q5_1) fifth = rows_u32(p + start - 4, rows);
        for (int j = 0; j < 4; j++) {
            const ints four = rows_u32(p + start + 4 * j, rows);
            for (int upper = 0; upper < 2; upper++) {
                ints q[2];
                split(q, four, 4 * upper, 15);
                for (int i = 0; i < 2; i++) {
                    if (format == Q5_0 || format == Q5_1) {
                        const int bit = 16 * upper + 4 * j + i; /* and that two places on */
                        const ints one = ints_and(ints_right(fifth, bit), ints_all(1));
                        const ints other = ints_and(ints_right(fifth, bit + 2), ints_all(1));
                        q[i] = ints_or(q[i], ints_or(ints_left(one, 4), ints_left(other, 20)));
                    }
                    put(to, at + 8 * upper + 2 * j + i, half, words_add(q[i], words_all(zero_of(format))));
                }
            }
        }
    }
    vec_store(to->d[b][half], d);
    vec_store(to->m[b][half], m);
}

/* F16 and BF16: 32 floats in each lane, and the largest of them gives the scale. */
WORD void unpack_floats(const int format, panel *to, int64_t b, int half, const uint8_t *p, ints rows) {
    vec w[QK];
    ints largest = ints_zero();
    for (int j = 0; j < 16; j++) {
        const ints two = rows_u32(p + 4 * j, rows);
        for (int i = 0; i < 2; i++) {
            const ints one = i ? ints_right(two, 16) : ints_and(two, ints_all(0xffff));
            w[2 * j + i] = format == F16 ? vec_from_low_f16(one) : vec_of_bits(ints_left(one, 16));
            largest = ints_max(largest, ints_and(bits_of_vec(w[2 * j + i]), ints_all(0x7fffffff)));
        }
    }
    /* below 1e-30 nothing is left of a weight, and 8191 / max must stay finite */
    const vec max = vec_of_bits(largest), lowest = vec_all(1e-30f);
    const vec inverse = vec_zero_below(max, lowest, vec_div(vec_all(X_MAX), vec_max(lowest, max)));
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 2; i++) {
            const ints one = ints_from_vec(vec_mul(w[4 * j + i], inverse));
            const ints other = ints_from_vec(vec_mul(w[4 * j + 2 + i], inverse));
            put(to, b * 16 + 2 * j + i, half, ints_or(ints_and(one, ints_all(0xffff)), ints_left(other, 16)));
        }
    vec_store(to->d[b][half], vec_zero_below(max, lowest, vec_mul(max, vec_all(1.0f / X_MAX))));
}

WORD void unpack_k(const int format, panel *to, int half, const uint8_t *p, ints rows) {
    const uint8_t *pairs = p + 16 + (format == Q5_K ? 32 : 0);
    if (format == Q6_K) {
        const vec d = vec_from_low_f16(ints_right(rows_u32(p + 206, rows), 16));
        for (int unit = 0; unit < 4; unit++) vec_store(to->d[unit][half], d);
        for (int i = 0; i < 8; i++) {
            const ints sc = rows_u32(p + 192 + i / 2 * 4, rows);
            for (int j = 0; j < 8; j++) {
                const ints four = rows_u32(p + i / 4 * 64 + i % 2 * 32 + 4 * j, rows);
                const ints uppers = rows_u32(p + 128 + i / 4 * 32 + 4 * j, rows);
                const ints own = ints_signed_right(ints_left(sc, 24 - 8 * (i % 2 * 2 + j / 4)), 24);
                ints low[2], upper[2];
                split(low, four, i % 4 / 2 * 4, 15);
                split(upper, uppers, i % 4 * 2, 3);
                for (int l = 0; l < 2; l++) {
                    const ints q = words_add(ints_or(low[l], ints_left(upper[l], 4)), words_all(-32));
                    put(to, 16 * i + 2 * j + l, half, words_mul(q, both_words(own)));
                }
            }
        }
        return;
    }
    const ints d_dmin = rows_u32(p, rows);
    const ints low = rows_u32(p + 4, rows), middle = rows_u32(p + 8, rows), high = rows_u32(p + 12, rows);
    const vec d = vec_from_low_f16(d_dmin), dmin = vec_from_low_f16(ints_right(d_dmin, 16));
    for (int unit = 0; unit < 2; unit++) vec_store(to->d[unit][half], d);
    for (int i = 0; i < 8; i++) {
        ints sc, m;
        const int s = 8 * (i % 4);
        if (i < 4) {
            sc = ints_and(ints_right(low, s), ints_all(63));
            m = ints_and(ints_right(middle, s), ints_all(63));
        } else {
            sc = ints_or(ints_and(ints_right(high, s), ints_all(15)),
                         ints_left(ints_and(ints_right(low, s + 6), ints_all(3)), 4));
            m = ints_or(ints_and(ints_right(high, s + 4), ints_all(15)),
                        ints_left(ints_and(ints_right(middle, s + 6), ints_all(3)), 4));
        }
        vec_store(to->m[i][half], vec_mul(vec_from_ints(m), vec_sub(vec_zero(), dmin)));
        for (int j = 0; j < 8; j++) {
            ints q[2], bit[2] = {ints_zero(), ints_zero()};
            split(q, rows_u32(pairs + i / 2 * 32 + 4 * j, rows), i % 2 * 4, 15);
            if (format == Q5_K) split(bit, rows_u32(p + 16 + 4 * j, rows), i, 1);
            for (int l = 0; l < 2; l++)
                put(to, 16 * i + 2 * j + l, half,
                    words_mul(ints_or(q[l], ints_left(bit[l], 4)), both_words(sc)));
        }
    }
}

/* y[tokens, 2 LANES] += x[tokens, n] @ panel.T */
WORD void fixed_tile(const int tokens, float *y, const panel *w, int64_t n, int64_t unit, const int minima,
                     const int32_t *pairs, const float *dx, const float *sums) {
    vec sum[TOKENS][2];
    for (int t = 0; t < tokens; t++)
        for (int h = 0; h < 2; h++) sum[t][h] = vec_load(y + t * 2 * LANES + h * LANES);
    for (int64_t u = 0; u * unit < n; u++) {
        ints dot[TOKENS][2];
        for (int t = 0; t < tokens; t++) dot[t][0] = dot[t][1] = ints_zero();
        for (int64_t k = u * unit / 2; k < (u + 1) * unit / 2; k++) {
            const ints w0 = ints_load(w->pairs[k][0]), w1 = ints_load(w->pairs[k][1]);
            for (int t = 0; t < tokens; t++) {
                const ints x = ints_all(pairs[k * TOKENS + t]);
                dot[t][0] = dot_pairs(dot[t][0], w0, x);
                dot[t][1] = dot_pairs(dot[t][1], w1, x);
            }
        }
        for (int h = 0; h < 2; h++) {
            const vec d = vec_load(w->d[u][h]);
            for (int t = 0; t < tokens; t++)
                sum[t][h] = vec_fma(vec_from_ints(dot[t][h]),
                                    vec_mul(d, vec_all(dx[u * (unit / QK) * TOKENS + t])), sum[t][h]);
        }
    }
    if (minima)
        for (int64_t b = 0; b < n / QK; b++)
            for (int h = 0; h < 2; h++)
                for (int t = 0; t < tokens; t++)
                    sum[t][h] = vec_fma(vec_load(w->m[b][h]), vec_all(sums[b * TOKENS + t]), sum[t][h]);
    for (int t = 0; t < tokens; t++)
        for (int h = 0; h < 2; h++) vec_store(y + t * 2 * LANES + h * LANES, sum[t][h]);
}

TARGET static void any_fixed_tile(int64_t tokens, float *y, const panel *w, int64_t n, int64_t unit,
                                  int minima, const int32_t *pairs, const float *dx, const float *sums) {
#define CASE(N)                                                                                              \
    case N: fixed_tile(N, y, w, n, unit, minima, pairs, dx, sums); break;
    switch (tokens) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
#undef CASE
}

WORD void many_tokens_fixed(const int format, const linear_args *a, int64_t begin, int64_t end) {
    const int64_t weights = block_weights(format), bytes = block_bytes(format), row = a->IN / weights * bytes;
    const fixed_x x = parts_of(a->x, format, a->T, a->IN);
    _Alignas(64) panel w;
    _Alignas(64) float y[TOKENS_AT_ONCE * 2 * LANES];
    for (int64_t t0 = 0; t0 < a->T; t0 += TOKENS_AT_ONCE)
        for (int64_t r0 = begin; r0 < end; r0 += 2 * LANES) {
            const int64_t tokens = t0 + TOKENS_AT_ONCE < a->T ? TOKENS_AT_ONCE : a->T - t0;
            const int64_t rows = r0 + 2 * LANES < end ? 2 * LANES : end - r0;
            memset(y, 0, (size_t)(tokens * 2 * LANES) * sizeof(float));
            for (int64_t c = 0; c < a->IN; c += PANEL_K) {
                const int64_t n = c + PANEL_K < a->IN ? PANEL_K : a->IN - c;
                for (int half = 0; half < 2; half++) {
                    /* lanes beyond the last row read that one again */
                    const int32_t first = half * LANES < rows ? half * LANES : 0,
                                  last = (int32_t)rows - 1 - first;
                    const uint8_t *p = a->w + (r0 + first) * row + c / weights * bytes;
                    const ints lanes =
                        ints_mul(ints_min(lane_numbers(), ints_all(last)), ints_all((int32_t)row));
                    for (int64_t k = 0; k < n; k += weights)
                        if (is_k(format))
                            unpack_k(format, &w, half, p, lanes);
                        else if (format == F16 || format == BF16)
                            unpack_floats(format, &w, k / QK, half, p + k / weights * bytes, lanes);
                        else
                            unpack_block(format, &w, k / QK, half, p + k / weights * bytes, lanes);
                }
                for (int64_t t = 0; t < tokens; t += TOKENS) {
                    const int64_t blocks = (t0 + t) / TOKENS * (a->IN / QK) + c / QK;
                    any_fixed_tile(tokens - t < TOKENS ? tokens - t : TOKENS, y + t * 2 * LANES, &w, n,
                                   unit_of(format), has_minima(format),
                                   (const int32_t *)x.words + blocks * (QK / 2) * TOKENS,
                                   x.dx + blocks * TOKENS, x.sums + blocks * TOKENS);
                }
            }
            for (int64_t t = 0; t < tokens; t++)
                memcpy(a->y + (t0 + t) * a->OUT + r0, y + t * 2 * LANES, (size_t)rows * sizeof(float));
        }
}

TARGET void VEC(linear_fixed)(const linear_args *a, int64_t begin, int64_t end) {
#define CASE(FORMAT)                                                                                         \
    case FORMAT:                                                                                             \
        a->T == 1 ? one_token_fixed(FORMAT, a, begin, end) : many_tokens_fixed(FORMAT, a, begin, end);       \
        break;
    switch (a->format) { EACH_FORMAT(CASE) }
#undef CASE
}
#endif

/* linear for one token (decode), in vectors: every weight is used once, so all depends on reading w as fast
 * as memory gives it.
 *
 *     memory     r  ========>           four rows together, a quarter of the thread's share apart: memory is
 *                r + quarter ========>  read fastest as a few long streams; and one row's chain of additions
 *                ...                    would wait for each to end
 *
 * A row's IN products are summed in lanes, in ascending order; lanes are summed in one tree (vec_sums). A
 * block of 18 bytes (Q4_0) must take no longer than memory takes to bring it: at 13 GB/s a thread 1.4 ns, 4
 * cycles.
 *
 * Compiled from avx2.c and avx512.c. tests/test_fixed.py and tests/test_kernels.py hold it to NumPy. */
#include "dispatch.h"
#include "vec.h"

WORD void four_rows(const uint8_t *w[4], const linear_args *a, int64_t r, int64_t quarter, int64_t end) {
    const int64_t row_bytes = a->IN / block_weights(a->format) * block_bytes(a->format);
    for (int i = 0; i < 4; i++) {
        const int64_t row = r + i * quarter; /* those beyond the end read the last row again */
        w[i] = a->w + (row < end ? row : end - 1) * row_bytes;
    }
}

/* ---------------------------------------------------------------- floats: F32, F16, BF16 */

WORD vec floats_of(const int format, const uint8_t *p) {
    return format == F32 ? vec_load(p) : format == F16 ? vec_from_f16(p) : vec_from_bf16(p);
}

WORD void one_token_floats(const int format, const linear_args *a, int64_t begin, int64_t end) {
    const int64_t bytes = block_bytes(format) / QK, quarter = (end - begin + 3) / 4;
    const float *x = a->x;
    for (int64_t r = begin; r < begin + quarter; r++) {
        const uint8_t *w[4];
        vec sum[4] = {vec_zero(), vec_zero(), vec_zero(), vec_zero()};
        four_rows(w, a, r, quarter, end);
        for (int64_t k = 0; k < a->IN; k += LANES)
            for (int i = 0; i < 4; i++)
                sum[i] = vec_fma(floats_of(format, w[i] + k * bytes), vec_load(x + k), sum[i]);
        float four[4];
        _mm_storeu_ps(four, vec_sums(sum[0], sum[1], sum[2], sum[3]));
        for (int i = 0; i < 4; i++)
            if (r + i * quarter < end) a->y[r + i * quarter] = four[i];
    }
}

/* ---------------------------------------------------------------- fixed point: w
 *
 * A lane holds the sum over its places of a block; it is scaled as a float. */

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
                     int64_t next, const one_fixed *x, int64_t step) {
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
WORD vec k_block_sum(const int format, vec sum, const uint8_t *p, const one_fixed *x, int64_t b, float d,
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

WORD void k_block_sums(const int format, vec sum[4], const uint8_t *const w[4], int64_t at,
                       const one_fixed *x, int64_t b) {
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
    const one_fixed x = one_fixed_in(a->x, format, a->IN);
    for (int64_t r = begin; r < begin + quarter; r++) {
        const uint8_t *w[4];
        vec sum[4] = {vec_zero(), vec_zero(), vec_zero(), vec_zero()};
        vec_scales minima = scales_zero();
        four_rows(w, a, r, quarter, end);
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

/* linear for one token, or a few (decode), in vectors: every weight is used once or a few times, so all
 * depends on reading w as fast as memory gives it.
 *
 *     memory     r  ========>           four rows together, a quarter of the thread's share apart: memory is
 *                r + quarter ========>  read fastest as a few long streams; and one row's chain of additions
 *                ...                    would wait for each to end
 *
 * A row's IN products are summed in lanes, in ascending order; lanes are summed in one tree (vec_sums). A
 * block of 18 bytes (Q4_0) must take no longer than memory takes to bring it: at 13 GB/s a thread 1.4 ns, 4
 * cycles. What is unpacked serves all T tokens, and from some five on the panel of linear_gemm.c is faster.
 *
 * Compiled from avx2.c and avx512.c. tests/kernels/test_fixed.py and tests/kernels/test_kernels.py hold it to
 * NumPy. */
#include "dispatch.h"
#include "vec.h"

VEC_INLINE void row_pointers(const uint8_t *w[4], const linear_args *a, int64_t r, int64_t quarter,
                             int64_t end) {
    const int64_t row_bytes = a->IN / block_weights(a->format) * block_bytes(a->format);
    for (int i = 0; i < 4; i++) {
        const int64_t row = r + i * quarter; /* those beyond the end read the last row again */
        w[i] = a->w + (row < end ? row : end - 1) * row_bytes;
    }
}

/* The processor fetches ahead by itself only within a page of 4 KB, and too late for rows that are read by a
 * few bytes between much arithmetic: 2 KB ahead decode 10-20% faster. */
VEC_INLINE void prefetch(const uint8_t *p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + 2048 + i);
}

/* ---------------------------------------------------------------- floats: F32, F16, BF16 */

VEC_INLINE vec floats_of(const int format, const uint8_t *p) {
    return format == F32 ? vec_load(p) : format == F16 ? vec_from_f16(p) : vec_from_bf16(p);
}

VEC_INLINE void gemv_floats_4_rows(const int format, const int64_t T, const linear_args *a, int64_t r,
                                   int64_t quarter, int64_t end) {
    const int64_t bytes = block_bytes(format) / QK;
    const float *x = a->x;
    const uint8_t *w[4];
    vec sum[GEMV_TOKENS][4];
    for (int64_t t = 0; t < T; t++)
        for (int i = 0; i < 4; i++) sum[t][i] = vec_zero();
    row_pointers(w, a, r, quarter, end);
    for (int64_t b = 0; b < a->IN; b += QK) {
        for (int i = 0; i < 4; i++) prefetch(w[i] + b * bytes, QK * bytes);
        for (int64_t k = b; k < b + QK; k += LANES)
            for (int i = 0; i < 4; i++) {
                const vec floats = floats_of(format, w[i] + k * bytes);
                for (int64_t t = 0; t < T; t++)
                    sum[t][i] = vec_fma(floats, vec_load(x + t * a->IN + k), sum[t][i]);
            }
    }
    for (int64_t t = 0; t < T; t++) {
        float four[4];
        _mm_storeu_ps(four, vec_sums(sum[t][0], sum[t][1], sum[t][2], sum[t][3]));
        for (int i = 0; i < 4; i++)
            if (r + i * quarter < end) a->y[t * a->OUT + r + i * quarter] = four[i];
    }
}

/* Each number of tokens is a constant to its loop, so that its sums are registers. */
#define EACH_GEMV_T(CASE) CASE(1) CASE(2) CASE(3) CASE(4)

VEC_INLINE void gemv_floats(const int format, const linear_args *a, int64_t begin, int64_t end) {
    const int64_t quarter = (end - begin + 3) / 4;
    for (int64_t r = begin; r < begin + quarter; r++) switch (a->T) {
#define CASE(T)                                                                                              \
    case T: gemv_floats_4_rows(format, T, a, r, quarter, end); break;
            EACH_GEMV_T(CASE)
#undef CASE
        }
}

/* ---------------------------------------------------------------- fixed point: w
 *
 * A lane holds the sum over its places of a block; it is scaled as a float. */

/* The first and the second sixteen weights of each of BLOCKS_PER_STEP blocks: q' without its zero point. */
VEC_INLINE void unpack_halves(const int format, ints half[2], const uint8_t *p, int64_t next) {
    const int start = format == Q8_0 ? 2 : format == Q4_0 ? 2 : format == Q4_1 ? 4 : format == Q5_0 ? 6 : 8;
    if (format == Q8_0) {
        half[0] = sixteens_from_i8(p + start, next);
        half[1] = sixteens_from_i8(p + start + 16, next);
        return;
    }
    const ints bytes = sixteens_from_u8(p + start, next);
    half[0] = ints_and(bytes, shorts_all(15));
    half[1] = shorts_right(bytes, 4);
    if (format == Q5_0 || format == Q5_1)
        for (int i = 0; i < 2; i++)
            half[i] = ints_or(half[i], shorts_left(sixteens_from_bits(p + start - 4 + 2 * i, next), 4));
}

/* The float16 at p of the step's blocks of four rows, as floats: row beside row. */
VEC_INLINE vec_scales load_f16_of_4_rows(const uint8_t *const w[4], int64_t at, int64_t next) {
    uint64_t halves[2] = {0, 0};
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < BLOCKS_PER_STEP; j++) {
            const int place = i * BLOCKS_PER_STEP + j;
            halves[place / 4] |= (uint64_t)load_u16(w[i] + at + j * next) << 16 * (place % 4);
        }
    return scales_from_f16(halves);
}

/* What is summed of a token: the products of four rows, in lanes; and what is the same for all weights of a
 * block, in a few lanes a row (K formats: in four, in `sub_minima`). */
typedef struct {
    vec rows[4], sub_minima[16 / LANES];
    vec_scales minima;
} token_sums;

/* A step of four rows: BLOCKS_PER_STEP blocks of each. */
VEC_INLINE void block_sums(const int format, const int64_t T, token_sums *sums, const uint8_t *const w[4],
                           int64_t at, int64_t next, const gemv_activations *x, int64_t step) {
    const vec_scales d = load_f16_of_4_rows(w, at, next);
    const vec_scales m = has_minima(format) ? load_f16_of_4_rows(w, at + 2, next) : scales_zero();
    float scale[GEMV_TOKENS][4 * BLOCKS_PER_STEP];
    for (int64_t t = 0; t < T; t++) {
        const vec_scales of_x = scales_load(x[t].sums + step * 4 * BLOCKS_PER_STEP);
        const vec_scales both = scales_mul(d, scales_load(x[t].dx + step * 4 * BLOCKS_PER_STEP));
        if (has_minima(format)) sums[t].minima = scales_fma(m, of_x, sums[t].minima);
        if (zero_of(format)) sums[t].minima = scales_fma(both, of_x, sums[t].minima);
        scales_store(scale[t], both);
    }
    STAYS_STORED(scale);
    for (int i = 0; i < 4; i++) {
        ints half[2];
        unpack_halves(format, half, w[i] + at, next);
        for (int64_t t = 0; t < T; t++) {
            const int16_t *words = x[t].words + step * 4 * LANES;
            const ints dot = dot_pairs(dot_pairs(ints_zero(), half[0], ints_load(words)), half[1],
                                       ints_load(words + 2 * LANES));
            sums[t].rows[i] = vec_fma(vec_from_ints(dot),
                                      sixteens_from_floats(scale[t] + i * BLOCKS_PER_STEP), sums[t].rows[i]);
        }
    }
}

/* ---------------------------------------------------------------- fixed point: K formats
 *
 * Their q' are bytes without a sign, and to widen them would be half of the work. So x comes as bytes, too,
 *
 *     x  =  128 hi + lo,    hi -64 .. 63,  lo 0 .. 127
 *
 * and each q' is multiplied with both: in pairs to words (vpmaddubsw: 63 * 127 * 2 < 2^15), words times
 * sub-scales in pairs to 32 bits. Sums over hi and over lo are floats before they meet. */

/* Weights k .. k + 4 LANES of a block: bytes 0 .. 15, 31 or 63. */
VEC_INLINE ints unpack_k_bytes(const int format, const uint8_t *p, int k) {
    const int s = k / QK; /* of the eight runs of 32; AVX-512 takes s + 1 beside it */
    if (format == Q6_K) {
        const ints low = ints_load(p + s / 4 * 64 + s % 2 * 32),
                   upper = repeat_32_bytes(p + 128 + s / 4 * 32);
        const int to = 4 - s % 4 * 2; /* bits 2 (s % 4) and the next become bits 4 and 5 */
        return ints_or_and(ints_and(ints_right(low, s % 4 / 2 * 4), bytes_all(15)),
                           repeated_left(upper, to, to - 2), bytes_all(48));
    }
    const ints pairs = repeat_32_bytes(p + 16 + (format == Q5_K ? 32 : 0) + s / 2 * 32);
    const ints q = ints_and(repeated_left(pairs, -(s % 2 * 4), -4), bytes_all(15));
    return format == Q5_K
               ? ints_or_and(q, repeated_left(repeat_32_bytes(p + 16), 4 - s, 3 - s), bytes_all(16))
               : q;
}

/* Of LANES / 4 rows the 16 bytes at which a block of Q4_K or Q5_K begins, as 32 bits each:
 *
 *     d, dmin    sc 0-3, of sc 4-7 the upper 2 bits    the same of m    of sc 4-7 and m 4-7 the low 4 bits
 *
 * -> eight sub-scales, eight minima: a byte each. */
VEC_INLINE ints k_scales(ints head) {
    const ints low = ints_right_each(ints_order(head, 1, 3, 2, 3), ints_fours(0, 0, 0, 4));
    const ints upper = ints_right(ints_order(head, 1, 1, 2, 2), 2);
    return ints_or_and(ints_and(low, ints_fours(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f)), upper,
                       ints_fours(0, 0x30303030, 0, 0x30303030));
}

/* The minima of a block of Q4_K or Q5_K, of four rows; -> their sub-scales. */
VEC_INLINE void k_minima(uint8_t scales[4][16], const int64_t T, token_sums *sums, const uint8_t *const w[4],
                         int64_t at, const gemv_activations *x, int64_t b) {
    float dmin[4 * BLOCKS_PER_STEP];
    scales_store(dmin, load_f16_of_4_rows(w, at + 2, 0));
    for (int i = 0; i < 4; i += LANES / 4) {
        const ints both = k_scales(rows_of_16(w + i, at)), m = shorts_from_upper_u8(both);
        const vec d = fours_from_floats(dmin + i * BLOCKS_PER_STEP);
        ints_store(scales[i], both);
        for (int64_t t = 0; t < T; t++) {
            const int16_t *sums_hi = x[t].k_sums + 32 * b, *sums_lo = sums_hi + 16;
            const ints of_hi = dot_pairs(ints_zero(), m, repeat_16_bytes(sums_hi));
            const ints of_both = dot_pairs(ints_left(of_hi, 7), m, repeat_16_bytes(sums_lo));
            vec *to = &sums[t].sub_minima[i * 4 / LANES];
            *to = vec_fma(vec_from_ints(of_both), vec_mul(d, vec_all(x[t].dx[b])), *to);
        }
    }
}

/* A block of four rows. */
VEC_INLINE void k_block_sums(const int format, const int64_t T, token_sums *sums, const uint8_t *const w[4],
                             int64_t at, const gemv_activations *x, int64_t b) {
    enum { PIECES = QK_K / (4 * LANES) };
    const vec_scales d = load_f16_of_4_rows(w, at + (format == Q6_K ? 208 : 0), 0);
    float d_lo[GEMV_TOKENS][4 * BLOCKS_PER_STEP], d_hi[GEMV_TOKENS][4 * BLOCKS_PER_STEP];
    for (int64_t t = 0; t < T; t++) {
        const vec_scales both = scales_mul(d, scales_all(x[t].dx[b]));
        scales_store(d_lo[t], both);
        scales_store(d_hi[t], scales_mul(both, scales_all(128)));
    }
    STAYS_STORED(d_lo);
    STAYS_STORED(d_hi);
    uint8_t scales[4][16];
    if (has_minima(format)) k_minima(scales, T, sums, w, at, x, b);
    STAYS_STORED(scales);
    for (int i = 0; i < 4; i++) {
        const uint8_t *p = w[i] + at;
        const ints sc = repeat_16_bytes(format == Q6_K ? p + 192 : scales[i]);
        ints q[PIECES], own[PIECES];
#pragma GCC unroll 8 /* every shift and every shuffle gets its constant */
        for (int k = 0; k < PIECES; k++) {
            q[k] = unpack_k_bytes(format, p, k * 4 * LANES);
            own[k] = format == Q6_K ? shorts_repeat_i8(sc, k * 4 * LANES / 16)
                                    : shorts_repeat_u8(sc, k * 4 * LANES / 32);
        }
        for (int64_t t = 0; t < T; t++) {
            const int8_t *hi = x[t].bytes + 2 * QK_K * b, *lo = hi + QK_K;
            ints dot_hi = ints_zero(), dot_lo = ints_zero();
            if (format == Q6_K) { /* what q' is more than it stands for, 32 */
                const ints all = shorts_from_16_i8(p + 192);
                dot_hi = dot_pairs(dot_hi, all, shorts_load_16(x[t].k_sums + 32 * b));
                dot_lo = dot_pairs(dot_lo, all, shorts_load_16(x[t].k_sums + 32 * b + 16));
            }
#pragma GCC unroll 8
            for (int k = 0; k < PIECES; k++) {
                dot_hi = dot_pairs(dot_hi, dot_bytes(q[k], ints_load(hi + k * 4 * LANES)), own[k]);
                dot_lo = dot_pairs(dot_lo, dot_bytes(q[k], ints_load(lo + k * 4 * LANES)), own[k]);
            }
            vec *to = &sums[t].rows[i];
            *to = vec_fma(vec_from_ints(dot_hi), vec_all(d_hi[t][i * BLOCKS_PER_STEP]), *to);
            *to = vec_fma(vec_from_ints(dot_lo), vec_all(d_lo[t][i * BLOCKS_PER_STEP]), *to);
        }
    }
}

/* Four rows of T tokens. */
VEC_INLINE void gemv_quantized_4_rows(const int format, const int64_t T, const linear_args *a,
                                      const gemv_activations *x, int64_t r, int64_t quarter, int64_t end) {
    const int64_t weights = block_weights(format), bytes = block_bytes(format), blocks = a->IN / weights;
    const uint8_t *w[4];
    token_sums sums[GEMV_TOKENS];
    for (int64_t t = 0; t < T; t++) {
        for (int i = 0; i < 4; i++) sums[t].rows[i] = vec_zero();
        for (int i = 0; i < 16 / LANES; i++) sums[t].sub_minima[i] = vec_zero();
        sums[t].minima = scales_zero();
    }
    row_pointers(w, a, r, quarter, end);
    for (int64_t b = 0; b < blocks; b += is_k(format) ? 1 : BLOCKS_PER_STEP) {
        const int64_t at = b * bytes, next = b + 1 < blocks ? bytes : 0;
        for (int i = 0; i < 4; i++) prefetch(w[i] + at, is_k(format) ? bytes : BLOCKS_PER_STEP * bytes);
        if (is_k(format))
            k_block_sums(format, T, sums, w, at, x, b);
        else /* beside the last block lies itself, with dx = 0 */
            block_sums(format, T, sums, w, at, next, x, b / BLOCKS_PER_STEP);
    }
    for (int64_t t = 0; t < T; t++) {
        float four[4], more[16];
        const int each = is_k(format) ? 4 : BLOCKS_PER_STEP;
        _mm_storeu_ps(four, vec_sums(sums[t].rows[0], sums[t].rows[1], sums[t].rows[2], sums[t].rows[3]));
        if (is_k(format))
            for (int i = 0; i < 16; i += LANES) vec_store(more + i, sums[t].sub_minima[i / LANES]);
        else
            scales_store(more, sums[t].minima);
        for (int i = 0; i < 4; i++)
            if (r + i * quarter < end) {
                float y = four[i];
                for (int j = 0; j < each; j++) y += more[i * each + j];
                a->y[t * a->OUT + r + i * quarter] = y;
            }
    }
}

VEC_INLINE void gemv_quantized(const int format, const linear_args *a, int64_t begin, int64_t end) {
    const int64_t quarter = (end - begin + 3) / 4;
    gemv_activations x[GEMV_TOKENS];
    for (int64_t t = 0; t < a->T; t++) x[t] = gemv_activations_at(a->x, format, a->IN, t);
    for (int64_t r = begin; r < begin + quarter; r++) switch (a->T) {
#define CASE(T)                                                                                              \
    case T: gemv_quantized_4_rows(format, T, a, x, r, quarter, end); break;
            EACH_GEMV_T(CASE)
#undef CASE
        }
}

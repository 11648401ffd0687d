/* linear for one to four tokens, as in decoding: GEMV, in vectors. Every weight is used once or a few times,
 * so the bandwidth of the memory is the limit.
 *
 *     for r in begin .. begin + quarter      four rows of w at once, a quarter of the thread's share apart
 *         for each block of the rows         BLOCKS_PER_STEP blocks, or one of a K format
 *             unpack                         once for all tokens
 *             for t in 0 .. T                sums[t] += block @ x[t], in lanes, in registers
 *         y[:, r and the three others] = sums
 *
 *     memory     r              =====>
 *                r + quarter    =====>       a few long streams are the fastest way to read memory, and four
 *                r + 2 quarter  =====>       chains of additions hide each other's latency
 *                r + 3 quarter  =====>
 *
 * The products of a row are summed in lanes, in ascending order, and the lanes in one tree (vec_store_sums).
 * A thread reads 13 GB/s and more, so a block of 18 bytes (Q4_0) has 1.4 ns, some 4 cycles. From about five
 * tokens on the panels of linear_gemm.c are faster.
 *
 * Sums of whole numbers are int32, and none can overflow:
 *
 *     formats           what is summed                       at most                                   below
 *     of 32             4 products of q' and q a lane        4 * 128 * 8191        =     4,193,792    2^31
 *     K, bytes          2 products of q' and hi or lo        2 * 63 * 127          =        16,002    2^15
 *     K, a block        256 of them, times the scales        256 * 63 * 127 * 128  =   262,176,768    2^31
 *     Q4_K Q5_K, m      2 sums of hi a lane, times 128 m     2 * 2,048 * 128 * 63  =    33,030,144    2^31
 *     Q6_K, zero        16 of k_sums, times the scales       16 * 32,764 * 128     =    67,100,672    2^31
 *
 * Compiled once for each instruction set: all of it is vector forms (README.md).
 * tests/kernels/test_quantized_activations.py and tests/kernels/test_kernels.py compare it with NumPy. */
#include "dispatch.h"
#include "formats.h"
#include "vec.h"

/* Pointers to row r and the three others. A row behind the end is replaced by the last one. */
VEC_INLINE void row_pointers(const int format, const uint8_t *w[4], const linear_args *a, int64_t r,
                             int64_t quarter, int64_t end) {
    const int64_t row_bytes = a->w.IN / block_weights(format) * block_bytes(format);
    for (int i = 0; i < 4; i++) {
        const int64_t row = r + i * quarter;
        w[i] = (const uint8_t *)a->w.data + (row < end ? row : end - 1) * row_bytes;
    }
}

/* Bytes from the block at work to those that are prefetched: decoding is 10-20% faster. The CPU itself
 * prefetches only within a page of 4 KB. It comes too late where much arithmetic stands between two reads. */
enum { PREFETCH_AHEAD = 2048 };

/* ---------------------------------------------------------------- floats: F32, F16, BF16 */

VEC_INLINE vec floats_of(const int format, const uint8_t *p) {
    switch (format) {
    case F32: return vec_load(p);
    case F16: return vec_from_f16(p);
    case BF16: return vec_from_bf16(p);
    }
    return vec_zero(); /* not reached: the others are blocks */
}

VEC_INLINE void gemv_floats_4_rows(const int format, const int64_t T, const linear_args *a, int64_t r,
                                   int64_t quarter, int64_t end) {
    const int64_t bytes = block_bytes(format) / QK;
    const float *x = a->x;
    const uint8_t *w[4];
    vec sum[GEMV_TOKENS][4];
    for (int64_t t = 0; t < T; t++)
        for (int i = 0; i < 4; i++) sum[t][i] = vec_zero();
    row_pointers(format, w, a, r, quarter, end);
    for (int64_t b = 0; b < a->w.IN; b += QK) {
        for (int i = 0; i < 4; i++) prefetch_to_l1(w[i] + b * bytes + PREFETCH_AHEAD, QK * bytes);
        for (int64_t k = b; k < b + QK; k += LANES)
            for (int i = 0; i < 4; i++) {
                const vec floats = floats_of(format, w[i] + k * bytes);
                for (int64_t t = 0; t < T; t++)
                    sum[t][i] = vec_fma(floats, vec_load(x + t * a->w.IN + k), sum[t][i]);
            }
    }
    for (int64_t t = 0; t < T; t++) {
        float four[4];
        vec_store_sums(four, sum[t][0], sum[t][1], sum[t][2], sum[t][3]);
        for (int i = 0; i < 4; i++)
            if (r + i * quarter < end) a->y[t * a->w.OUT + r + i * quarter] = four[i];
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

/* ---------------------------------------------------------------- quantized activations: formats of 32
 *
 * A lane sums the products of its places in a block; the sum is scaled as a float. unpack.h has pictures of
 * the blocks. */

/* q' as stored, for the first and the second sixteen weights of each block of a step, `next` bytes apart. */
VEC_INLINE void unpack_halves(const int format, ints half[2], const uint8_t *p, int64_t next) {
    const nl_format f = format_of(format);
    if (format == Q8_0) {
        half[0] = sixteens_from_i8(p + f.quants, next);
        half[1] = sixteens_from_i8(p + f.quants + 16, next);
        return;
    }
    const ints bytes = sixteens_from_u8(p + f.quants, next);
    half[0] = ints_and(bytes, shorts_all(15));
    half[1] = shorts_right(bytes, 4);
    if (f.high != NONE)
        for (int i = 0; i < 2; i++)
            half[i] = ints_or(half[i], shorts_left(sixteens_from_bits(p + f.high + 2 * i, next), 4));
}

/* A float16 of each block of a step, of four rows, as floats: row beside row. */
VEC_INLINE vec_scales load_f16_of_4_rows(const uint8_t *const w[4], int64_t at, int64_t next) {
    uint64_t halves[2] = {0, 0};
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < BLOCKS_PER_STEP; j++) {
            const int place = i * BLOCKS_PER_STEP + j;
            halves[place / 4] |= (uint64_t)load_u16(w[i] + at + j * next) << 16 * (place % 4);
        }
    return scales_from_f16(halves);
}

/* The sums of a token with four rows. `rows` sums products, in lanes. `minima` sums m * dx * (sum of q), in
 * BLOCKS_PER_STEP lanes for each row. In a K format `sub_minima` does, in four lanes for each row. */
typedef struct {
    vec rows[4], sub_minima[16 / LANES];
    vec_scales minima;
} token_sums;

/* A step: BLOCKS_PER_STEP blocks of four rows, times T tokens. */
VEC_INLINE void block_sums(const int format, const int64_t T, token_sums *sums, const uint8_t *const w[4],
                           int64_t at, int64_t next, const gemv_activations *x, int64_t step) {
    const nl_format f = format_of(format);
    const vec_scales d = load_f16_of_4_rows(w, at + f.d, next);
    const vec_scales m = has_minima(format) ? load_f16_of_4_rows(w, at + f.m, next) : scales_zero();
    float scale[GEMV_TOKENS][4 * BLOCKS_PER_STEP];
    for (int64_t t = 0; t < T; t++) {
        const vec_scales of_x = scales_load(x[t].sums + step * 4 * BLOCKS_PER_STEP);
        const vec_scales both = scales_mul(d, scales_load(x[t].dx + step * 4 * BLOCKS_PER_STEP));
        if (has_minima(format)) sums[t].minima = scales_fma(m, of_x, sums[t].minima);
        if (f.zero) sums[t].minima = scales_fma(both, of_x, sums[t].minima);
        scales_store(scale[t], both);
    }
    STAYS_STORED(scale);
    for (int i = 0; i < 4; i++) {
        ints half[2];
        unpack_halves(format, half, w[i] + at, next);
        for (int64_t t = 0; t < T; t++) {
            const int16_t *x_q = x[t].q + step * 4 * LANES;
            const ints dot = dot_pairs(dot_pairs(ints_zero(), half[0], ints_load(x_q)), half[1],
                                       ints_load(x_q + 2 * LANES));
            sums[t].rows[i] = vec_fma(vec_from_ints(dot),
                                      sixteens_from_floats(scale[t] + i * BLOCKS_PER_STEP), sums[t].rows[i]);
        }
    }
}

/* ---------------------------------------------------------------- quantized activations: K formats
 *
 * Their q' are bytes without a sign, and half of the work would be to widen them. So x comes as bytes, too:
 *
 *     x  =  128 hi + lo,    hi -64 .. 63,  lo 0 .. 127
 *
 * Each q' is multiplied with both. Pairs of products are 16-bit integers (vpmaddubsw), which are multiplied
 * with the sub-blocks' scales in pairs, to 32 bits. The sums over hi and over lo are floats before they are
 * added. */

/* Weights k .. k + 4 LANES of a block: bytes 0 .. 15, 31 or 63. */
VEC_INLINE ints unpack_k_bytes(const int format, const uint8_t *p, int k) {
    const nl_format f = format_of(format);
    const int s = k / QK; /* sub-block of 32; AVX-512 takes s and s + 1 */
    if (format == Q6_K) {
        const ints low = ints_load(p + f.quants + s / 4 * 64 + s % 2 * 32),
                   upper = repeat_32_bytes(p + f.high + s / 4 * 32);
        const int to = 4 - s % 4 * 2; /* bits 2 (s % 4) and the next become bits 4 and 5 */
        return ints_or_and(ints_and(ints_right(low, s % 4 / 2 * 4), bytes_all(15)),
                           repeated_left(upper, to, to - 2), bytes_all(48));
    }
    const ints pairs = repeat_32_bytes(p + f.quants + s / 2 * 32);
    const ints q = ints_and(repeated_left(pairs, -(s % 2 * 4), -4), bytes_all(15));
    return format == Q5_K
               ? ints_or_and(q, repeated_left(repeat_32_bytes(p + f.high), 4 - s, 3 - s), bytes_all(16))
               : q;
}

/* The scales of a block of Q4_K or Q5_K: see unpack_k_scales in unpack.h. `head` has the first 16 bytes of
 * it, for LANES / 4 rows.
 * -> eight scales, eight minima: a byte each. */
VEC_INLINE ints k_scales(ints head) {
    const ints low = ints_right_each(ints_order(head, 1, 3, 2, 3), ints_fours(0, 0, 0, 4));
    const ints upper = ints_right(ints_order(head, 1, 1, 2, 2), 2);
    return ints_or_and(ints_and(low, ints_fours(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f)), upper,
                       ints_fours(0, 0x30303030, 0, 0x30303030));
}

/* A block of Q4_K or Q5_K, four rows: its minima are summed, its scales unpacked. */
VEC_INLINE void k_minima(const int format, uint8_t scales[4][16], const int64_t T, token_sums *sums,
                         const uint8_t *const w[4], int64_t at, const gemv_activations *x, int64_t b) {
    float dmin[4 * BLOCKS_PER_STEP];
    scales_store(dmin, load_f16_of_4_rows(w, at + format_of(format).m, 0));
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

/* A block of four rows, times T tokens. */
VEC_INLINE void k_block_sums(const int format, const int64_t T, token_sums *sums, const uint8_t *const w[4],
                             int64_t at, const gemv_activations *x, int64_t b) {
    enum { PIECES = QK_K / (4 * LANES) };
    const nl_format f = format_of(format);
    const vec_scales d = load_f16_of_4_rows(w, at + f.d, 0);
    float d_lo[GEMV_TOKENS][4 * BLOCKS_PER_STEP], d_hi[GEMV_TOKENS][4 * BLOCKS_PER_STEP];
    for (int64_t t = 0; t < T; t++) {
        const vec_scales both = scales_mul(d, scales_all(x[t].dx[b]));
        scales_store(d_lo[t], both);
        scales_store(d_hi[t], scales_mul(both, scales_all(128)));
    }
    STAYS_STORED(d_lo);
    STAYS_STORED(d_hi);
    uint8_t scales[4][16];
    if (has_minima(format)) k_minima(format, scales, T, sums, w, at, x, b);
    STAYS_STORED(scales);
    for (int i = 0; i < 4; i++) {
        const uint8_t *p = w[i] + at;
        const ints sc = repeat_16_bytes(format == Q6_K ? p + f.scales : scales[i]);
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
            if (format == Q6_K) { /* the zero point: k_sums are -32 times sums of x */
                const ints all = shorts_from_16_i8(p + f.scales);
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

/* Four rows, times T tokens. */
VEC_INLINE void gemv_quantized_4_rows(const int format, const int64_t T, const linear_args *a,
                                      const gemv_activations *x, int64_t r, int64_t quarter, int64_t end) {
    const int64_t weights = block_weights(format), bytes = block_bytes(format), blocks = a->w.IN / weights;
    const uint8_t *w[4];
    token_sums sums[GEMV_TOKENS];
    for (int64_t t = 0; t < T; t++) {
        for (int i = 0; i < 4; i++) sums[t].rows[i] = vec_zero();
        for (int i = 0; i < 16 / LANES; i++) sums[t].sub_minima[i] = vec_zero();
        sums[t].minima = scales_zero();
    }
    row_pointers(format, w, a, r, quarter, end);
    for (int64_t b = 0; b < blocks; b += is_k(format) ? 1 : BLOCKS_PER_STEP) {
        const int64_t at = b * bytes, next = b + 1 < blocks ? bytes : 0;
        const int64_t step_bytes = is_k(format) ? bytes : BLOCKS_PER_STEP * bytes;
        for (int i = 0; i < 4; i++) prefetch_to_l1(w[i] + at + PREFETCH_AHEAD, step_bytes);
        if (is_k(format))
            k_block_sums(format, T, sums, w, at, x, b);
        else /* an odd last block is taken twice, the second time with dx = 0 */
            block_sums(format, T, sums, w, at, next, x, b / BLOCKS_PER_STEP);
    }
    for (int64_t t = 0; t < T; t++) {
        float four[4], more[16];
        const int each = is_k(format) ? 4 : BLOCKS_PER_STEP;
        vec_store_sums(four, sums[t].rows[0], sums[t].rows[1], sums[t].rows[2], sums[t].rows[3]);
        if (is_k(format))
            for (int i = 0; i < 16; i += LANES) vec_store(more + i, sums[t].sub_minima[i / LANES]);
        else
            scales_store(more, sums[t].minima);
        for (int i = 0; i < 4; i++)
            if (r + i * quarter < end) {
                float y = four[i];
                for (int j = 0; j < each; j++) y += more[i * each + j];
                a->y[t * a->w.OUT + r + i * quarter] = y;
            }
    }
}

VEC_INLINE void gemv_quantized(const int format, const linear_args *a, int64_t begin, int64_t end) {
    const int64_t quarter = (end - begin + 3) / 4;
    gemv_activations x[GEMV_TOKENS];
    for (int64_t t = 0; t < a->T; t++) x[t] = gemv_activations_of(a->x, format, a->w.IN, t);
    for (int64_t r = begin; r < begin + quarter; r++) switch (a->T) {
#define CASE(T)                                                                                              \
    case T: gemv_quantized_4_rows(format, T, a, x, r, quarter, end); break;
            EACH_GEMV_T(CASE)
#undef CASE
        }
}

/* unpack: from the bytes of each format into a panel of linear_gemm.c, LANES rows at once, one in each lane.
 *
 * Each lane reads 4 bytes of its row. A panel holds pairs of 16-bit integers, as dot_pairs multiplies them. A
 * pair is weights k and k + 2, because bytes i and i + 2 lie in the two halves of the same 32 bits. So one
 * shift and one mask make a pair.
 *
 *     a lane       byte 0   byte 1   byte 2   byte 3
 *     pair 0       byte 0 ---------- byte 2                  lane         & 0x00ff00ff
 *     pair 1                byte 1 ---------- byte 3         (lane >> 8)  & 0x00ff00ff
 *
 * In the pictures q5 is the whole number of weight 5, | separates bytes, and a byte begins with its low bits.
 *
 * Compiled once for each instruction set, as a part of linear_gemm.c (README.md). */
#include "dispatch.h"
#include "formats.h"
#include "vec.h"

/* w[0: NR, 0: KC], transposed: row r of w is column r. */
typedef struct {
    int32_t pairs[KC / 2][NR];            /* q', which in K formats are multiplied with their scales */
    float d[KC / QK][NR], m[KC / QK][NR]; /* d for each unit of the format, m for each 32 weights */
    float floats[KC][NR];                 /* the exact way: the weights themselves */
} panel;

/* LANES rows of w, which become columns `column` .. column + LANES - 1 of a panel. */
typedef struct {
    panel *to;
    int64_t column;
    int64_t at[LANES]; /* bytes from the first row to each */
    ints at_lanes;     /* the same in a register */
} panel_rows;

/* clang-format off */
/* Products are summed in int32 over a unit of weights; then the sum is scaled and added to a float32. No sum
 * overflows, because unit * |q'| * 8191 is below 2^31 = 2,147,483,648:
 *
 *          format   unit   |q'| at most         the largest sum */
#define EACH_UNIT(ROW)                                              \
    ROW(    F32,      32,   0       )  /* is never quantized     */ \
    ROW(    F16,      32,   8191    )  /*          2,146,959,392 */ \
    ROW(    BF16,     32,   8191    )  /*          2,146,959,392 */ \
    ROW(    Q8_0,     32,   128     )  /*             33,550,336 */ \
    ROW(    Q4_0,     32,   8       )  /*              2,096,896 */ \
    ROW(    Q4_1,     32,   15      )  /*              3,931,680 */ \
    ROW(    Q5_0,     32,   16      )  /*              4,193,792 */ \
    ROW(    Q5_1,     32,   31      )  /*              8,125,472 */ \
    ROW(    Q4_K,    256,   63 * 15 )  /*          1,981,566,720 */ \
    ROW(    Q5_K,    128,   63 * 31 )  /*          2,047,618,944 */ \
    ROW(    Q6_K,     64,   128 * 32)  /*          2,147,221,504 */
/* clang-format on */

#define ROW(FORMAT, UNIT, LARGEST)                                                                           \
    _Static_assert((int64_t)(UNIT) * (LARGEST) * X_MAX <= INT32_MAX, #FORMAT " overflows");
EACH_UNIT(ROW)
#undef ROW

INLINE int unit_of(const int format) {
    switch (format) {
#define ROW(FORMAT, UNIT, LARGEST)                                                                           \
    case FORMAT: return UNIT;
        EACH_UNIT(ROW)
#undef ROW
    }
    return QK; /* not reached */
}

/* ---------------------------------------------------------------- shared by the formats */

VEC_INLINE void store_pair(const panel_rows *rows, int64_t pair, ints q) {
    ints_store(rows->to->pairs[pair] + rows->column, q);
}
VEC_INLINE void store_d(const panel_rows *rows, int64_t unit, vec d) {
    vec_store(rows->to->d[unit] + rows->column, d);
}
VEC_INLINE void store_m(const panel_rows *rows, int64_t block, vec m) {
    vec_store(rows->to->m[block] + rows->column, m);
}
VEC_INLINE void store_float(const panel_rows *rows, int64_t k, vec w) {
    vec_store(rows->to->floats[k] + rows->column, w);
}

/* A pair: bytes i and i + 2, shifted right by `from` bits, and only the bits of `mask`. */
VEC_INLINE ints pair_of(ints four, const int i, const int from, const int mask) {
    return ints_and(ints_right(four, from + 8 * i), ints_all(mask | mask << 16));
}
/* q with its bits `mask` (4 and up). They are the bits from `from` on of bytes i and i + 2 of `high`. */
VEC_INLINE ints with_high(ints q, ints high, const int i, const int from, const int mask) {
    const int left = 4 - from - 8 * i;
    return ints_or_and(q, repeated_left(high, left, left), ints_all(mask | mask << 16));
}
/* The low 16 bits as both integers of a pair. */
VEC_INLINE ints twice(ints a) { return ints_or(ints_and(a, ints_all(0xffff)), ints_left(a, 16)); }

/* ---------------------------------------------------------------- formats of 32 weights */

/* d is at byte 0; the 16 bits behind it are m in formats that have one. */
VEC_INLINE void unpack_d_m(const int format, const panel_rows *rows, int64_t k, const uint8_t *p) {
    const ints d_m = rows_u32(p, rows->at_lanes);
    store_d(rows, k / QK, vec_from_low_f16(d_m));
    if (has_minima(format)) store_m(rows, k / QK, vec_from_low_f16(ints_right(d_m, 16)));
}

/* 16 bytes of two numbers each, and the fifth bits of formats that have them. */
VEC_INLINE void unpack_nibbles(const int format, const panel_rows *rows, int64_t k, const uint8_t *p) {
    const nl_format f = format_of(format);
    ints fours[4], fifth = ints_zero();
    if (f.high != NONE) fifth = rows_u32(p + f.high, rows->at_lanes);
    rows_4_u32(fours, p + f.quants, rows->at);
    for (int j = 0; j < 4; j++)
        for (int upper = 0; upper < 2; upper++)
            for (int i = 0; i < 2; i++) {
                ints q = pair_of(fours[j], i, 4 * upper, 15);
                if (f.high != NONE) {
                    const int bit = 16 * upper + 4 * j + i; /* and that two places on */
                    const ints one = ints_and(ints_right(fifth, bit), ints_all(1));
                    const ints other = ints_and(ints_right(fifth, bit + 2), ints_all(1));
                    q = ints_or(q, ints_or(ints_left(one, 4), ints_left(other, 20)));
                }
                store_pair(rows, k / 2 + 8 * upper + 2 * j + i, shorts_add(q, shorts_all(-f.zero)));
            }
}

/* Q8_0, 34 bytes:      d d | q0 | q1 | q2 | ... | q31
 *
 *     w = d * q,  q with a sign */
VEC_INLINE void unpack_q8_0(const panel_rows *rows, int64_t k, const uint8_t *p) {
    ints fours[4];
    unpack_d_m(Q8_0, rows, k, p);
    for (int j = 0; j < 8; j++) {
        if (j % 4 == 0) rows_4_u32(fours, p + format_of(Q8_0).quants + 4 * j, rows->at);
        store_pair(rows, k / 2 + 2 * j, shorts_signed_right(shorts_left(fours[j % 4], 8), 8));
        store_pair(rows, k / 2 + 2 * j + 1, shorts_signed_right(fours[j % 4], 8));
    }
}

/* Q4_0, 18 bytes:      d d | q0 q16 | q1 q17 | ... | q15 q31
 *
 *     w = d * (q - 8) */
VEC_INLINE void unpack_q4_0(const panel_rows *rows, int64_t k, const uint8_t *p) {
    unpack_d_m(Q4_0, rows, k, p);
    unpack_nibbles(Q4_0, rows, k, p);
}

/* Q4_1, 20 bytes:      d d | m m | q0 q16 | q1 q17 | ... | q15 q31
 *
 *     w = d * q + m */
VEC_INLINE void unpack_q4_1(const panel_rows *rows, int64_t k, const uint8_t *p) {
    unpack_d_m(Q4_1, rows, k, p);
    unpack_nibbles(Q4_1, rows, k, p);
}

/* Q5_0, 22 bytes:      d d | fifth bits of q0 .. q31, four bytes | q0 q16 | q1 q17 | ... | q15 q31
 *
 *     w = d * (q - 16) */
VEC_INLINE void unpack_q5_0(const panel_rows *rows, int64_t k, const uint8_t *p) {
    unpack_d_m(Q5_0, rows, k, p);
    unpack_nibbles(Q5_0, rows, k, p);
}

/* Q5_1, 24 bytes:      d d | m m | fifth bits of q0 .. q31, four bytes | q0 q16 | q1 q17 | ... | q15 q31
 *
 *     w = d * q + m */
VEC_INLINE void unpack_q5_1(const panel_rows *rows, int64_t k, const uint8_t *p) {
    unpack_d_m(Q5_1, rows, k, p);
    unpack_nibbles(Q5_1, rows, k, p);
}

/* ---------------------------------------------------------------- K formats: 256 weights */

/* Q4_K and Q5_K begin with 16 bytes: d, dmin, and the scales s and minima m of eight sub-blocks of 32
 * weights:
 *
 *     d d | dmin dmin | s0 s4' | s1 s5' | s2 s6' | s3 s7'          6 bits, and of s4 .. s7 the upper 2
 *                     | m0 m4' | m1 m5' | m2 m6' | m3 m7'          6 bits, and of m4 .. m7 the upper 2
 *                     | s4 m4  | s5 m5  | s6 m6  | s7 m7           the lower 4 bits of each
 *
 * -> s, in both halves of each lane. d and -dmin * m go into the panel. */
VEC_INLINE void unpack_k_scales(const int format, ints scales[8], const panel_rows *rows, const uint8_t *p) {
    ints head[4];
    rows_4_u32(head, p, rows->at);
    const ints low = head[1], middle = head[2], high = head[3];
    const vec d = vec_from_low_f16(head[0]), dmin = vec_from_low_f16(ints_right(head[0], 16));
    for (int unit = 0; unit < QK_K / unit_of(format); unit++) store_d(rows, unit, d);
    for (int i = 0; i < 8; i++) {
        ints s, m;
        const int byte = 8 * (i % 4);
        if (i < 4) {
            s = ints_and(ints_right(low, byte), ints_all(63));
            m = ints_and(ints_right(middle, byte), ints_all(63));
        } else {
            s = ints_or(ints_and(ints_right(high, byte), ints_all(15)),
                        ints_left(ints_and(ints_right(low, byte + 6), ints_all(3)), 4));
            m = ints_or(ints_and(ints_right(high, byte + 4), ints_all(15)),
                        ints_left(ints_and(ints_right(middle, byte + 6), ints_all(3)), 4));
        }
        store_m(rows, i, vec_mul(vec_from_ints(m), vec_sub(vec_zero(), dmin)));
        scales[i] = twice(s);
    }
}

/* Four runs of 32 bytes, each of two sub-blocks: -> s * q. `fifth`: the bytes of fifth bits, in Q5_K. */
VEC_INLINE void unpack_k_quants(const int format, const ints scales[8], const ints fifth[8],
                                const panel_rows *rows, const uint8_t *p) {
    ints fours[8];
    for (int run = 0; run < 4; run++) {
        for (int j = 0; j < 8; j += 4)
            rows_4_u32(fours + j, p + format_of(format).quants + 32 * run + 4 * j, rows->at);
        for (int i = 2 * run; i < 2 * run + 2; i++)
            for (int j = 0; j < 8; j++)
                for (int l = 0; l < 2; l++) {
                    ints q = pair_of(fours[j], l, i % 2 * 4, 15);
                    if (format == Q5_K) q = with_high(q, fifth[j], l, i, 16);
                    store_pair(rows, 16 * i + 2 * j + l, shorts_mul(q, scales[i]));
                }
    }
}

/* Q4_K, 144 bytes:     d, dmin, s, m | q0 q32 | q1 q33 | ... | q31 q63 | q64 q96 | ... | q223 q255
 *
 *     w = d * s * q - dmin * m */
VEC_INLINE void unpack_q4_k(const panel_rows *rows, const uint8_t *p) {
    ints scales[8];
    unpack_k_scales(Q4_K, scales, rows, p);
    unpack_k_quants(Q4_K, scales, NULL, rows, p);
}

/* Q5_K, 176 bytes:     d, dmin, s, m | 32 bytes of fifth bits | q0 q32 | q1 q33 | ... | q223 q255
 *
 *     fifth     q0 q32 q64 .. q224 | q1 q33 q65 .. q225 | ... | q31 q63 q95 .. q255
 *
 *     w = d * s * q - dmin * m */
VEC_INLINE void unpack_q5_k(const panel_rows *rows, const uint8_t *p) {
    ints scales[8], fifth[8];
    unpack_k_scales(Q5_K, scales, rows, p);
    for (int j = 0; j < 8; j += 4) rows_4_u32(fifth + j, p + format_of(Q5_K).high + 4 * j, rows->at);
    unpack_k_quants(Q5_K, scales, fifth, rows, p);
}

/* Q6_K, 210 bytes:     128 bytes of low four bits | 64 of high two bits | s0 | s1 | ... | s15 | d d
 *
 *     low       q0 q64 | q1 q65 | ... | q63 q127 | q128 q192 | ... | q191 q255
 *     high      q0 q32 q64 q96 | q1 q33 q65 q97 | ... | q31 .. q127 | q128 q160 q192 q224 | ... | q255
 *
 *     w = d * s * (q - 32),  s with a sign, for 16 weights */
VEC_INLINE void unpack_q6_k(const panel_rows *rows, const uint8_t *p) {
    const nl_format f = format_of(Q6_K);
    const ints d_at_the_end = rows_u32(p + f.d - 2, rows->at_lanes); /* reads nothing behind the block */
    const vec d = vec_from_low_f16(ints_right(d_at_the_end, 16));
    ints scales[4], low[16], high[8];
    for (int unit = 0; unit < QK_K / unit_of(Q6_K); unit++) store_d(rows, unit, d);
    rows_4_u32(scales, p + f.scales, rows->at);
    for (int i = 0; i < 8; i++) { /* sub-blocks of 32; four of them share 64 bytes of low bits, 32 of high */
        for (int j = 0; j < (i % 4 ? 0 : 16); j += 4)
            rows_4_u32(low + j, p + f.quants + i * 16 + 4 * j, rows->at);
        for (int j = 0; j < (i % 4 ? 0 : 8); j += 4)
            rows_4_u32(high + j, p + f.high + i * 8 + 4 * j, rows->at);
        for (int j = 0; j < 8; j++) {
            const ints s = ints_signed_right(ints_left(scales[i / 2], 24 - 8 * (i % 2 * 2 + j / 4)), 24);
            for (int l = 0; l < 2; l++) {
                ints q = pair_of(low[i % 2 * 8 + j], l, i % 4 / 2 * 4, 15);
                q = shorts_add(with_high(q, high[j], l, i % 4 * 2, 48), shorts_all(-f.zero));
                store_pair(rows, 16 * i + 2 * j + l, shorts_mul(q, twice(s)));
            }
        }
    }
}

/* ---------------------------------------------------------------- single numbers */

VEC_INLINE vec float_of_low_half(const int format, ints low) {
    return format == F16 ? vec_from_low_f16(low) : vec_of_bits(ints_left(low, 16));
}

/* 32 floats of each lane are quantized as activations are: the largest of them gives d. */
VEC_INLINE void quantize_floats(const int format, const panel_rows *rows, int64_t k, const uint8_t *p) {
    vec w[QK];
    ints largest = ints_zero(), twos[4];
    for (int j = 0; j < 16; j++) {
        if (j % 4 == 0) rows_4_u32(twos, p + 4 * j, rows->at);
        const ints two = twos[j % 4];
        for (int i = 0; i < 2; i++) {
            const ints one = i ? ints_right(two, 16) : ints_and(two, ints_all(0xffff));
            w[2 * j + i] = float_of_low_half(format, one);
            largest = ints_max(largest, ints_and(bits_of_vec(w[2 * j + i]), ints_all(0x7fffffff)));
        }
    }
    /* below 1e-30 every weight becomes 0, because 8191 / max must stay finite */
    const vec max = vec_of_bits(largest), lowest = vec_all(1e-30f);
    const vec inverse = vec_zero_below(max, lowest, vec_div(vec_all(X_MAX), vec_max(lowest, max)));
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 2; i++) {
            const ints one = ints_from_vec(vec_mul(w[4 * j + i], inverse));
            const ints other = ints_from_vec(vec_mul(w[4 * j + 2 + i], inverse));
            store_pair(rows, k / 2 + 2 * j + i,
                       ints_or(ints_and(one, ints_all(0xffff)), ints_left(other, 16)));
        }
    store_d(rows, k / QK, vec_zero_below(max, lowest, vec_mul(max, vec_all(1.0f / X_MAX))));
}

/* F16:      w0 w0 | w1 w1 | ...          float16 */
VEC_INLINE void unpack_f16(const panel_rows *rows, int64_t k, const uint8_t *p) {
    quantize_floats(F16, rows, k, p);
}

/* BF16:     w0 w0 | w1 w1 | ...          the upper half of a float32 */
VEC_INLINE void unpack_bf16(const panel_rows *rows, int64_t k, const uint8_t *p) {
    quantize_floats(BF16, rows, k, p);
}

/* ---------------------------------------------------------------- the exact way: floats */

/* Single numbers as they are; F32:      w0 w0 w0 w0 | w1 w1 w1 w1 | ... */
VEC_INLINE void unpack_exact(const int format, const panel_rows *rows, int64_t k, const uint8_t *p) {
    const int step = 16 / format_of(format).bytes; /* numbers in 16 bytes */
    for (int i = 0; i < QK; i += step) {
        ints fours[4];
        rows_4_u32(fours, p + i * format_of(format).bytes, rows->at);
        for (int j = 0; j < 4; j++)
            if (format == F32) {
                store_float(rows, k + i + j, vec_of_bits(fours[j]));
            } else {
                const ints low = ints_and(fours[j], ints_all(0xffff)), high = ints_right(fours[j], 16);
                store_float(rows, k + i + 2 * j, float_of_low_half(format, low));
                store_float(rows, k + i + 2 * j + 1, float_of_low_half(format, high));
            }
    }
}

/* Blocks: d * q' + m. d has 11 bits and q' up to 13, so d * q' is exact, and one FMA rounds as NumPy does. */
VEC_INLINE void dequantize_panel(const int format, const panel_rows *rows, int64_t kc) {
    const panel *w = rows->to;
    const int64_t column = rows->column;
    for (int64_t pair = 0; pair < kc / 2; pair++) {
        const vec d = vec_load(w->d[2 * pair / unit_of(format)] + column);
        const vec m = has_minima(format) ? vec_load(w->m[2 * pair / QK] + column) : vec_zero();
        const ints two = ints_load(w->pairs[pair] + column);
        const int64_t k = pair / 2 * 4 + pair % 2;
        store_float(rows, k, vec_fma(vec_from_ints(ints_signed_right(ints_left(two, 16), 16)), d, m));
        store_float(rows, k + 2, vec_fma(vec_from_ints(ints_signed_right(two, 16)), d, m));
    }
}

/* ---------------------------------------------------------------- one block of LANES rows, of any format */

VEC_INLINE void unpack(const int format, const int exact, const panel_rows *rows, int64_t k,
                       const uint8_t *p) {
    if (exact && is_single(format)) {
        unpack_exact(format, rows, k, p);
        return;
    }
    switch (format) {
    case F32: break; /* is never quantized */
    case F16: unpack_f16(rows, k, p); break;
    case BF16: unpack_bf16(rows, k, p); break;
    case Q8_0: unpack_q8_0(rows, k, p); break;
    case Q4_0: unpack_q4_0(rows, k, p); break;
    case Q4_1: unpack_q4_1(rows, k, p); break;
    case Q5_0: unpack_q5_0(rows, k, p); break;
    case Q5_1: unpack_q5_1(rows, k, p); break;
    case Q4_K: unpack_q4_k(rows, p); break;
    case Q5_K: unpack_q5_k(rows, p); break;
    case Q6_K: unpack_q6_k(rows, p); break;
    }
}

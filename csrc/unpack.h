/* unpack: from the bytes of each format into registers, LANES rows at once, one in each lane.
 *
 * A register holds four weights of each row, as bytes: weights 4 k .. 4 k + 3 are `fours` k of a block.
 * Packed rows (formats.h) have the same unit of all rows side by side, so a unit is one load. One shift and
 * one mask make the q of four weights of it. In the pictures, which show a block as stored, q5 is the whole
 * number of weight 5, | separates bytes, and a byte begins with its low bits.
 *
 * linear_gemv.c multiplies the registers at once; linear_gemm.c stores them in a panel first. Rows of single
 * numbers are not packed: for a panel each lane reads 16 bytes of its own row.
 *
 * Compiled once for each instruction set, as a part of linear_gemv.c and linear_gemm.c (README.md). */
#ifndef NUMPY_LLAMA_UNPACK_H
#define NUMPY_LLAMA_UNPACK_H
#include "dispatch.h"
#include "formats.h"
#include "vec.h"

/* Unit j of the part that begins at byte `at` of a block, of the rows in lanes. */
VEC_INLINE ints unit_of_rows(const uint8_t *p, int at, int j, int64_t column) {
    return ints_load(p + PACKED_ROWS * (at + 4 * j) + 4 * column);
}
VEC_INLINE vec f16_of_rows(const uint8_t *p, int at, int64_t column) {
    return vec_from_f16(p + PACKED_ROWS * at + 2 * column);
}
VEC_INLINE vec d_of_rows(const int format, const uint8_t *p, int64_t column) {
    const nl_format f = format_of(format);
    if (f.d32 == NONE) return f16_of_rows(p, f.d, column);
    return vec_load(p + PACKED_ROWS * f.d32 + 4 * column);
}
/* What the sum of q is multiplied by. */
VEC_INLINE vec scale_of_rows(const int format, const uint8_t *p, int64_t column) {
    const vec d = d_of_rows(format, p, column);
    if (has_table(format)) return vec_mul(d, vec_all(table_unit(format)));
    return format == LLM_INT8 ? vec_mul(d, vec_all(ONE_127TH)) : d;
}

/* What is added to d * q. -d * z of Q4_Z is exact: 11 bits times 5. */
VEC_INLINE vec m_of_rows(const int format, const uint8_t *p, int64_t column) {
    const nl_format f = format_of(format);
    const vec m = f16_of_rows(p, f.m, column);
    return format == Q4_Z ? vec_sub(vec_zero(), vec_mul(f16_of_rows(p, f.d, column), m)) : m;
}

/* ---------------------------------------------------------------- scales
 *
 * Of up to KC weights, packed at p: d[scale][column ...] and m[block][column ...], with rows of `stride`
 * floats. In a K format d is d * s, which is exact: 11 bits times 8. */

/* Q4_K and Q5_K begin with 16 bytes: d, dmin, and the scales s and minima m of eight sub-blocks of 32
 * weights:
 *
 *     d d | dmin dmin | s0 s4' | s1 s5' | s2 s6' | s3 s7'          6 bits, and of s4 .. s7 the upper 2
 *                     | m0 m4' | m1 m5' | m2 m6' | m3 m7'          6 bits, and of m4 .. m7 the upper 2
 *                     | s4 m4  | s5 m5  | s6 m6  | s7 m7           the lower 4 bits of each */
VEC_INLINE void unpack_k_scales(const int format, float *d, float *m, int64_t stride, const uint8_t *p,
                                int64_t column) {
    const nl_format f = format_of(format);
    const vec scale = f16_of_rows(p, f.d, column),
              minus_dmin = vec_sub(vec_zero(), f16_of_rows(p, f.m, column));
    const ints low = unit_of_rows(p, f.scales, 0, column), middle = unit_of_rows(p, f.scales, 1, column),
               high = unit_of_rows(p, f.scales, 2, column);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        ints s, minimum;
        const int byte = 8 * (i % 4);
        if (i < 4) {
            s = ints_and(ints_right(low, byte), ints_all(63));
            minimum = ints_and(ints_right(middle, byte), ints_all(63));
        } else {
            s = ints_or_and(ints_and(ints_right(high, byte), ints_all(15)), ints_right(low, byte + 2),
                            ints_all(48));
            minimum = ints_or_and(ints_and(ints_right(high, byte + 4), ints_all(15)),
                                  ints_right(middle, byte + 2), ints_all(48));
        }
        vec_store(d + i * stride, vec_mul(vec_from_ints(s), scale));
        vec_store(m + i * stride, vec_mul(vec_from_ints(minimum), minus_dmin));
    }
}

/* Q6_K has 16 scales with a sign, a byte each. */
VEC_INLINE void unpack_q6_k_scales(float *d, int64_t stride, const uint8_t *p, int64_t column) {
    const nl_format f = format_of(Q6_K);
    const vec scale = f16_of_rows(p, f.d, column);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        const ints four = unit_of_rows(p, f.scales, i / 4, column);
        const ints s = ints_signed_right(ints_left(four, 24 - 8 * (i % 4)), 24);
        vec_store(d + i * stride, vec_mul(vec_from_ints(s), scale));
    }
}

/* In the exact way LLM_INT8 is multiplied by 1/127 later. */
VEC_INLINE void unpack_scales(const int format, const int exact, float *d, float *m, int64_t stride,
                              const uint8_t *p, int64_t blocks, int64_t column) {
    const nl_format f = format_of(format);
    switch (format) {
    case Q4_K:
    case Q5_K: unpack_k_scales(format, d, m, stride, p, column); break;
    case Q6_K: unpack_q6_k_scales(d, stride, p, column); break;
    default:
        for (int64_t b = 0; b < blocks; b++) {
            const uint8_t *block = p + b / blocks_of_32(format) * PACKED_ROWS * f.bytes;
            vec_store(d + b * stride,
                      exact ? d_of_rows(format, block, column) : scale_of_rows(format, block, column));
            if (has_minima(format)) vec_store(m + b * stride, m_of_rows(format, block, column));
        }
    }
}

/* ---------------------------------------------------------------- whole numbers
 *
 * q[k] = fours k of 32 weights: of the block at p, in a K format of sub-block b of it. */

/* Bits `from` and on of each byte, as bits `to` and on, and only the bits of `mask`. */
VEC_INLINE ints bits_of_bytes(ints four, const int from, const int to, const int mask) {
    return ints_and(from >= to ? ints_right(four, from - to) : ints_left(four, to - from), bytes_all(mask));
}

/* Q8_0, 34 bytes:                d d | q0 | q1 | q2 | ... | q31             w = d * q
 * INT8, LLM_INT8, 36 bytes:      d d d d | q0 | q1 | q2 | ... | q31         w = d * q, w = d * q / 127
 *
 *     q with a sign. Where a product of bytes takes one without a sign: q + 128 */
VEC_INLINE void unpack_bytes(const int format, ints q[8], const uint8_t *p, int64_t column) {
    for (int k = 0; k < 8; k++) {
        q[k] = unit_of_rows(p, format_of(format).quants, k, column);
        if (byte_zero(format)) q[k] = ints_xor(q[k], bytes_all(128));
    }
}

/* Q4_0, 18 bytes:      d d | q0 q16 | q1 q17 | ... | q15 q31                    w = d * (q - 8)
 * Q4_1, 20 bytes:      d d | m m | q0 q16 | q1 q17 | ... | q15 q31              w = d * q + m
 * Q4_Z, 20 bytes:      d d | z z | q0 q16 | q1 q17 | ... | q15 q31              w = d * (q - z)
 *
 * Q5_0, 22 bytes:      d d | fifth bits of q0 .. q31, four bytes | q0 q16 | q1 q17 | ... | q15 q31
 *     w = d * (q - 16)
 * Q5_1, 24 bytes:      d d | m m | fifth bits of q0 .. q31, four bytes | q0 q16 | q1 q17 | ... | q15 q31
 *     w = d * q + m */
VEC_INLINE void unpack_nibbles(const int format, ints q[8], const uint8_t *p, int64_t column) {
    const nl_format f = format_of(format);
    for (int j = 0; j < 4; j++) {
        const ints four = unit_of_rows(p, f.quants, j, column);
        q[j] = bits_of_bytes(four, 0, 0, 15);
        q[4 + j] = bits_of_bytes(four, 4, 0, 15);
    }
    if (f.high == NONE) return;
    const ints fifth = unit_of_rows(p, f.high, 0, column);
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) { /* bits 4 k .. 4 k + 3 become bit 4 of the four bytes */
        const ints four = ints_and(ints_right(fifth, 4 * k), ints_all(15));
        const ints spread = ints_or(ints_or(ints_left(four, 4), ints_left(four, 11)),
                                    ints_or(ints_left(four, 18), ints_left(four, 25)));
        q[k] = ints_or_and(q[k], spread, bytes_all(16));
    }
}

/* Q4_K, 144 bytes:     d, dmin, s, m | q0 q32 | q1 q33 | ... | q31 q63 | q64 q96 | ... | q223 q255
 * Q5_K, 176 bytes:     d, dmin, s, m | 32 bytes of fifth bits | q0 q32 | q1 q33 | ... | q223 q255
 *
 *     fifth     q0 q32 q64 .. q224 | q1 q33 q65 .. q225 | ... | q31 q63 q95 .. q255
 *
 *     w = d * s * q - dmin * m */
VEC_INLINE void unpack_k_nibbles(const int format, ints q[8], const uint8_t *p, const int b, int64_t column) {
    const nl_format f = format_of(format);
    for (int k = 0; k < 8; k++) {
        q[k] = bits_of_bytes(unit_of_rows(p, f.quants, b / 2 * 8 + k, column), b % 2 * 4, 0, 15);
        if (format == Q5_K) q[k] = ints_or(q[k], bits_of_bytes(unit_of_rows(p, f.high, k, column), b, 4, 16));
    }
}

/* Q6_K, 210 bytes:     128 bytes of low four bits | 64 of high two bits | s0 | s1 | ... | s15 | d d
 *
 *     low       q0 q64 | q1 q65 | ... | q63 q127 | q128 q192 | ... | q191 q255
 *     high      q0 q32 q64 q96 | q1 q33 q65 q97 | ... | q31 .. q127 | q128 q160 q192 q224 | ... | q255
 *
 *     w = d * s * (q - 32),  s with a sign, for 16 weights */
VEC_INLINE void unpack_q6_k(ints q[8], const uint8_t *p, const int b, int64_t column) {
    const nl_format f = format_of(Q6_K);
    for (int k = 0; k < 8; k++) {
        const ints low = unit_of_rows(p, f.quants, b / 4 * 16 + b % 2 * 8 + k, column);
        const ints high = unit_of_rows(p, f.high, b / 4 * 8 + k, column);
        q[k] = ints_or(bits_of_bytes(low, b % 4 / 2 * 4, 0, 15), bits_of_bytes(high, b % 4 * 2, 4, 48));
    }
}

/* NF4, FP4, 36 bytes:  d d d d | q0 q4 | q1 q5 | q2 q6 | q3 q7 | q8 q12 | ...    w = d * table[q]
 *
 *     q is replaced by its byte of `table_bytes`. */
VEC_INLINE void unpack_table(const int format, ints q[8], const uint8_t *p, const int b, int64_t column) {
    const ints table = ints_xor(ints_of_16_bytes(table_bytes(format)), bytes_all(byte_zero(format)));
    for (int k = 0; k < 8; k++) {
        const ints unit = unit_of_rows(p, format_of(format).quants, b * 4 + k / 2, column);
        q[k] = bytes_of_table(table, bits_of_bytes(unit, k % 2 * 4, 0, 15));
    }
}

/* 32 weights of LANES rows: the b-th of the block at p. */
VEC_INLINE void unpack_block(const int format, ints q[8], const uint8_t *p, const int b, int64_t column) {
    switch (format) {
    case Q8_0:
    case INT8:
    case LLM_INT8: unpack_bytes(format, q, p, column); break;
    case Q4_0:
    case Q4_1:
    case Q4_Z:
    case Q5_0:
    case Q5_1: unpack_nibbles(format, q, p, column); break;
    case Q4_K:
    case Q5_K: unpack_k_nibbles(format, q, p, b, column); break;
    case Q6_K: unpack_q6_k(q, p, b, column); break;
    case NF4:
    case FP4: unpack_table(format, q, p, b, column); break;
    }
}

/* ---------------------------------------------------------------- codes of floats
 *
 * FP8, 36 bytes:       d d d d | q0 | q1 | ... | q31                             w = d * (q as E4M3)
 *
 * and NF4 and FP4 in the exact way. A unit has the codes of four weights, or of eight. */
INLINE int codes_in_unit(const int format) { return format == FP8 ? 4 : 8; }

/* Code k of a unit, as a float: in FP8 divided by FP8_TIMES. */
VEC_INLINE vec float_of_code(const int format, ints unit, const int k) {
    if (format != FP8) return vec_from_table(table_of(format), ints_right(unit, k % 4 * 8 + k / 4 * 4));
    const ints top = ints_signed_right(ints_left(unit, 24 - 8 * k), 1); /* the sign twice */
    return vec_from_low_f16(ints_right(ints_and(top, ints_all((int32_t)0xbf800000)), 16));
}
VEC_INLINE vec times_of_code(const int format, vec a) {
    return format == FP8 ? vec_mul(a, vec_all(FP8_TIMES)) : a;
}

VEC_INLINE void unpack_codes(const int format, vec w[QK], const uint8_t *p, const int b, int64_t column) {
    const int codes = codes_in_unit(format), units = QK / codes;
    const vec d = d_of_rows(format, p, column);
#pragma GCC unroll 8
    for (int j = 0; j < units; j++) {
        const ints unit = unit_of_rows(p, format_of(format).quants, b * units + j, column);
#pragma GCC unroll 8
        for (int k = 0; k < codes; k++)
            w[j * codes + k] = vec_mul(d, times_of_code(format, float_of_code(format, unit, k)));
    }
}

/* ---------------------------------------------------------------- a panel of linear_gemm.c */

/* w[0: NR, 0: KC], transposed: row r of w is column r. */
typedef struct {
    union {
        int32_t fours[KC / 4][NR]; /* q of block formats */
        int32_t pairs[KC / 2][NR]; /* rounded floats: all other formats */
    };
    float d[KC / 16][NR], m[KC / QK][NR]; /* d for each scale of the format, m for each 32 weights */
    float floats[KC][NR];                 /* the exact way: the weights themselves */
} panel;

/* 32 floats of each lane are quantized as activations are: the largest of them gives d. They are weights
 * k .. k + 31 of columns column .. column + LANES - 1. */
VEC_INLINE void quantize_floats(panel *to, int64_t k, int64_t column, const vec w[QK]) {
    ints largest = ints_zero();
    for (int j = 0; j < QK; j++)
        largest = ints_max(largest, ints_and(bits_of_vec(w[j]), ints_all(0x7fffffff)));
    /* below 1e-30 every weight becomes 0, because 8191 / max must stay finite */
    const vec max = vec_of_bits(largest), lowest = vec_all(1e-30f);
    const vec inverse = vec_zero_below(max, lowest, vec_div(vec_all(X_MAX), vec_max(lowest, max)));
    for (int j = 0; j < 16; j++) {
        const ints one = ints_from_vec(vec_mul(w[2 * j], inverse));
        const ints other = ints_from_vec(vec_mul(w[2 * j + 1], inverse));
        ints_store(to->pairs[k / 2 + j] + column,
                   ints_or(ints_and(one, ints_all(0xffff)), ints_left(other, 16)));
    }
    vec_store(to->d[k / QK] + column, vec_zero_below(max, lowest, vec_mul(max, vec_all(1.0f / X_MAX))));
}

/* Columns column .. column + LANES - 1 of a panel from packed rows at p, from row `lane` on, kc weights of
 * each. */
VEC_INLINE void unpack_packed_codes(const int format, const int exact, panel *to, const uint8_t *p,
                                    int64_t kc, int64_t column, int64_t lane) {
    for (int64_t k = 0; k < kc; p += PACKED_ROWS * block_bytes(format))
        for (int b = 0; b < blocks_of_32(format); b++, k += QK) {
            vec w[QK];
            unpack_codes(format, w, p, b, lane);
            if (exact)
                for (int i = 0; i < QK; i++) vec_store(to->floats[k + i] + column, w[i]);
            else
                quantize_floats(to, k, column, w);
        }
}

VEC_INLINE void unpack_packed(const int format, const int exact, panel *to, const uint8_t *p, int64_t kc,
                              int64_t column, int64_t lane) {
    const int64_t bytes = PACKED_ROWS * block_bytes(format), blocks = kc / QK;
    const int in_block = blocks_of_32(format);
    unpack_scales(format, exact, to->d[0] + column, to->m[0] + column, NR, p, blocks, lane);
#pragma GCC unroll 8 /* in a K format every shift gets its constant */
    for (int b = 0; b < KC / QK; b++) {
        if (b >= blocks) break;
        ints q[8];
        unpack_block(format, q, p + b / in_block * bytes, b % in_block, lane);
        for (int k = 0; k < 8; k++) ints_store(to->fours[8 * b + k] + column, q[k]);
    }
}

/* Blocks in the exact way: d * (q - zero) + m. One of the product and the sum is exact, so one FMA rounds as
 * NumPy does. */
VEC_INLINE void dequantize_panel(const int format, panel *w, int64_t kc, int64_t column) {
    const int zero = byte_zero(format);
    for (int64_t four = 0; four < kc / 4; four++) {
        const vec d = vec_load(w->d[4 * four / scale_weights(format)] + column);
        const vec m = has_minima(format) ? vec_load(w->m[4 * four / QK] + column) : vec_zero();
        const ints q = ints_load(w->fours[four] + column);
        for (int i = 0; i < 4; i++) {
            const ints up = ints_left(q, 24 - 8 * i);
            const ints one = has_sign(format) && !zero ? ints_signed_right(up, 24) : ints_right(up, 24);
            const vec weight = vec_fma(vec_from_ints(ints_add(one, ints_all(-zero))), d, m);
            vec_store(w->floats[4 * four + i] + column,
                      format == LLM_INT8 ? vec_mul(weight, vec_all(ONE_127TH)) : weight);
        }
    }
}

/* LANES rows of single numbers, which become columns `column` .. column + LANES - 1 of a panel. */
typedef struct {
    panel *to;
    int64_t column;
    int64_t at[LANES]; /* bytes from the first row to each */
} panel_rows;

/* ---------------------------------------------------------------- single numbers */

VEC_INLINE vec float_of_low_half(const int format, ints low) {
    return format == F16 ? vec_from_low_f16(low) : vec_of_bits(ints_left(low, 16));
}

/* F32:      w0 w0 w0 w0 | w1 w1 w1 w1 | ...       float32
 * F16:      w0 w0 | w1 w1 | ...                   float16
 * BF16:     w0 w0 | w1 w1 | ...                   the upper half of a float32 */

VEC_INLINE void quantize_single(const int format, const panel_rows *rows, int64_t k, const uint8_t *p) {
    vec w[QK];
    ints twos[4];
    for (int j = 0; j < 16; j++) {
        if (j % 4 == 0) rows_4_u32(twos, p + 4 * j, rows->at);
        const ints two = twos[j % 4];
        w[2 * j] = float_of_low_half(format, ints_and(two, ints_all(0xffff)));
        w[2 * j + 1] = float_of_low_half(format, ints_right(two, 16));
    }
    quantize_floats(rows->to, k, rows->column, w);
}

/* ---------------------------------------------------------------- the exact way: floats */

VEC_INLINE void store_float(const panel_rows *rows, int64_t k, vec w) {
    vec_store(rows->to->floats[k] + rows->column, w);
}

/* Single numbers as they are. */
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

/* 32 numbers of LANES rows. */
VEC_INLINE void unpack_single(const int format, const int exact, const panel_rows *rows, int64_t k,
                              const uint8_t *p) {
    if (exact)
        unpack_exact(format, rows, k, p);
    else if (format != F32) /* which is never quantized */
        quantize_single(format, rows, k, p);
}

#endif

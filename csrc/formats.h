/* The formats in which weights are stored: a table of the places of their bytes, and `weight`, the value of
 * one weight. tests/kernels/test_formats_table.py reads the table through nl_format_at and compares it with
 * numpy_llama/backend/formats.py. The layouts are ggml's. unpack.h has pictures of them. */
#ifndef NUMPY_LLAMA_FORMATS_H
#define NUMPY_LLAMA_FORMATS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

#define INLINE static inline __attribute__((always_inline))

/* The weights in a block, in a block of a K format, and in one of a format with a table. */
enum { QK = 32, QK_K = 256, QK_TABLE = 64, NONE = -1 };

/* clang-format off */
/* A block, by byte offsets:
 *
 *     d, m      float16 numbers
 *     d32       d as a float32 number
 *     scales    the small scales of a K format's sub-blocks, and their minima
 *     high      the bits of q above the low four
 *     quants    q, or its low bits
 *
 * A weight is d * (q - zero) + m. In Q4_K and Q5_K it is d * scale * q - m * minimum, in Q6_K
 * d * scale * (q - zero). In Q4_Z the number in the place of m is a zero of the block: d * (q - m).
 * LLM_INT8, FP8, NF4 and FP4: see `weight`. ggml has no type of their codes.
 *
 *      name        code   weights  bytes     d   d32     m   scales  high  quants   zero */
#define EACH_FORMAT(ROW)                                                                \
    ROW(F32,          0,        1,    4, NONE, NONE, NONE,   NONE, NONE,     0,    0)   \
    ROW(F16,          1,        1,    2, NONE, NONE, NONE,   NONE, NONE,     0,    0)   \
    ROW(BF16,        30,        1,    2, NONE, NONE, NONE,   NONE, NONE,     0,    0)   \
    ROW(Q8_0,         8,       QK,   34,    0, NONE, NONE,   NONE, NONE,     2,    0)   \
    ROW(Q4_0,         2,       QK,   18,    0, NONE, NONE,   NONE, NONE,     2,    8)   \
    ROW(Q4_1,         3,       QK,   20,    0, NONE,    2,   NONE, NONE,     4,    0)   \
    ROW(Q5_0,         6,       QK,   22,    0, NONE, NONE,   NONE,    2,     6,   16)   \
    ROW(Q5_1,         7,       QK,   24,    0, NONE,    2,   NONE,    4,     8,    0)   \
    ROW(Q4_K,        12,     QK_K,  144,    0, NONE,    2,      4, NONE,    16,    0)   \
    ROW(Q5_K,        13,     QK_K,  176,    0, NONE,    2,      4,   16,    48,    0)   \
    ROW(Q6_K,        14,     QK_K,  210,  208, NONE, NONE,    192,  128,     0,   32)   \
    ROW(INT8,     19969,       QK,   36, NONE,    0, NONE,   NONE, NONE,     4,    0)   \
    ROW(LLM_INT8, 19970,       QK,   36, NONE,    0, NONE,   NONE, NONE,     4,    0)   \
    ROW(FP8,      19971,       QK,   36, NONE,    0, NONE,   NONE, NONE,     4,    0)   \
    ROW(NF4,      19972, QK_TABLE,   36, NONE,    0, NONE,   NONE, NONE,     4,    0)   \
    ROW(FP4,      19973, QK_TABLE,   36, NONE,    0, NONE,   NONE, NONE,     4,    0)   \
    ROW(Q4_Z,     19974,       QK,   20,    0, NONE,    2,   NONE, NONE,     4,    0)
/* clang-format on */

enum {
#define ROW(NAME, CODE, ...) NAME = CODE,
    EACH_FORMAT(ROW)
#undef ROW
};

/* The row of the table. Where `code` is a constant, so is every field. An unknown format has no name. */
INLINE nl_format format_of(const int code) {
    switch (code) {
#define ROW(NAME, CODE, ...)                                                                                 \
    case CODE: return (nl_format){#NAME, CODE, __VA_ARGS__};
        EACH_FORMAT(ROW)
#undef ROW
    }
    return (nl_format){NULL, code, 0, 0, NONE, NONE, NONE, NONE, NONE, NONE, 0};
}

INLINE int is_known(int format) { return format_of(format).name != NULL; }
INLINE int is_single(int format) { return format_of(format).weights == 1; }
INLINE int is_k(int format) { return format_of(format).weights == QK_K; }
INLINE int has_minima(int format) { return format_of(format).m != NONE; }

/* The largest |q| of a format that is multiplied in bytes; 0 for all other formats. */
INLINE int largest_q(int format) {
    switch (format) {
    case Q8_0:
    case INT8:
    case LLM_INT8:
    case NF4:
    case FP4: return 128; /* of NF4 and FP4: table_bytes */
    case Q4_0:
    case Q4_1:
    case Q4_Z:
    case Q4_K: return 15;
    case Q5_0:
    case Q5_1:
    case Q5_K: return 31;
    case Q6_K: return 63;
    }
    return 0;
}
INLINE int in_bytes(int format) { return largest_q(format) > 0; }
INLINE int has_table(int format) { return format_of(format).weights == QK_TABLE; }
INLINE int has_sign(int format) { return largest_q(format) == 128; }

/* Weights with one scale: a sub-block of a K format, a block of the others. */
INLINE int scale_weights(int format) { return format == Q6_K ? 16 : QK; }

/* The kernels' step along a row: a block, or 32 single numbers. */
INLINE int64_t block_weights(int format) { return is_single(format) ? QK : format_of(format).weights; }
INLINE int blocks_of_32(int format) { return (int)block_weights(format) / QK; }
INLINE int64_t block_bytes(int format) { return format_of(format).bytes * (is_single(format) ? QK : 1); }
INLINE int64_t bytes_of(int format, int64_t n) { return n * block_bytes(format) / block_weights(format); }

/* ---------------------------------------------------------------- numbers in bytes */

INLINE uint16_t load_u16(const uint8_t *p) {
    uint16_t u;
    memcpy(&u, p, sizeof u);
    return u;
}

INLINE uint32_t load_u32(const uint8_t *p) {
    uint32_t u;
    memcpy(&u, p, sizeof u);
    return u;
}

INLINE float load_f32(const uint8_t *p) {
    float f;
    memcpy(&f, p, sizeof f);
    return f;
}

INLINE float float_of_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

INLINE uint32_t bits_of_float(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

/* float16 to float32, exact. A normal number moves its fields; a subnormal one takes one subtraction.
 * There is no branch, so the compiler can vectorise a loop of these. */
INLINE float half_to_float(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    const uint32_t rest = (uint32_t)(half & 0x7fff) << 13;     /* exponent and fraction at their new place */
    const uint32_t bias = 0x38000000u << (rest >= 0x0f800000); /* 15 -> 127; infinity and NaN: 31 -> 255 */
    const float subnormal = float_of_bits(0x38800000 + rest) - float_of_bits(0x38800000);
    const uint32_t choose = -(uint32_t)(rest < 0x00800000); /* all bits, or none */
    return float_of_bits(sign | (bits_of_float(subnormal) & choose) | ((rest + bias) & ~choose));
}

/* The bits of 0.5 and of -0; those of |x|. */
enum { HALF = 0x3f000000 };
#define SIGN 0x80000000u
INLINE uint32_t bits_of_abs(float x) { return bits_of_float(x) & ~SIGN; }

/* Rounded to nearest, ties to even; infinite from 65520 on; a NaN stays a NaN. */
INLINE uint16_t float_to_half(float f) {
    const uint32_t all = bits_of_abs(f), sign = bits_of_float(f) >> 16 & 0x8000;
    const uint32_t rest = all < 0x47800000 ? all : 0x47800000; /* 65536: its exponent is that of infinity */
    const uint32_t normal = (rest + 0x0fff + (rest >> 13 & 1) - 0x38000000) >> 13; /* bias 127 -> 15 */
    /* In 0.5 + x the last bit counts 2^-24, as it does in a subnormal float16: the addition rounds. */
    const uint32_t subnormal = bits_of_float(float_of_bits(rest) + 0.5f) - HALF;
    const uint32_t choose = -(uint32_t)(rest < 0x38800000), nan = (uint32_t)(all > 0x7f800000) << 9;
    return (uint16_t)(sign | nan | (subnormal & choose) | (normal & ~choose));
}

INLINE float load_f16(const uint8_t *p) { return half_to_float(load_u16(p)); }

/* ---------------------------------------------------------------- packed rows
 *
 * Blocks lie in memory PACKED_ROWS rows side by side, because a vector has one row in each lane. The parts of
 * a block keep their order. A part is cut into units, d and m into 2 bytes and the others into 4, and each
 * unit of the first row is followed by the same unit of the other rows:
 *
 *     Q4_0, stored      d d | q q q q | q q q q | q q q q | q q q q          18 bytes a block
 *     Q4_0, packed      d d of 16 rows | q q q q of 16 rows | ...            16 times as many
 *
 * The unit at byte i of row r's block is at byte PACKED_ROWS * i + r * (bytes of the unit). */
enum { PACKED_ROWS = NL_PACKED_ROWS };

INLINE int is_packed(int format) { return !is_single(format); }
INLINE int unit_bytes(int format, int at) {
    return at == format_of(format).d || at == format_of(format).m ? 2 : 4;
}

/* The block of row r as it was stored, out of the packed block at p. */
INLINE void stored_block(const int format, uint8_t *to, const uint8_t *p, int64_t r) {
    for (int at = 0; at < format_of(format).bytes; at += unit_bytes(format, at))
        memcpy(to + at, p + PACKED_ROWS * at + r * unit_bytes(format, at), (size_t)unit_bytes(format, at));
}

/* The block of row r that begins with weight i, as stored: `room` holds a block of packed rows. */
INLINE const uint8_t *block_of(const int format, uint8_t *room, const nl_matrix *w, int64_t r, int64_t i) {
    const int64_t row_bytes = bytes_of(format, w->IN), at = bytes_of(format, i);
    if (!is_packed(format)) return (const uint8_t *)w->data + r * row_bytes + at;
    const int64_t row = r % PACKED_ROWS;
    stored_block(format, room, (const uint8_t *)w->data + (r - row) * row_bytes + at * PACKED_ROWS, row);
    return room;
}

/* ---------------------------------------------------------------- one weight */

/* The 6-bit scale and minimum of sub-block j of Q4_K and Q5_K, out of their 12 bytes. */
INLINE int k_scale(const uint8_t *p, int j) {
    return j < 4 ? p[j] & 63 : (p[j + 4] & 15) | p[j - 4] >> 6 << 4;
}
INLINE int k_minimum(const uint8_t *p, int j) {
    return j < 4 ? p[j + 4] & 63 : p[j + 4] >> 4 | p[j] >> 6 << 4;
}

/* The numbers of NF4 and FP4, by their codes 0 .. 15: bitsandbytes' quant_map. */
INLINE const float *table_of(const int format) {
    static const float nf4[16] = {
        -1.0f,
        -0.6961928009986877f,
        -0.5250730514526367f,
        -0.39491748809814453f,
        -0.28444138169288635f,
        -0.18477343022823334f,
        -0.09105003625154495f,
        0.0f,
        0.07958029955625534f,
        0.16093020141124725f,
        0.24611230194568634f,
        0.33791524171829224f,
        0.44070982933044434f,
        0.5626170039176941f,
        0.7229568362236023f,
        1.0f,
    };
    static const float fp4[16] = {
        0.0f, 0.005208333333f,  0.66666667f,  1.0f,  0.33333333f,  0.5f,  0.16666667f,  0.25f,
        0.0f, -0.005208333333f, -0.66666667f, -1.0f, -0.33333333f, -0.5f, -0.16666667f, -0.25f,
    };
    return format == NF4 ? nf4 : fp4;
}

INLINE int table_code(const uint8_t *quants, int s, int i) {
    return quants[8 * s + i / 8 * 4 + i % 4] >> i / 4 % 2 * 4 & 15;
}

/* Those numbers as bytes, near table / table_unit. The unit has the least square error, by the codes of
 * normal weights: 0.47 % of their size in NF4, as 8 bits have with activations, and 0.33 % in FP4. */
INLINE const int8_t *table_bytes(const int format) {
    static const int8_t nf4[16] = {-124, -86, -65, -49, -35, -23, -11, 0, 10, 20, 31, 42, 55, 70, 90, 124};
    static const int8_t fp4[16] = {0, 1, 80, 120, 40, 60, 20, 30, 0, -1, -80, -120, -40, -60, -20, -30};
    return format == NF4 ? nf4 : fp4;
}
INLINE float table_unit(const int format) { return format == NF4 ? 1 / 124.115f : 1 / 120.0f; }

/* FP8 is E4M3, without a NaN: a sign, 4 bits of exponent and 3 of fraction. With its bits moved to those of a
 * float16 it is 256 times too small, because the bias of the exponent is 15 there and 7 here. */
enum { FP8_TIMES = 256 };
INLINE uint16_t fp8_to_half(uint8_t code) { return (uint16_t)((code & 0x80) << 8 | (code & 0x7f) << 7); }

/* LLM_INT8 is multiplied by this last, as bitsandbytes does. */
#define ONE_127TH 7.874015718698502e-3f

/* Weight 16 s + i of the block at p, with i below 16: the float32 of numpy_llama/backend/formats.py. */
INLINE float weight(const int format, const uint8_t *p, int s, int i) {
    const nl_format f = format_of(format);
    const uint8_t *quants = p + f.quants;
    switch (format) {
    case F32: return load_f32(p + 4 * (16 * s + i));
    case F16: return load_f16(p + 2 * (16 * s + i));
    case BF16: return float_of_bits((uint32_t)load_u16(p + 2 * (16 * s + i)) << 16);
    case Q8_0: return load_f16(p + f.d) * (float)(int8_t)quants[16 * s + i];
    case INT8: return load_f32(p + f.d32) * (float)(int8_t)quants[16 * s + i];
    case LLM_INT8: return load_f32(p + f.d32) * (float)(int8_t)quants[16 * s + i] * ONE_127TH;
    case FP8: return load_f32(p + f.d32) * (FP8_TIMES * half_to_float(fp8_to_half(quants[16 * s + i])));
    case NF4:
    case FP4: return load_f32(p + f.d32) * table_of(format)[table_code(quants, s, i)];
    case Q4_0: return load_f16(p + f.d) * (float)((quants[i] >> 4 * s & 15) - f.zero);
    case Q4_1: return load_f16(p + f.d) * (float)(quants[i] >> 4 * s & 15) + load_f16(p + f.m);
    case Q4_Z: return load_f16(p + f.d) * ((float)(quants[i] >> 4 * s & 15) - load_f16(p + f.m));
    case Q5_0: {
        const int q = (quants[i] >> 4 * s & 15) | (load_u16(p + f.high + 2 * s) >> i & 1) << 4;
        return load_f16(p + f.d) * (float)(q - f.zero);
    }
    case Q5_1: {
        const int q = (quants[i] >> 4 * s & 15) | (load_u16(p + f.high + 2 * s) >> i & 1) << 4;
        return load_f16(p + f.d) * (float)q + load_f16(p + f.m);
    }
    case Q4_K:
    case Q5_K: {
        int q = quants[s / 4 * 32 + s % 2 * 16 + i] >> s / 2 % 2 * 4 & 15;
        if (format == Q5_K) q |= (p[f.high + s % 2 * 16 + i] >> s / 2 & 1) << 4;
        const float d = load_f16(p + f.d) * (float)k_scale(p + f.scales, s / 2);
        return d * (float)q - load_f16(p + f.m) * (float)k_minimum(p + f.scales, s / 2);
    }
    case Q6_K: {
        const int low = quants[s / 8 * 64 + s % 4 * 16 + i] >> s / 4 % 2 * 4 & 15;
        const int high = p[f.high + s / 8 * 32 + s % 2 * 16 + i] >> s / 2 % 4 * 2 & 3;
        const float d = load_f16(p + f.d) * (float)(int8_t)p[f.scales + s];
        return d * (float)((low | high << 4) - f.zero);
    }
    }
    return NAN; /* not reached: every entry point refuses an unknown format */
}

/* The same as it is multiplied by quantized activations: numbers of a table are bytes. */
INLINE float rounded_weight(const int format, const uint8_t *p, int s, int i) {
    if (!has_table(format)) return weight(format, p, s, i);
    const nl_format f = format_of(format);
    return load_f32(p + f.d32) * table_unit(format) *
           (float)table_bytes(format)[table_code(p + f.quants, s, i)];
}

/* ---------------------------------------------------------------- keys and values
 *
 * The Dh numbers of a head are F32, F16, or blocks of Q8_0. */

INLINE int is_cached(int format) { return format == F32 || format == F16 || format == Q8_0; }

/* Number i of the head at p, in F32 or F16. */
INLINE float load_element(const int format, const uint8_t *p, int64_t i) {
    return format == F16 ? load_f16(p + 2 * i) : load_f32(p + 4 * i);
}

/* The Dh numbers of the head at p. */
INLINE void load_head(float *to, int format, const uint8_t *p, int64_t Dh) {
    switch (format) {
    case F32: memcpy(to, p, sizeof(float) * (size_t)Dh); break;
    case F16:
        for (int64_t i = 0; i < Dh; i++) to[i] = load_f16(p + 2 * i);
        break;
    case Q8_0:
        for (int64_t i = 0; i < Dh; i += QK)
            for (int e = 0; e < QK; e++) to[i + e] = weight(Q8_0, p + bytes_of(Q8_0, i), e / 16, e % 16);
        break;
    }
}

INLINE void store_u16(uint8_t *p, uint16_t u) { memcpy(p, &u, sizeof u); }

/* 1 / d, or 0 where that is infinite: such a d is 0 as a float16, and so is every weight. */
INLINE float inverse(float d) { return bits_of_abs(d) > 0x00200000 ? 1 / d : 0; } /* 2^-128 */

/* The bits of the largest |w| of a block. */
INLINE uint32_t largest(const float *w) {
    int32_t most = 0; /* signed: SSE2 has no comparison of unsigned ones */
    for (int i = 0; i < QK; i++) most = (int32_t)bits_of_abs(w[i]) > most ? (int32_t)bits_of_abs(w[i]) : most;
    return (uint32_t)most;
}

/* A block of Q8_0: d = max|w| / 127; q = w / d, rounded half away from zero. Where some w is not finite, q is
 * 0 and d is not finite: then each d * q is a NaN. */
INLINE void quantize_q8_0(uint8_t *p, const float *w) {
    const uint32_t most = largest(w);
    const float d = float_of_bits(most) / 127, inverse_d = inverse(d);
    store_u16(p, float_to_half(d));
    for (int i = 0; i < QK; i++) {
        const float q = w[i] * inverse_d, half = float_of_bits((bits_of_float(q) & SIGN) | HALF);
        p[2 + i] = most < 0x7f800000 ? (uint8_t)(int32_t)(q + half) : 0;
    }
}

#endif

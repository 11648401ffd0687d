/* What a format's bytes mean, one number at a time: shared by every form of the kernels. */
#ifndef NUMPY_LLAMA_VEC_H
#define NUMPY_LLAMA_VEC_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* ggml's numbers for the formats; the weights in a block, and in a block of a K format. */
enum { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, BF16 = 30 };
enum { Q4_K = 12, Q5_K = 13, Q6_K = 14, QK = 32, QK_K = 256 };

/* clang-format off */
/* For each of them one CASE, so that every loop is compiled with its format as a constant. */
#define EACH_FORMAT(CASE)                                                                                    \
    CASE(F32) CASE(F16) CASE(BF16) CASE(Q8_0) CASE(Q4_0) CASE(Q4_1) CASE(Q5_0) CASE(Q5_1) CASE(Q4_K)           \
    CASE(Q5_K) CASE(Q6_K)
/* clang-format on */

#define INLINE static inline __attribute__((always_inline))

/* A number that is stored is loaded into all lanes for nothing; gcc would shuffle it out of its register. */
#define STAYS_STORED(array) __asm__("" : "+m"(array))

#if defined(__x86_64__) || defined(__i386__)
#define X86 1
#endif

/* Weights in a block of a row; 32 single numbers are as good as one. */
INLINE int64_t block_weights(int format) {
    return format == Q4_K || format == Q5_K || format == Q6_K ? QK_K : QK;
}

INLINE int64_t block_bytes(int format) {
    switch (format) {
    case F32: return 128;
    case F16:
    case BF16: return 64;
    case Q8_0: return 2 + 32;
    case Q4_0: return 2 + 16;
    case Q4_1: return 4 + 16;
    case Q5_0: return 2 + 4 + 16;
    case Q5_1: return 4 + 4 + 16;
    case Q4_K: return 4 + 12 + 128;
    case Q5_K: return 4 + 12 + 32 + 128;
    case Q6_K: return 128 + 64 + 16 + 2;
    }
    return 0;
}

/* Of formats whose weights are d * q + m, whether there is an m; and what a stored q stands for, less itself.
 */
INLINE int has_minima(int format) {
    return format == Q4_1 || format == Q5_1 || format == Q4_K || format == Q5_K;
}
INLINE int zero_of(int format) { return format == Q4_0 ? -8 : format == Q5_0 ? -16 : 0; }
INLINE int is_single(int format) { return format == F32 || format == F16 || format == BF16; }
INLINE int is_k(int format) { return block_weights(format) == QK_K; }

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

/* float16 to float32, exact: normal numbers by moving the fields, subnormal ones by one subtraction.
 * Without a branch, so that the compiler can make vectors of a loop of these. */
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

/* The 6-bit scale and minimum of sub-block j of Q4_K and Q5_K, out of their 12 bytes. */
INLINE int k_scale(const uint8_t *p, int j) {
    return j < 4 ? p[j] & 63 : (p[j + 4] & 15) | p[j - 4] >> 6 << 4;
}
INLINE int k_minimum(const uint8_t *p, int j) {
    return j < 4 ? p[j + 4] & 63 : p[j + 4] >> 4 | p[j] >> 6 << 4;
}

/* Weight 16 s + i of the block at p, i below 16: the float32 that numpy_llama/quantize.py says it is. */
INLINE float weight(const int format, const uint8_t *p, int s, int i) {
    switch (format) {
    case F32: return load_f32(p + 4 * (16 * s + i));
    case F16: return load_f16(p + 2 * (16 * s + i));
    case BF16: return float_of_bits((uint32_t)load_u16(p + 2 * (16 * s + i)) << 16);
    case Q8_0: return load_f16(p) * (float)(int8_t)p[2 + 16 * s + i];
    case Q4_0: return load_f16(p) * (float)((p[2 + i] >> 4 * s & 15) - 8);
    case Q4_1: return load_f16(p) * (float)(p[4 + i] >> 4 * s & 15) + load_f16(p + 2);
    case Q5_0: {
        const int q = (p[6 + i] >> 4 * s & 15) | (load_u16(p + 2 + 2 * s) >> i & 1) << 4;
        return load_f16(p) * (float)(q - 16);
    }
    case Q5_1: {
        const int q = (p[8 + i] >> 4 * s & 15) | (load_u16(p + 4 + 2 * s) >> i & 1) << 4;
        return load_f16(p) * (float)q + load_f16(p + 2);
    }
    case Q4_K:
    case Q5_K: {
        const uint8_t *fifth = p + 16 + s % 2 * 16, *pairs = fifth + (format == Q5_K ? 32 : 0) + s / 4 * 32;
        int q = pairs[i] >> s / 2 % 2 * 4 & 15;
        if (format == Q5_K) q |= (fifth[i] >> s / 2 & 1) << 4;
        const float d = load_f16(p) * (float)k_scale(p + 4, s / 2);
        return d * (float)q - load_f16(p + 2) * (float)k_minimum(p + 4, s / 2);
    }
    case Q6_K: {
        const int low = p[s / 8 * 64 + s % 4 * 16 + i] >> s / 4 % 2 * 4 & 15;
        const int upper = p[128 + s / 8 * 32 + s % 2 * 16 + i] >> s / 2 % 4 * 2 & 3;
        const float d = load_f16(p + 208) * (float)(int8_t)p[192 + s];
        return d * (float)((low | upper << 4) - 32);
    }
    }
    return 0;
}

#endif

/* What a format's bytes mean, one number at a time: shared by every form of the kernels. */
#ifndef NUMPY_LLAMA_VEC_H
#define NUMPY_LLAMA_VEC_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q8_0 = 8, BF16 = 30 }; /* ggml's numbers */
enum { QK = 32 };                                                   /* weights in a block */

#define INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__) || defined(__i386__)
#define X86 1
#endif

/* Bytes that 32 weights take. */
INLINE int64_t block_bytes(int format) {
    switch (format) {
    case F32: return 128;
    case F16:
    case BF16: return 64;
    case Q8_0: return 2 + 32;
    case Q4_0: return 2 + 16;
    case Q4_1: return 4 + 16;
    }
    return 0;
}

INLINE uint16_t load_u16(const uint8_t *p) {
    uint16_t u;
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

/* float16 to float32, exact: normal numbers by moving the fields, subnormal ones by one subtraction. */
INLINE float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t rest = (uint32_t)(half & 0x7fff) << 13; /* exponent and fraction at their new place */
    if (rest >= 0x0f800000) return float_of_bits(sign | (rest + 0x70000000)); /* infinity, NaN */
    if (rest >= 0x00800000) return float_of_bits(sign | (rest + 0x38000000)); /* exponent bias 15 -> 127 */
    return float_of_bits(sign | 0x3f800000) * (float_of_bits(0x38800000 + rest) - float_of_bits(0x38800000));
}

#endif

/* convert: weights from the bytes of one format into those of another.
 *
 *      src, rows of IN          256 weights           dst, rows of IN
 *      |...|...|...|...|   ->   float w[256]   ->   |..|..|..|..|
 *                     `weight`             pack
 *
 * What is packed is what quantize_* of numpy_llama/quantize.py makes, bit for bit. There is one form only: in
 * loops as plain as these, without a branch, the compiler makes the vectors, and with those that every x86-64
 * has it takes under 2 ns a weight, which is faster than disks write. Where floats are compared it is by
 * their bits: without the sign those are in the order of |x|, with infinity and NaN on top.
 * Threads share out the rows. tests/kernels/test_convert_kernels.py holds it to quantize.py. */
#include <stdint.h>

#include "kernels.h"
#include "vec.h"

enum { MOST = 0x477fe000 }; /* the bits of 65504 */

INLINE int64_t bytes_of(int format, int64_t n) { return n * block_bytes(format) / block_weights(format); }

/* n weights: whole blocks, or as many single numbers. */
INLINE void unpack_many(const int format, float *w, const uint8_t *p, int n) {
    if (format == F32 || format == F16 || format == BF16)
        for (int i = 0; i < n; i++) w[i] = weight(format, p, 0, i);
    else
        for (int k = 0; k < n; k += block_weights(format))
            for (int s = 0; s < block_weights(format) / 16; s++)
                for (int i = 0; i < 16; i++)
                    w[k + 16 * s + i] = weight(format, p + bytes_of(format, k), s, i);
}

INLINE uint16_t float_to_bf16(float f) {
    const uint32_t bits = bits_of_float(f), choose = -(uint32_t)(bits_of_abs(f) > 0x7f800000);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet_nan = bits >> 16 | 64;
    return (uint16_t)((quiet_nan & choose) | (rounded & ~choose));
}

INLINE void store_u16(uint8_t *p, uint16_t u) { memcpy(p, &u, sizeof u); }

/* 1 / d, or 0 where that is infinite: there d is 0 as a float16, and so is every weight. */
INLINE float inverse(float d) { return bits_of_abs(d) > 0x00200000 ? 1 / d : 0; } /* 2^-128 */

/* The bits of the largest |w| of a block. */
INLINE uint32_t largest(const float *w) {
    int32_t most = 0; /* signed: SSE2 has no comparison of unsigned ones */
    for (int i = 0; i < QK; i++) most = (int32_t)bits_of_abs(w[i]) > most ? (int32_t)bits_of_abs(w[i]) : most;
    return (uint32_t)most;
}

/* Both return 0 for a block that cannot be stored.
 *
 * d = max|w| / 127; q = w / d, rounded half away from zero. */
INLINE int pack_q8_0(uint8_t *p, const float *w) {
    const uint32_t most = largest(w);
    if (most > MOST) return 0;
    const float d = float_of_bits(most) / 127, inverse_d = inverse(d);
    store_u16(p, float_to_half(d));
    for (int i = 0; i < QK; i++) {
        const float q = w[i] * inverse_d, half = float_of_bits((bits_of_float(q) & SIGN) | HALF);
        p[2 + i] = (uint8_t)(int32_t)(q + half);
    }
    return 1;
}

/* d = w / -8 of the first w of the largest |w|; q = w / d + 8. */
INLINE int pack_q4_0(uint8_t *p, const float *w) {
    const uint32_t most = largest(w);
    if (most > MOST) return 0;
    int first = QK - 1;
    for (int i = QK - 1; i >= 0; i--) first = bits_of_abs(w[i]) == most ? i : first;
    const float d = w[first] / -8, inverse_d = inverse(d);
    store_u16(p, float_to_half(d));
    for (int i = 0; i < QK / 2; i++) {
        const int32_t low = (int32_t)(w[i] * inverse_d + 8.5f),
                      high = (int32_t)(w[i + 16] * inverse_d + 8.5f);
        p[2 + i] = (uint8_t)((low < 15 ? low : 15) | (high < 15 ? high : 15) << 4);
    }
    return 1;
}

/* n weights; 0 if one of their blocks cannot be stored. */
static int convert(uint8_t *dst, int dst_format, const uint8_t *src, int src_format, int n) {
    float w[QK_K];
#define CASE(FORMAT)                                                                                         \
    case FORMAT: unpack_many(FORMAT, w, src, n); break;
    switch (src_format) { EACH_FORMAT(CASE) }
#undef CASE
    int good = 1;
    switch (dst_format) {
    case F32: memcpy(dst, w, sizeof(float) * (size_t)n); break;
    case F16:
        for (int i = 0; i < n; i++) store_u16(dst + 2 * i, float_to_half(w[i]));
        break;
    case BF16:
        for (int i = 0; i < n; i++) store_u16(dst + 2 * i, float_to_bf16(w[i]));
        break;
    case Q8_0:
        for (int i = 0; i < n; i += QK) good &= pack_q8_0(dst + bytes_of(Q8_0, i), w + i);
        break;
    case Q4_0:
        for (int i = 0; i < n; i += QK) good &= pack_q4_0(dst + bytes_of(Q4_0, i), w + i);
        break;
    }
    return good;
}

int64_t nl_convert(void *dst, int dst_format, const void *src, int src_format, int64_t rows, int64_t IN,
                   int threads) {
    int64_t bad = rows + 1;
    (void)threads;
#pragma omp parallel for num_threads(threads) reduction(min : bad) if (threads > 1)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < IN; k += QK_K) {
            const uint8_t *from =
                (const uint8_t *)src + r * bytes_of(src_format, IN) + bytes_of(src_format, k);
            uint8_t *to = (uint8_t *)dst + r * bytes_of(dst_format, IN) + bytes_of(dst_format, k);
            const int good = convert(to, dst_format, from, src_format, IN - k < QK_K ? (int)(IN - k) : QK_K);
            if (!good && r + 1 < bad) bad = r + 1;
        }
    return bad <= rows ? bad : 0;
}

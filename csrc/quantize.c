/* convert: weights from the bytes of one format into those of another.
 *
 *      src, rows of IN           256 weights             dst, rows of IN
 *      |...|...|...|...|   -->   float w[256]   -->   |..|..|..|..|
 *                      dequantize              quantize
 *
 * The bytes are those of quantize_* in numpy_llama/backend/formats.py, bit for bit. Floats are compared by
 * their bits: without the sign these have the order of |x|, with infinity and NaN above all. Threads share
 * out the rows.
 *
 * Compiled once as it stands. The loops are plain and without branches, so the compiler vectorises them. With
 * the vectors of every x86-64 they take under 2 ns a weight, and disks write more slowly.
 * tests/kernels/test_convert_kernels.py compares it with backend/formats.py. */
#include "formats.h"

enum { MOST = 0x477fe000 }; /* the bits of 65504 */

/* n weights: whole blocks, or as many single numbers. */
INLINE void dequantize(const int format, float *w, const uint8_t *p, int n) {
    if (is_single(format))
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

/* Returns 0 for a block that cannot be stored.
 *
 * d = w / -8 of the first w of the largest |w|; q = w / d + 8. */
INLINE int quantize_q4_0(uint8_t *p, const float *w) {
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

INLINE int is_written(int format) { return is_single(format) || format == Q8_0 || format == Q4_0; }

/* n weights; -> 0 if one of their blocks cannot be stored. */
static int convert(uint8_t *dst, int dst_format, const uint8_t *src, int src_format, int n) {
    float w[QK_K];
#define CASE(FORMAT, ...)                                                                                    \
    case FORMAT: dequantize(FORMAT, w, src, n); break;
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
        for (int i = 0; i < n; i += QK)
            if (largest(w + i) <= MOST)
                quantize_q8_0(dst + bytes_of(Q8_0, i), w + i);
            else
                good = 0;
        break;
    case Q4_0:
        for (int i = 0; i < n; i += QK) good &= quantize_q4_0(dst + bytes_of(Q4_0, i), w + i);
        break;
    }
    return good;
}

int64_t nl_convert(void *dst, int dst_format, const void *src, int src_format, int64_t rows, int64_t IN,
                   int threads) {
    if (!is_known(src_format) || !is_written(dst_format)) return NL_UNKNOWN_FORMAT;
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

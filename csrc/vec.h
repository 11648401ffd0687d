/* A small vocabulary shared by the kernels: what a format's bytes mean, and eight floats at a time.
 *
 * v8 is eight floats in one AVX2 register. Every function below is the plain sentence of its name;
 * the kernels are written in these words, so that another instruction set is another set of bodies. */
#ifndef NUMPY_LLAMA_VEC_H
#define NUMPY_LLAMA_VEC_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q8_0 = 8, BF16 = 30 }; /* ggml's numbers */
enum { QK = 32 };                                                   /* weights in a block */

#define INLINE static inline __attribute__((always_inline))

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

#if defined(__x86_64__) || defined(__i386__)
#define HAVE_AVX2 1
#include <immintrin.h>

/* A target for each function instead of a compiler flag: the rest of the file must run anywhere. */
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX2_INLINE static inline __attribute__((always_inline, target("avx2,fma,f16c")))

typedef __m256 v8;

AVX2_INLINE v8 v8_zero(void) { return _mm256_setzero_ps(); }
AVX2_INLINE v8 v8_load(const float *p) { return _mm256_loadu_ps(p); }
AVX2_INLINE void v8_store(float *p, v8 a) { _mm256_storeu_ps(p, a); }
AVX2_INLINE v8 v8_all(float a) { return _mm256_set1_ps(a); }
AVX2_INLINE v8 v8_mul(v8 a, v8 b) { return _mm256_mul_ps(a, b); }
AVX2_INLINE v8 v8_add(v8 a, v8 b) { return _mm256_add_ps(a, b); }
AVX2_INLINE v8 v8_fma(v8 a, v8 b, v8 c) { return _mm256_fmadd_ps(a, b, c); } /* a * b + c, rounded once */
AVX2_INLINE v8 v8_max(v8 a, v8 b) { return _mm256_max_ps(a, b); }            /* b where either is NaN */
AVX2_INLINE v8 v8_round(v8 a) {                                              /* to the nearest whole number */
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
AVX2_INLINE v8 v8_from_f16(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128(p)); }
AVX2_INLINE v8 v8_from_bf16(const void *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16));
}
AVX2_INLINE v8 v8_from_i8(const void *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p)));
}
AVX2_INLINE v8 v8_all_f16(const uint8_t *p) { return _mm256_cvtph_ps(_mm_set1_epi16((int16_t)load_u16(p))); }

/* Sixteen bytes, in both halves of the register; and eight of them, from the first on, as floats. One
 * shuffle puts each byte at the bottom of its own 32 bits. Widening conversions would do, but they cross
 * the halves, and Intel's cores have one unit for what does and two for what does not. */
AVX2_INLINE __m256i all_16_bytes(const void *p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(p)); }
AVX2_INLINE v8 v8_from_u8_of(__m256i bytes, const int first) {
    const __m256i every_fourth = _mm256_setr_epi32(~0xff | 0, ~0xff | 1, ~0xff | 2, ~0xff | 3, ~0xff | 4,
                                                   ~0xff | 5, ~0xff | 6, ~0xff | 7);
    const __m256i pick = _mm256_add_epi32(every_fourth, _mm256_set1_epi32(first)); /* a set top bit gives 0 */
    return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(bytes, pick));
}

/* The sums of four registers: (sum a, sum b, sum c, sum d). Always in the same tree,
 * ((0+1)+(2+3)) + ((4+5)+(6+7)), so that whoever sums gets the same bits. */
AVX2_INLINE __m128 v8_sums(v8 a, v8 b, v8 c, v8 d) {
    v8 quarters = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps(quarters, 1));
}

/* exp(x) for x <= 0, and for x up to 88; exactly 0 below -87, exactly 1 at 0, NaN for NaN.
 * x = n ln2 + r with n whole, |r| <= ln2 / 2; exp(x) = 2^n exp(r); exp(r) = 1 + r + r^2 p(r), where p is
 * fitted by least squares at Chebyshev nodes. Within 1.1 units in the last place (test_exp). */
AVX2_INLINE v8 v8_exp(v8 x) {
    const v8 lowest = v8_all(-87.0f);
    v8 clamped = v8_max(lowest, x);
    v8 n = v8_round(v8_mul(clamped, v8_all(1.44269504f)));
    v8 r = v8_fma(n, v8_all(-0.693145752f), clamped); /* ln2 in two parts; n times this one is exact */
    r = v8_fma(n, v8_all(-1.4286068e-6f), r);
    v8 p = v8_all(0.0013814596f);
    p = v8_fma(p, r, v8_all(0.0083687175f));
    p = v8_fma(p, r, v8_all(0.04166839f));
    p = v8_fma(p, r, v8_all(0.16666521f));
    p = v8_fma(p, r, v8_all(0.49999994f));
    p = v8_add(v8_fma(v8_mul(r, r), p, r), v8_all(1.0f));
    __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    v8 scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
    return _mm256_andnot_ps(_mm256_cmp_ps(x, lowest, _CMP_LT_OQ), scaled);
}
#endif

#endif

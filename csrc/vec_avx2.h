/* The vector functions in AVX2: `vec` is eight floats in one register. vec_avx512.h has the same functions
 * for sixteen. The kernels call these functions and no intrinsics. vec.h lists their assumptions. */
#include <immintrin.h>

#include "formats.h"

#define VEC(name) name##_avx2
#define LANES 8
#define MR 4              /* linear_gemm.c: tokens x 2 registers of sums, 8 of the 16 */
#define BLOCKS_PER_STEP 1 /* linear_gemv.c: blocks of 32 whose first halves fill a register of shorts */
#define TILE_ROWS 6       /* attention.c: rows x 2 registers of sums, 12 of the 16 */

/* Each function names its instruction set. A compiler flag would also change the rest of the module. */
#define VEC_TARGET __attribute__((target("avx2,fma,f16c")))
#define VEC_INLINE static inline __attribute__((always_inline, target("avx2,fma,f16c")))

typedef __m256 vec;

VEC_INLINE vec vec_zero(void) { return _mm256_setzero_ps(); }
VEC_INLINE vec vec_all(float a) { return _mm256_set1_ps(a); }
VEC_INLINE vec vec_load(const void *p) { return _mm256_loadu_ps(p); }
VEC_INLINE void vec_store(float *p, vec a) { _mm256_storeu_ps(p, a); }
VEC_INLINE vec vec_add(vec a, vec b) { return _mm256_add_ps(a, b); }
VEC_INLINE vec vec_sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
VEC_INLINE vec vec_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
VEC_INLINE vec vec_div(vec a, vec b) { return _mm256_div_ps(a, b); }
VEC_INLINE vec vec_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); } /* a * b + c, rounded once */
VEC_INLINE vec vec_xor(vec a, vec b) { return _mm256_xor_ps(a, b); }             /* of their bits */
VEC_INLINE vec vec_max(vec a, vec b) { return _mm256_max_ps(a, b); }             /* b where either is NaN */
VEC_INLINE vec vec_round(vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

/* a * 2^n, for whole n that leave the exponent in its range. */
VEC_INLINE vec vec_times_2_to(vec n, vec a) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), exponent));
}
/* a, but 0 where x < limit. */
VEC_INLINE vec vec_zero_below(vec x, vec limit, vec a) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, limit, _CMP_LT_OQ), a);
}

VEC_INLINE vec vec_from_f16(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128(p)); }
VEC_INLINE vec vec_from_bf16(const void *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16));
}
VEC_INLINE void vec_store_f16(void *p, vec a) {
    _mm_storeu_si128(p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

/* Two neighbours are one complex number: a * b. */
VEC_INLINE vec vec_times_complex(vec a, vec b) {
    const vec crossed = _mm256_mul_ps(_mm256_permute_ps(a, 0xb1), _mm256_movehdup_ps(b));
    return _mm256_addsub_ps(_mm256_mul_ps(a, _mm256_moveldup_ps(b)), crossed);
}

/* p[0 .. 3] = sum of the lanes of a, of b, of c, of d: each in the tree ((0+1)+(2+3)) + ((4+5)+(6+7)). */
VEC_INLINE void vec_store_sums(float *p, vec a, vec b, vec c, vec d) {
    const vec quarters = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps(quarters, 1)));
}

/* The lanes of one register added, or the largest of them: always in the same tree. */
VEC_INLINE float vec_sum(vec a) {
    const __m128 fours = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 twos = _mm_add_ps(fours, _mm_movehl_ps(fours, fours));
    return _mm_cvtss_f32(_mm_add_ss(twos, _mm_movehdup_ps(twos)));
}
VEC_INLINE float vec_largest(vec a) {
    const __m128 fours = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 twos = _mm_max_ps(fours, _mm_movehl_ps(fours, fours));
    return _mm_cvtss_f32(_mm_max_ss(twos, _mm_movehdup_ps(twos)));
}

/* LANES registers are a square that is transposed: first pairs, then fours, then the two halves. */
VEC_INLINE void vec_transpose(vec x[LANES]) {
    vec y[LANES];
    for (int i = 0; i < 8; i += 2) {
        y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0x44);
            x[i + 2 * j + 1] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        y[i] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x20);
        y[i + 4] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x31);
    }
    for (int i = 0; i < 8; i++) x[i] = y[i];
}

/* ---------------------------------------------------------------- whole numbers
 *
 * `ints` is LANES integers of 32 bits, or twice as many of 16 (shorts), or four times as many bytes. */
typedef __m256i ints;

VEC_INLINE ints ints_zero(void) { return _mm256_setzero_si256(); }
VEC_INLINE ints ints_all(int32_t a) { return _mm256_set1_epi32(a); }
VEC_INLINE ints ints_load(const void *p) { return _mm256_loadu_si256(p); }
VEC_INLINE void ints_store(void *p, ints a) { _mm256_storeu_si256(p, a); }
VEC_INLINE ints ints_and(ints a, ints b) { return _mm256_and_si256(a, b); }
VEC_INLINE ints ints_or(ints a, ints b) { return _mm256_or_si256(a, b); }
VEC_INLINE ints ints_left(ints a, int n) { return _mm256_slli_epi32(a, n); }
VEC_INLINE ints ints_right(ints a, int n) { return _mm256_srli_epi32(a, n); }
VEC_INLINE ints ints_signed_right(ints a, int n) { return _mm256_srai_epi32(a, n); }
VEC_INLINE ints ints_max(ints a, ints b) { return _mm256_max_epi32(a, b); }
VEC_INLINE vec vec_from_ints(ints a) { return _mm256_cvtepi32_ps(a); }
VEC_INLINE ints ints_from_vec(vec a) { return _mm256_cvtps_epi32(a); } /* to nearest, ties to even */
VEC_INLINE ints bits_of_vec(vec a) { return _mm256_castps_si256(a); }
VEC_INLINE vec vec_of_bits(ints a) { return _mm256_castsi256_ps(a); }
VEC_INLINE int32_t ints_largest(ints a) {
    __m128i b = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    b = _mm_max_epi32(b, _mm_shuffle_epi32(b, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(b, _mm_shuffle_epi32(b, 0xb1)));
}
VEC_INLINE __m128i low_shorts(ints a) { /* as int16; a number beyond its range becomes the nearest in it */
    return _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
}
/* The low 16 bits of each integer are a float16. */
VEC_INLINE vec vec_from_low_f16(ints a) {
    return _mm256_cvtph_ps(low_shorts(_mm256_srai_epi32(_mm256_slli_epi32(a, 16), 16)));
}

VEC_INLINE ints shorts_all(int a) { return _mm256_set1_epi16((int16_t)a); }
VEC_INLINE ints shorts_add(ints a, ints b) { return _mm256_add_epi16(a, b); }
VEC_INLINE ints shorts_mul(ints a, ints b) { return _mm256_mullo_epi16(a, b); }
VEC_INLINE ints shorts_left(ints a, int n) { return _mm256_slli_epi16(a, n); }
VEC_INLINE ints shorts_right(ints a, int n) { return _mm256_srli_epi16(a, n); }
VEC_INLINE ints shorts_signed_right(ints a, int n) { return _mm256_srai_epi16(a, n); }
/* sum + a0 * b0 + a1 * b1, for the pair of shorts in each 32 bits. */
VEC_INLINE ints dot_pairs(ints sum, ints a, ints b) {
    ints products;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(a), "xm"(b));
    return sum;
}
VEC_INLINE void shorts_store_ints(int16_t *p, ints a) { _mm_storeu_si128((void *)p, low_shorts(a)); }

/* Sixteen numbers of each block of a step; the blocks lie `next` bytes apart (here there is one). Bytes and
 * bits become shorts. Each block has one float, which fills that block's lanes. */
VEC_INLINE ints sixteens_from_u8(const uint8_t *p, int64_t next) {
    return (void)next, _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)p));
}
VEC_INLINE ints sixteens_from_i8(const uint8_t *p, int64_t next) {
    return (void)next, _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)p));
}
VEC_INLINE ints sixteens_from_bits(const uint8_t *p, int64_t next) {
    const ints own = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384,
                                       (int16_t)32768);
    (void)next;
    return _mm256_srli_epi16(_mm256_cmpeq_epi16(_mm256_and_si256(shorts_all(load_u16(p)), own), own), 15);
}
VEC_INLINE vec sixteens_from_floats(const float *p) { return _mm256_broadcast_ss(p); }
/* Four floats for each block of a step, and their arithmetic. */
typedef __m128 vec_scales;
VEC_INLINE vec_scales scales_zero(void) { return _mm_setzero_ps(); }
VEC_INLINE vec_scales scales_all(float a) { return _mm_set1_ps(a); }
VEC_INLINE vec_scales scales_load(const float *p) { return _mm_loadu_ps(p); }
VEC_INLINE void scales_store(float *p, vec_scales a) { _mm_storeu_ps(p, a); }
VEC_INLINE vec_scales scales_mul(vec_scales a, vec_scales b) { return _mm_mul_ps(a, b); }
VEC_INLINE vec_scales scales_fma(vec_scales a, vec_scales b, vec_scales c) { return _mm_fmadd_ps(a, b, c); }
VEC_INLINE vec_scales scales_from_f16(const uint64_t halves[2]) {
    return _mm_cvtph_ps(_mm_cvtsi64_si128((int64_t)halves[0]));
}

/* Bytes, for K formats. dot_bytes: a0 * b0 + a1 * b1 for the pair of bytes in each short; a has no sign.
 * ints_or_and: a | (b & mask). ints_fours, ints_order: four integers, or their order, in each 128 bits. */
VEC_INLINE ints bytes_all(int a) { return _mm256_set1_epi8((int8_t)a); }
VEC_INLINE ints dot_bytes(ints a, ints b) { return _mm256_maddubs_epi16(a, b); }
VEC_INLINE ints ints_or_and(ints a, ints b, ints mask) { return ints_or(a, ints_and(b, mask)); }
VEC_INLINE ints ints_fours(int a, int b, int c, int d) { return _mm256_setr_epi32(a, b, c, d, a, b, c, d); }
#define ints_order(v, a, b, c, d) _mm256_shuffle_epi32(v, (a) | (b) << 2 | (c) << 4 | (d) << 6)
VEC_INLINE ints ints_right_each(ints a, ints n) { return _mm256_srlv_epi32(a, n); }
/* Bytes 8 .. 15 of each 128 bits as shorts. Then: sixteen bytes, or shorts, with zeros behind them. */
VEC_INLINE ints shorts_from_upper_u8(ints a) { return _mm256_unpackhi_epi8(a, ints_zero()); }
VEC_INLINE ints shorts_from_16_i8(const uint8_t *p) { return sixteens_from_i8(p, 0); }
VEC_INLINE ints shorts_load_16(const int16_t *p) { return ints_load(p); }
/* The same 16 bytes, or 32, repeated until the register is full. repeated_left shifts 32 bytes left by n, and
 * their second copy by m; a negative number shifts right. Only bits that stay in their byte are right. */
VEC_INLINE ints repeat_16_bytes(const void *p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(p)); }
VEC_INLINE ints repeat_32_bytes(const uint8_t *p) { return ints_load(p); }
VEC_INLINE ints repeated_left(ints a, int n, int m) {
    return (void)m, n < 0 ? ints_right(a, -n) : ints_left(a, n);
}
/* A short for each pair of weights, from the bytes at i of 16 repeated ones. A byte is for 32 weights (u8),
 * or for 16 (i8). */
VEC_INLINE ints shorts_repeat_u8(ints runs, int i) {
    return _mm256_shuffle_epi8(runs, shorts_all(0x8000 | i));
}
VEC_INLINE ints shorts_repeat_i8(ints runs, int i) {
    const ints upper = _mm256_set_m128i(_mm_set1_epi16((int16_t)((i + 1) << 8 | 0x80)),
                                        _mm_set1_epi16((int16_t)(i << 8 | 0x80)));
    return shorts_signed_right(_mm256_shuffle_epi8(runs, upper), 8);
}
/* 16 bytes of each of LANES / 4 rows; and a float of each, four times. */
VEC_INLINE ints rows_of_16(const uint8_t *const w[2], int64_t at) {
    return _mm256_loadu2_m128i((const void *)(w[1] + at), (const void *)(w[0] + at));
}
VEC_INLINE vec fours_from_floats(const float *p) {
    return _mm256_set_m128(_mm_broadcast_ss(p + 1), _mm_broadcast_ss(p));
}

/* Each lane reads 32 bits of its own row, or 128 bits in four registers. */
VEC_INLINE ints rows_u32(const uint8_t *p, ints offsets) {
    return _mm256_i32gather_epi32((const void *)p, offsets, 1);
}
VEC_INLINE void rows_4_u32(ints out[4], const uint8_t *p, const int64_t at[LANES]) {
    ints r[4]; /* row i, and row i + 4 in the upper half */
    for (int i = 0; i < 4; i++)
        r[i] = _mm256_loadu2_m128i((const void *)(p + at[i + 4]), (const void *)(p + at[i]));
    const ints low01 = _mm256_unpacklo_epi32(r[0], r[1]), high01 = _mm256_unpackhi_epi32(r[0], r[1]);
    const ints low23 = _mm256_unpacklo_epi32(r[2], r[3]), high23 = _mm256_unpackhi_epi32(r[2], r[3]);
    out[0] = _mm256_unpacklo_epi64(low01, low23), out[1] = _mm256_unpackhi_epi64(low01, low23);
    out[2] = _mm256_unpacklo_epi64(high01, high23), out[3] = _mm256_unpackhi_epi64(high01, high23);
}

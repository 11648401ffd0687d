/* The vector functions in AVX-512 with VNNI: `vec` is sixteen floats in one register. vec_avx2.h has
 * a comment for each of them. */
#include <immintrin.h>

#include "formats.h"

#define VEC(name) name##_avx512
#define LANES 16
#define MR 8              /* linear_gemm.c: tokens x 2 registers of sums, 16 of the 32 */
#define BLOCKS_PER_STEP 2 /* linear_gemv.c: blocks of 32 whose first halves fill a register of shorts */
#define TILE_ROWS 12      /* attention.c: rows x 2 registers of sums, 24 of the 32 */

#define VEC_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#define VEC_INLINE static inline __attribute__((always_inline)) VEC_TARGET

typedef __m512 vec;

VEC_INLINE vec vec_zero(void) { return _mm512_setzero_ps(); }
VEC_INLINE vec vec_all(float a) { return _mm512_set1_ps(a); }
VEC_INLINE vec vec_load(const void *p) { return _mm512_loadu_ps(p); }
VEC_INLINE void vec_store(float *p, vec a) { _mm512_storeu_ps(p, a); }
VEC_INLINE vec vec_add(vec a, vec b) { return _mm512_add_ps(a, b); }
VEC_INLINE vec vec_sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
VEC_INLINE vec vec_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
VEC_INLINE vec vec_div(vec a, vec b) { return _mm512_div_ps(a, b); }
VEC_INLINE vec vec_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
VEC_INLINE vec vec_xor(vec a, vec b) { return _mm512_xor_ps(a, b); }
VEC_INLINE vec vec_max(vec a, vec b) { return _mm512_max_ps(a, b); }
VEC_INLINE vec vec_round(vec a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

VEC_INLINE vec vec_times_2_to(vec n, vec a) {
    const __m512i exponent = _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), exponent));
}
VEC_INLINE vec vec_zero_below(vec x, vec limit, vec a) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), a);
}

VEC_INLINE vec vec_from_f16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }
VEC_INLINE vec vec_from_bf16(const void *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16));
}
VEC_INLINE void vec_store_f16(void *p, vec a) {
    _mm256_storeu_si256(p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

VEC_INLINE vec vec_times_complex(vec a, vec b) { /* times 1 in the FMA: AVX-512 has no addsub */
    const vec crossed = _mm512_mul_ps(_mm512_permute_ps(a, 0xb1), _mm512_movehdup_ps(b));
    return _mm512_fmaddsub_ps(vec_all(1), _mm512_mul_ps(a, _mm512_moveldup_ps(b)), crossed);
}

/* First the two halves of each, then the tree of vec_avx2.h. */
VEC_INLINE __m256 halves_sum(vec a) {
    return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
}
VEC_INLINE void vec_store_sums(float *p, vec a, vec b, vec c, vec d) {
    const __m256 ab = _mm256_hadd_ps(halves_sum(a), halves_sum(b)),
                 cd = _mm256_hadd_ps(halves_sum(c), halves_sum(d)), quarters = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps(quarters, 1)));
}

VEC_INLINE float vec_sum(vec a) {
    const __m256 b = halves_sum(a);
    const __m128 fours = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    const __m128 twos = _mm_add_ps(fours, _mm_movehl_ps(fours, fours));
    return _mm_cvtss_f32(_mm_add_ss(twos, _mm_movehdup_ps(twos)));
}
VEC_INLINE float vec_largest(vec a) { return _mm512_reduce_max_ps(a); }

/* As in vec_avx2.h; then the four quarters. */
VEC_INLINE void vec_transpose(vec x[LANES]) {
    vec y[LANES];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = _mm512_shuffle_ps(y[i + j], y[i + j + 2], 0x44);
            x[i + 2 * j + 1] = _mm512_shuffle_ps(y[i + j], y[i + j + 2], 0xee);
        }
    for (int j = 0; j < 4; j++) { /* x[4 i + j]: columns j, j + 4, j + 8, j + 12 of rows 4 i .. 4 i + 3 */
        y[j] = _mm512_shuffle_f32x4(x[j], x[4 + j], 0x88);
        y[4 + j] = _mm512_shuffle_f32x4(x[j], x[4 + j], 0xdd);
        y[8 + j] = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0x88);
        y[12 + j] = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0xdd);
    }
    for (int j = 0; j < 8; j++) {
        x[j] = _mm512_shuffle_f32x4(y[j], y[8 + j], 0x88);
        x[8 + j] = _mm512_shuffle_f32x4(y[j], y[8 + j], 0xdd);
    }
}

typedef __m512i ints;

VEC_INLINE ints ints_zero(void) { return _mm512_setzero_si512(); }
VEC_INLINE ints ints_all(int32_t a) { return _mm512_set1_epi32(a); }
VEC_INLINE ints ints_load(const void *p) { return _mm512_loadu_si512(p); }
VEC_INLINE void ints_store(void *p, ints a) { _mm512_storeu_si512(p, a); }
VEC_INLINE ints ints_and(ints a, ints b) { return _mm512_and_si512(a, b); }
VEC_INLINE ints ints_or(ints a, ints b) { return _mm512_or_si512(a, b); }
VEC_INLINE ints ints_left(ints a, int n) { return _mm512_slli_epi32(a, n); }
VEC_INLINE ints ints_right(ints a, int n) { return _mm512_srli_epi32(a, n); }
VEC_INLINE ints ints_signed_right(ints a, int n) { return _mm512_srai_epi32(a, n); }
VEC_INLINE ints ints_max(ints a, ints b) { return _mm512_max_epi32(a, b); }
VEC_INLINE vec vec_from_ints(ints a) { return _mm512_cvtepi32_ps(a); }
VEC_INLINE ints ints_from_vec(vec a) { return _mm512_cvtps_epi32(a); }
VEC_INLINE ints bits_of_vec(vec a) { return _mm512_castps_si512(a); }
VEC_INLINE vec vec_of_bits(ints a) { return _mm512_castsi512_ps(a); }
VEC_INLINE int32_t ints_largest(ints a) { return _mm512_reduce_max_epi32(a); }
VEC_INLINE vec vec_from_low_f16(ints a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); }

VEC_INLINE ints shorts_all(int a) { return _mm512_set1_epi16((int16_t)a); }
VEC_INLINE ints shorts_add(ints a, ints b) { return _mm512_add_epi16(a, b); }
VEC_INLINE ints shorts_mul(ints a, ints b) { return _mm512_mullo_epi16(a, b); }
VEC_INLINE ints shorts_left(ints a, int n) { return _mm512_slli_epi16(a, n); }
VEC_INLINE ints shorts_right(ints a, int n) { return _mm512_srli_epi16(a, n); }
VEC_INLINE ints shorts_signed_right(ints a, int n) { return _mm512_srai_epi16(a, n); }
/* In assembly, because gcc 12 copies every sum of a loop back and forth around the intrinsic. */
VEC_INLINE ints dot_pairs(ints sum, ints a, ints b) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "vm"(b));
    return sum;
}
VEC_INLINE void shorts_store_ints(int16_t *p, ints a) {
    _mm256_storeu_si256((void *)p, _mm512_cvtsepi32_epi16(a));
}

VEC_INLINE __m256i two_sixteens(const uint8_t *p, int64_t next) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const void *)p)),
                                   _mm_loadu_si128((const void *)(p + next)), 1);
}
VEC_INLINE ints sixteens_from_u8(const uint8_t *p, int64_t next) {
    return _mm512_cvtepu8_epi16(two_sixteens(p, next));
}
VEC_INLINE ints sixteens_from_i8(const uint8_t *p, int64_t next) {
    return _mm512_cvtepi8_epi16(two_sixteens(p, next));
}
VEC_INLINE ints sixteens_from_bits(const uint8_t *p, int64_t next) {
    return _mm512_maskz_set1_epi16(load_u16(p) | (uint32_t)load_u16(p + next) << 16, 1);
}

typedef __m256 vec_scales;
VEC_INLINE vec_scales scales_zero(void) { return _mm256_setzero_ps(); }
VEC_INLINE vec_scales scales_all(float a) { return _mm256_set1_ps(a); }
VEC_INLINE vec_scales scales_load(const float *p) { return _mm256_loadu_ps(p); }
VEC_INLINE void scales_store(float *p, vec_scales a) { _mm256_storeu_ps(p, a); }
VEC_INLINE vec_scales scales_mul(vec_scales a, vec_scales b) { return _mm256_mul_ps(a, b); }
VEC_INLINE vec_scales scales_fma(vec_scales a, vec_scales b, vec_scales c) {
    return _mm256_fmadd_ps(a, b, c);
}
VEC_INLINE vec_scales scales_from_f16(const uint64_t halves[2]) {
    return _mm256_cvtph_ps(_mm_set_epi64x((int64_t)halves[1], (int64_t)halves[0]));
}
VEC_INLINE vec sixteens_from_floats(const float *p) {
    return _mm512_mask_broadcastss_ps(_mm512_set1_ps(p[0]), 0xff00, _mm_load_ss(p + 1));
}

VEC_INLINE ints bytes_all(int a) { return _mm512_set1_epi8((int8_t)a); }
VEC_INLINE ints dot_bytes(ints a, ints b) { return _mm512_maddubs_epi16(a, b); }
VEC_INLINE ints ints_or_and(ints a, ints b, ints mask) { return _mm512_ternarylogic_epi32(a, b, mask, 0xf8); }
VEC_INLINE ints ints_fours(int a, int b, int c, int d) {
    return _mm512_broadcast_i32x4(_mm_setr_epi32(a, b, c, d));
}
#define ints_order(v, a, b, c, d) _mm512_shuffle_epi32(v, (a) | (b) << 2 | (c) << 4 | (d) << 6)
VEC_INLINE ints ints_right_each(ints a, ints n) { return _mm512_srlv_epi32(a, n); }
VEC_INLINE ints shorts_from_upper_u8(ints a) { return _mm512_unpackhi_epi8(a, ints_zero()); }
VEC_INLINE ints shorts_from_16_i8(const uint8_t *p) {
    return _mm512_zextsi256_si512(_mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)p)));
}
VEC_INLINE ints shorts_load_16(const int16_t *p) {
    return _mm512_zextsi256_si512(_mm256_loadu_si256((const void *)p));
}
VEC_INLINE ints repeat_16_bytes(const void *p) { return _mm512_broadcast_i32x4(_mm_loadu_si128(p)); }
VEC_INLINE ints repeat_32_bytes(const uint8_t *p) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const void *)p));
}
VEC_INLINE ints repeated_left(ints a, int n, int m) { /* a rotation does the same, and takes any n */
    return _mm512_rolv_epi32(a, _mm512_mask_mov_epi32(ints_all(n), 0xff00, ints_all(m)));
}
/* For vpshufb: each short of quarter i is places[i], the numbers of two bytes; 0x80 gives a zero. */
VEC_INLINE ints in_quarters(const uint64_t places[4]) {
    int64_t eights[4];
    for (int i = 0; i < 4; i++) eights[i] = (int64_t)(places[i] * 0x0001000100010001);
    return _mm512_setr_epi64(eights[0], eights[0], eights[1], eights[1], eights[2], eights[2], eights[3],
                             eights[3]);
}
VEC_INLINE ints shorts_repeat_u8(ints runs, uint64_t i) {
    const uint64_t places[4] = {0x8000 + i, 0x8000 + i, 0x8001 + i, 0x8001 + i};
    return _mm512_shuffle_epi8(runs, in_quarters(places));
}
VEC_INLINE ints shorts_repeat_i8(ints runs, uint64_t i) {
    const uint64_t places[4] = {0x80 + (i << 8), 0x180 + (i << 8), 0x280 + (i << 8), 0x380 + (i << 8)};
    return shorts_signed_right(_mm512_shuffle_epi8(runs, in_quarters(places)), 8);
}
VEC_INLINE ints rows_of_16(const uint8_t *const w[4], int64_t at) {
    ints rows = _mm512_castsi128_si512(_mm_loadu_si128((const void *)(w[0] + at)));
    rows = _mm512_inserti32x4(rows, _mm_loadu_si128((const void *)(w[1] + at)), 1);
    rows = _mm512_inserti32x4(rows, _mm_loadu_si128((const void *)(w[2] + at)), 2);
    return _mm512_inserti32x4(rows, _mm_loadu_si128((const void *)(w[3] + at)), 3);
}
VEC_INLINE vec fours_from_floats(const float *p) {
    const __m512i own = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
    return _mm512_permutexvar_ps(own, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
}

VEC_INLINE ints rows_u32(const uint8_t *p, ints offsets) { return _mm512_i32gather_epi32(offsets, p, 1); }
VEC_INLINE void rows_4_u32(ints out[4], const uint8_t *p, const int64_t at[LANES]) {
    ints r[4];
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_castsi128_si512(_mm_loadu_si128((const void *)(p + at[i])));
        r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const void *)(p + at[i + 4])), 1);
        r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const void *)(p + at[i + 8])), 2);
        r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const void *)(p + at[i + 12])), 3);
    }
    const ints low01 = _mm512_unpacklo_epi32(r[0], r[1]), high01 = _mm512_unpackhi_epi32(r[0], r[1]);
    const ints low23 = _mm512_unpacklo_epi32(r[2], r[3]), high23 = _mm512_unpackhi_epi32(r[2], r[3]);
    out[0] = _mm512_unpacklo_epi64(low01, low23), out[1] = _mm512_unpackhi_epi64(low01, low23);
    out[2] = _mm512_unpacklo_epi64(high01, high23), out[3] = _mm512_unpackhi_epi64(high01, high23);
}

/* The vector functions in AVX-512 with VNNI: `vec` is sixteen floats in one register. vec_avx2.h has
 * a comment for each of them. */
#include <immintrin.h>

#include "formats.h"

#define VEC(name) name##_avx512
#define LANES 16
#define MR 6         /* linear_gemm.c: tokens x 2 registers of sums, 12 of the 32 */
#define TILE_ROWS 12 /* attention.c, gradients: rows x 2 registers of sums, 24 of the 32 */

/* vpdpbusd sums in 32 bits. Its weights have no sign. */
#define BYTE_RUN(q) 8
#define SIGNED_BYTES 0

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
VEC_INLINE vec vec_sqrt(vec a) { return _mm512_sqrt_ps(a); }
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
VEC_INLINE vec vec_all_f16(const void *p) {
    int16_t half;
    memcpy(&half, p, sizeof half);
    return _mm512_cvtph_ps(_mm256_set1_epi16(half));
}
VEC_INLINE vec vec_from_i8(const void *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p)));
}
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
VEC_INLINE int32_t ints_sum(ints a) { return _mm512_reduce_add_epi32(a); }
VEC_INLINE vec vec_from_low_f16(ints a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); }

/* In assembly for gcc 12, which copies every sum of a loop back and forth around the intrinsic. */
VEC_INLINE ints dot_pairs(ints sum, ints a, ints b) {
#ifdef __clang__
    return _mm512_dpwssd_epi32(sum, a, b);
#else
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "vm"(b));
    return sum;
#endif
}
VEC_INLINE void shorts_store_ints(int16_t *p, ints a) {
    _mm256_storeu_si256((void *)p, _mm512_cvtsepi32_epi16(a));
}
VEC_INLINE void bytes_store_ints(int8_t *p, ints a) { _mm_storeu_si128((void *)p, _mm512_cvtsepi32_epi8(a)); }

VEC_INLINE ints bytes_all(int a) { return _mm512_set1_epi8((int8_t)a); }
VEC_INLINE ints ints_add(ints a, ints b) { return _mm512_add_epi32(a, b); }
VEC_INLINE ints ints_sub(ints a, ints b) { return _mm512_sub_epi32(a, b); }
VEC_INLINE ints ints_xor(ints a, ints b) { return _mm512_xor_si512(a, b); }
VEC_INLINE ints ints_or_and(ints a, ints b, ints mask) { return _mm512_ternarylogic_epi32(a, b, mask, 0xf8); }
VEC_INLINE ints byte_dots_begin(ints sum) { return sum; }
VEC_INLINE ints byte_dots_end(ints some, ints sum) { return (void)sum, some; }
VEC_INLINE ints byte_dot(const int is_signed, ints sum, ints a, const int32_t *b) {
    (void)is_signed;
#ifdef __clang__
    return _mm512_dpbusd_epi32(sum, a, ints_all(*b));
#else
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(*b));
    return sum;
#endif
}
VEC_INLINE ints byte_dot_lanes(const int is_signed, ints sum, ints a, ints b) {
    (void)is_signed;
#ifdef __clang__
    return _mm512_dpbusd_epi32(sum, a, b);
#else
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
#endif
}

VEC_INLINE vec vec_from_table(const float table[16], ints codes) {
    return _mm512_permutexvar_ps(codes, vec_load(table));
}

VEC_INLINE ints ints_of_16_bytes(const int8_t *p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)p));
}
VEC_INLINE ints bytes_of_table(ints table, ints codes) { return _mm512_shuffle_epi8(table, codes); }

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

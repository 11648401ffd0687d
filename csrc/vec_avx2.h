/* The vector functions in AVX2: `vec` is eight floats in one register. vec_avx512.h has the same functions
 * for sixteen. The kernels call these functions and no intrinsics. vec.h lists their assumptions.
 *
 * avx_vnni.c defines AVX_VNNI. Then the products of whole numbers are those of AVX_VNNI. */
#include <immintrin.h>

#include "formats.h"

#define LANES 8
#define TILE_ROWS 6 /* attention.c, gradients: rows x 2 registers of sums, 12 of the 16 */

/* The products of bytes are summed in 16 bits over BYTE_RUN fours, without an overflow (byte_dot has the
 * table). SIGNED_BYTES: bytes with a sign keep it. */
#ifdef AVX_VNNI /* as in vec_avx512.h */
#define VEC(name) name##_avx_vnni
#define MR 6 /* linear_gemm.c: tokens x 2 registers of sums, 12 of the 16 */
#define BYTE_RUN(q) 8
#define SIGNED_BYTES 0
#else
#define VEC(name) name##_avx2
#define MR 4 /* 8 of the 16, because products take registers too */
#define BYTE_RUN(q) ((q) <= 15 ? 8 : (q) <= 31 ? 4 : (q) <= 63 ? 2 : 1)
#define SIGNED_BYTES 1
#endif

/* Each function names its instruction set. A compiler flag would also change the rest of the module. */
#ifdef AVX_VNNI
#define VEC_TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#else
#define VEC_TARGET __attribute__((target("avx2,fma,f16c")))
#endif
#define VEC_INLINE static inline __attribute__((always_inline)) VEC_TARGET

typedef __m256 vec;

VEC_INLINE vec vec_zero(void) { return _mm256_setzero_ps(); }
VEC_INLINE vec vec_all(float a) { return _mm256_set1_ps(a); }
VEC_INLINE vec vec_load(const void *p) { return _mm256_loadu_ps(p); }
VEC_INLINE void vec_store(float *p, vec a) { _mm256_storeu_ps(p, a); }
VEC_INLINE vec vec_add(vec a, vec b) { return _mm256_add_ps(a, b); }
VEC_INLINE vec vec_sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
VEC_INLINE vec vec_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
VEC_INLINE vec vec_div(vec a, vec b) { return _mm256_div_ps(a, b); }
VEC_INLINE vec vec_sqrt(vec a) { return _mm256_sqrt_ps(a); }
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
/* The float16 at p, in all lanes. */
VEC_INLINE vec vec_all_f16(const void *p) {
    int16_t half;
    memcpy(&half, p, sizeof half);
    return _mm256_cvtph_ps(_mm_set1_epi16(half));
}
/* LANES bytes with a sign. */
VEC_INLINE vec vec_from_i8(const void *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p)));
}
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
VEC_INLINE int32_t ints_sum(ints a) {
    __m128i b = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    b = _mm_add_epi32(b, _mm_shuffle_epi32(b, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(b, _mm_shuffle_epi32(b, 0xb1)));
}
VEC_INLINE __m128i low_shorts(ints a) { /* as int16; a number beyond its range becomes the nearest in it */
    return _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
}
/* The low 16 bits of each integer are a float16. */
VEC_INLINE vec vec_from_low_f16(ints a) {
    return _mm256_cvtph_ps(low_shorts(_mm256_srai_epi32(_mm256_slli_epi32(a, 16), 16)));
}

VEC_INLINE ints shorts_all(int a) { return _mm256_set1_epi16((int16_t)a); }
VEC_INLINE void shorts_store_ints(int16_t *p, ints a) { _mm_storeu_si128((void *)p, low_shorts(a)); }
VEC_INLINE void bytes_store_ints(int8_t *p, ints a) {
    _mm_storel_epi64((void *)p, _mm_packs_epi16(low_shorts(a), low_shorts(a)));
}

/* a | (b & mask). */
VEC_INLINE ints bytes_all(int a) { return _mm256_set1_epi8((int8_t)a); }
VEC_INLINE ints ints_add(ints a, ints b) { return _mm256_add_epi32(a, b); }
VEC_INLINE ints ints_sub(ints a, ints b) { return _mm256_sub_epi32(a, b); }
VEC_INLINE ints ints_xor(ints a, ints b) { return _mm256_xor_si256(a, b); }
VEC_INLINE ints ints_or_and(ints a, ints b, ints mask) { return ints_or(a, ints_and(b, mask)); }

/* dot_pairs: sum + a0 * b0 + a1 * b1, for the pair of shorts in each 32 bits.
 *
 * Sums of products of bytes: `some` begins as byte_dots_begin(sum), takes BYTE_RUN products, and
 * byte_dots_end gives sum + those.
 *
 * In assembly for gcc, which would multiply first and add later, and spill the products. With intrinsics of
 * AVX_VNNI it would copy sums. clang loses half of its speed by this assembly, and has intrinsics. */
#ifdef AVX_VNNI /* {vex}: not the form of AVX-512 */
VEC_INLINE ints dot_pairs(ints sum, ints a, ints b) {
#ifdef __clang__
    return _mm256_dpwssd_avx_epi32(sum, a, b);
#else
    __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
    return sum;
#endif
}
VEC_INLINE ints byte_dots_begin(ints sum) { return sum; }
VEC_INLINE ints byte_dots_end(ints some, ints sum) { return (void)sum, some; }
VEC_INLINE ints byte_dot_lanes(const int is_signed, ints sum, ints a, ints b) {
    (void)is_signed;
#ifdef __clang__
    return _mm256_dpbusd_avx_epi32(sum, a, b);
#else
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
    return sum;
#endif
}
#else
VEC_INLINE ints dot_pairs(ints sum, ints a, ints b) {
#ifdef __clang__
    return ints_add(sum, _mm256_madd_epi16(a, b));
#else
    ints products;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(a), "xm"(b));
    return sum;
#endif
}

/* vpmaddubsw multiplies bytes without a sign by bytes with one, and adds two products in 16 bits; vpmaddwd
 * adds two such sums in 32 bits. In 16 bits, below 2^15 = 32,768:
 *
 *     |q| at most     2 products of 127     BYTE_RUN     the largest sum
 *     15              3,810                 8            30,480
 *     31              7,874                 4            31,496
 *     63              16,002                2            32,004
 *     128 (signed)    32,512                1            32,512 */
VEC_INLINE ints byte_dots_begin(ints sum) { return (void)sum, ints_zero(); }
VEC_INLINE ints byte_dots_end(ints some, ints sum) {
    return ints_add(sum, _mm256_madd_epi16(some, shorts_all(1)));
}
VEC_INLINE ints byte_dot_lanes(const int is_signed, ints some, ints a, ints b) {
    if (is_signed) /* BYTE_RUN is 1, so `some` is 0 */
        return _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a));
#ifdef __clang__
    return _mm256_add_epi16(some, _mm256_maddubs_epi16(a, b));
#else
    ints products;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(some), "=&x"(products) : "x"(a), "xm"(b));
    return some;
#endif
}
#endif

/* b in memory goes into all lanes. */
VEC_INLINE ints byte_dot(const int is_signed, ints some, ints a, const int32_t *b) {
    return byte_dot_lanes(is_signed, some, a, ints_all(*b));
}

/* table[the low four bits of each lane]. */
VEC_INLINE vec vec_from_table(const float table[16], ints codes) {
    const vec first = _mm256_permutevar8x32_ps(vec_load(table), codes); /* by the low three bits */
    const vec second = _mm256_permutevar8x32_ps(vec_load(table + 8), codes);
    return _mm256_blendv_ps(first, second, vec_of_bits(ints_left(codes, 28)));
}

/* The same for bytes: 16 of them in every 128 bits, and codes from 0 to 15. */
VEC_INLINE ints ints_of_16_bytes(const int8_t *p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)p));
}
VEC_INLINE ints bytes_of_table(ints table, ints codes) { return _mm256_shuffle_epi8(table, codes); }

/* Each lane reads 128 bits of its own row, in four registers. */
VEC_INLINE void rows_4_u32(ints out[4], const uint8_t *p, const int64_t at[LANES]) {
    ints r[4]; /* row i, and row i + 4 in the upper half */
    for (int i = 0; i < 4; i++)
        r[i] = _mm256_loadu2_m128i((const void *)(p + at[i + 4]), (const void *)(p + at[i]));
    const ints low01 = _mm256_unpacklo_epi32(r[0], r[1]), high01 = _mm256_unpackhi_epi32(r[0], r[1]);
    const ints low23 = _mm256_unpacklo_epi32(r[2], r[3]), high23 = _mm256_unpackhi_epi32(r[2], r[3]);
    out[0] = _mm256_unpacklo_epi64(low01, low23), out[1] = _mm256_unpackhi_epi64(low01, low23);
    out[2] = _mm256_unpacklo_epi64(high01, high23), out[3] = _mm256_unpackhi_epi64(high01, high23);
}

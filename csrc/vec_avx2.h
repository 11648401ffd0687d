/* The vocabulary of the vector forms in AVX2: `vec` is eight floats in one register.
 *
 * Every function is the plain sentence of its name, and vec_avx512.h says the same sentences with
 * sixteen. linear.c and attention.c are written in these words, so that another instruction set is
 * another file like this one. */
#include <immintrin.h>

#include "vec.h"

#define VEC(name) name##_avx2
#define LANES 8
#define TILE_TOKENS 3 /* linear.c: 4 rows x 3 tokens fill the 16 registers */

/* A target for each function instead of a compiler flag: what is not a kernel must run anywhere. */
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define WORD static inline __attribute__((always_inline, target("avx2,fma,f16c")))

typedef __m256 vec;
typedef __m256i bytes16; /* sixteen bytes, in both halves */

WORD vec vec_zero(void) { return _mm256_setzero_ps(); }
WORD vec vec_all(float a) { return _mm256_set1_ps(a); }
WORD vec vec_load(const void *p) { return _mm256_loadu_ps(p); }
WORD void vec_store(float *p, vec a) { _mm256_storeu_ps(p, a); }
WORD vec vec_add(vec a, vec b) { return _mm256_add_ps(a, b); }
WORD vec vec_sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
WORD vec vec_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
WORD vec vec_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); } /* a * b + c, rounded once */
WORD vec vec_max(vec a, vec b) { return _mm256_max_ps(a, b); }             /* b where either is NaN */
WORD vec vec_round(vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

/* a * 2^n, for whole n that leave the exponent in its range. */
WORD vec vec_times_2_to(vec n, vec a) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), exponent));
}
/* a, but 0 where x < limit. */
WORD vec vec_zero_below(vec x, vec limit, vec a) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, limit, _CMP_LT_OQ), a);
}

WORD vec vec_from_f16(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128(p)); }
WORD vec vec_from_bf16(const void *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16));
}
WORD vec vec_from_i8(const void *p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p))); }
WORD vec vec_from_8_bytes(uint64_t a) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)&a)));
}
WORD vec vec_all_f16(const uint8_t *p) { return _mm256_cvtph_ps(_mm_set1_epi16((int16_t)load_u16(p))); }

/* Sixteen bytes. Of each the bits from `from` on that the mask leaves; four bits and upper ones joined;
 * sixteen single bits put in as the fifth of each byte; and LANES of the bytes as floats. */
WORD bytes16 load_bytes16(const void *p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(p)); }
WORD bytes16 field(bytes16 a, int from, int mask) {
    return _mm256_and_si256(_mm256_srli_epi16(a, from), _mm256_set1_epi8((char)mask));
}
WORD bytes16 join(bytes16 low, bytes16 upper) { return _mm256_or_si256(low, _mm256_slli_epi16(upper, 4)); }
WORD bytes16 plus_fifth_bits(bytes16 a, uint16_t bits) {
    const __m256i spread = _mm256_shuffle_epi8(
        _mm256_set1_epi16((int16_t)bits), _mm256_setr_epi64x(0, 0x0101010101010101, 0, 0x0101010101010101));
    const __m256i own = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    return _mm256_or_si256(
        a, _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(spread, own), own), _mm256_set1_epi8(16)));
}
WORD vec vec_from_bytes16(bytes16 a, const int first) {
    /* One shuffle puts each byte at the bottom of its own 32 bits (a set top bit gives 0). A widening
     * conversion would do, but that crosses the halves, and Intel's cores have one unit for what does
     * and two for what does not. */
    const __m256i pick = _mm256_setr_epi32(first - 256, first - 255, first - 254, first - 253, first - 252,
                                           first - 251, first - 250, first - 249);
    return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(a, pick));
}

/* The sums of four registers: (sum a, sum b, sum c, sum d). Always in the same tree,
 * ((0+1)+(2+3)) + ((4+5)+(6+7)), so that whoever sums gets the same bits. */
WORD __m128 vec_sums(vec a, vec b, vec c, vec d) {
    const vec quarters = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps(quarters, 1));
}

/* Four floats: repeated to fill a register, the first of one, and its fours added or compared. */
WORD vec vec_of_fours(__m128 a) { return _mm256_set_m128(a, a); }
WORD __m128 first_four(vec a) { return _mm256_castps256_ps128(a); }
WORD __m128 fours_sum(vec a) { return _mm_add_ps(first_four(a), _mm256_extractf128_ps(a, 1)); }
WORD __m128 fours_max(vec a) { return _mm_max_ps(first_four(a), _mm256_extractf128_ps(a, 1)); }

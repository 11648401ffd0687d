/* The vector functions in NEON: `vec` is eight floats in two registers. So every sum has the order of
 * vec_avx2.h, and the same bits. That header has a comment for each function. */
#include <arm_neon.h>

#include "formats.h"

#define VEC(name) name##_neon
#define LANES 8
#define MR 4        /* linear_gemm.c: tokens x 2 vectors of sums, 16 of the 32 registers */
#define TILE_ROWS 6 /* attention.c, gradients: rows x 2 vectors of sums, 24 of the 32 */

/* Two products of bytes are added in 16 bits, as in vec_avx2.h. */
#define BYTE_RUN(q) ((q) <= 15 ? 8 : (q) <= 31 ? 4 : (q) <= 63 ? 2 : 1)
#define SIGNED_BYTES 1

/* Every aarch64 CPU has NEON. */
#define VEC_TARGET
#define VEC_INLINE static inline __attribute__((always_inline))

typedef struct {
    float32x4_t low, high;
} vec;

VEC_INLINE vec vec_all(float a) { return (vec){vdupq_n_f32(a), vdupq_n_f32(a)}; }
VEC_INLINE vec vec_zero(void) { return vec_all(0); }
VEC_INLINE vec vec_load(const void *p) { return (vec){vld1q_f32(p), vld1q_f32((const float *)p + 4)}; }
VEC_INLINE void vec_store(float *p, vec a) { vst1q_f32(p, a.low), vst1q_f32(p + 4, a.high); }
VEC_INLINE vec vec_add(vec a, vec b) { return (vec){vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
VEC_INLINE vec vec_sub(vec a, vec b) { return (vec){vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
VEC_INLINE vec vec_mul(vec a, vec b) { return (vec){vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
VEC_INLINE vec vec_div(vec a, vec b) { return (vec){vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
VEC_INLINE vec vec_sqrt(vec a) { return (vec){vsqrtq_f32(a.low), vsqrtq_f32(a.high)}; }
VEC_INLINE vec vec_fma(vec a, vec b, vec c) {
    return (vec){vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}
VEC_INLINE vec vec_round(vec a) { return (vec){vrndnq_f32(a.low), vrndnq_f32(a.high)}; }

/* vmaxq_f32 is a NaN where a is one. */
VEC_INLINE float32x4_t max_4(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
VEC_INLINE vec vec_max(vec a, vec b) { return (vec){max_4(a.low, b.low), max_4(a.high, b.high)}; }

VEC_INLINE vec vec_from_f16(const void *p) {
    const float16x8_t halves = vreinterpretq_f16_u8(vld1q_u8(p));
    return (vec){vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
}
VEC_INLINE vec vec_all_f16(const void *p) {
    uint16_t half;
    memcpy(&half, p, sizeof half);
    const float32x4_t a = vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(half)));
    return (vec){a, a};
}
VEC_INLINE vec vec_from_i8(const void *p) {
    const int16x8_t shorts = vmovl_s8(vld1_s8(p));
    return (vec){vcvtq_f32_s32(vmovl_s16(vget_low_s16(shorts))), vcvtq_f32_s32(vmovl_high_s16(shorts))};
}
VEC_INLINE vec vec_from_bf16(const void *p) {
    const uint16x8_t upper = vreinterpretq_u16_u8(vld1q_u8(p));
    return (vec){vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(upper), 16)),
                 vreinterpretq_f32_u32(vshll_high_n_u16(upper, 16))};
}
VEC_INLINE void vec_store_f16(void *p, vec a) {
    vst1q_u8(p, vreinterpretq_u8_f16(vcvt_high_f16_f32(vcvt_f16_f32(a.low), a.high)));
}

/* a real, a imaginary, ... times b: the imaginary times the imaginary is subtracted. */
VEC_INLINE float32x4_t times_complex_4(float32x4_t a, float32x4_t b) {
    const uint32x4_t minus = vreinterpretq_u32_u64(vdupq_n_u64(0x80000000));
    const float32x4_t crossed = vmulq_f32(vrev64q_f32(a), vtrn2q_f32(b, b));
    const uint32x4_t signs = veorq_u32(vreinterpretq_u32_f32(crossed), minus);
    return vaddq_f32(vmulq_f32(a, vtrn1q_f32(b, b)), vreinterpretq_f32_u32(signs));
}
VEC_INLINE vec vec_times_complex(vec a, vec b) {
    return (vec){times_complex_4(a.low, b.low), times_complex_4(a.high, b.high)};
}

VEC_INLINE float32x4_t sums_of_4(float32x4_t a, float32x4_t b, float32x4_t c, float32x4_t d) {
    return vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
}
VEC_INLINE void vec_store_sums(float *p, vec a, vec b, vec c, vec d) {
    vst1q_f32(p, vaddq_f32(sums_of_4(a.low, b.low, c.low, d.low), sums_of_4(a.high, b.high, c.high, d.high)));
}
VEC_INLINE float vec_sum(vec a) {
    const float32x4_t fours = vaddq_f32(a.low, a.high);
    return vpadds_f32(vadd_f32(vget_low_f32(fours), vget_high_f32(fours)));
}
VEC_INLINE float vec_largest(vec a) {
    const float32x4_t fours = max_4(a.low, a.high), twos = max_4(fours, vextq_f32(fours, fours, 2));
    return vgetq_lane_f32(max_4(twos, vdupq_laneq_f32(twos, 1)), 0);
}

/* ---------------------------------------------------------------- whole numbers */

typedef struct {
    int32x4_t low, high;
} ints;

VEC_INLINE ints ints_all(int32_t a) { return (ints){vdupq_n_s32(a), vdupq_n_s32(a)}; }
VEC_INLINE ints ints_zero(void) { return ints_all(0); }
VEC_INLINE ints shorts_all(int a) { return ints_all((int32_t)((uint32_t)(uint16_t)a * 0x10001)); }
VEC_INLINE ints bytes_all(int a) { return ints_all((int32_t)((uint32_t)(uint8_t)a * 0x1010101)); }
VEC_INLINE int32x4_t load_4(const void *p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
VEC_INLINE ints ints_load(const void *p) { return (ints){load_4(p), load_4((const uint8_t *)p + 16)}; }
VEC_INLINE void ints_store(void *p, ints a) {
    vst1q_u8(p, vreinterpretq_u8_s32(a.low));
    vst1q_u8((uint8_t *)p + 16, vreinterpretq_u8_s32(a.high));
}
/* Operators of the compiler, because a shift by a constant is one instruction. */
VEC_INLINE ints ints_and(ints a, ints b) { return (ints){a.low & b.low, a.high & b.high}; }
VEC_INLINE ints ints_or(ints a, ints b) { return (ints){a.low | b.low, a.high | b.high}; }
VEC_INLINE ints ints_xor(ints a, ints b) { return (ints){a.low ^ b.low, a.high ^ b.high}; }
VEC_INLINE ints ints_left(ints a, int n) { return (ints){a.low << n, a.high << n}; }
VEC_INLINE ints ints_signed_right(ints a, int n) { return (ints){a.low >> n, a.high >> n}; }
VEC_INLINE ints ints_right(ints a, int n) {
    return (ints){(int32x4_t)((uint32x4_t)a.low >> n), (int32x4_t)((uint32x4_t)a.high >> n)};
}
VEC_INLINE ints ints_or_and(ints a, ints b, ints mask) { return ints_or(a, ints_and(b, mask)); }
VEC_INLINE ints ints_add(ints a, ints b) {
    return (ints){vaddq_s32(a.low, b.low), vaddq_s32(a.high, b.high)};
}
VEC_INLINE ints ints_sub(ints a, ints b) {
    return (ints){vsubq_s32(a.low, b.low), vsubq_s32(a.high, b.high)};
}
VEC_INLINE ints ints_max(ints a, ints b) {
    return (ints){vmaxq_s32(a.low, b.low), vmaxq_s32(a.high, b.high)};
}
VEC_INLINE int32_t ints_largest(ints a) { return vmaxvq_s32(vmaxq_s32(a.low, a.high)); }
VEC_INLINE int32_t ints_sum(ints a) { return vaddvq_s32(vaddq_s32(a.low, a.high)); }
VEC_INLINE vec vec_from_ints(ints a) { return (vec){vcvtq_f32_s32(a.low), vcvtq_f32_s32(a.high)}; }
VEC_INLINE ints ints_from_vec(vec a) { /* a NaN becomes 0 */
    return (ints){vcvtnq_s32_f32(a.low), vcvtnq_s32_f32(a.high)};
}
VEC_INLINE ints bits_of_vec(vec a) {
    return (ints){vreinterpretq_s32_f32(a.low), vreinterpretq_s32_f32(a.high)};
}
VEC_INLINE vec vec_of_bits(ints a) {
    return (vec){vreinterpretq_f32_s32(a.low), vreinterpretq_f32_s32(a.high)};
}

VEC_INLINE vec vec_xor(vec a, vec b) { return vec_of_bits(ints_xor(bits_of_vec(a), bits_of_vec(b))); }
VEC_INLINE vec vec_times_2_to(vec n, vec a) {
    return vec_of_bits(ints_add(bits_of_vec(a), ints_left(ints_from_vec(n), 23)));
}
VEC_INLINE vec vec_zero_below(vec x, vec limit, vec a) {
    const ints below = {vreinterpretq_s32_u32(vcltq_f32(x.low, limit.low)),
                        vreinterpretq_s32_u32(vcltq_f32(x.high, limit.high))};
    const ints bits = bits_of_vec(a);
    return vec_of_bits((ints){vbicq_s32(bits.low, below.low), vbicq_s32(bits.high, below.high)});
}
VEC_INLINE vec vec_from_low_f16(ints a) {
    return (vec){vcvt_f32_f16(vreinterpret_f16_s16(vmovn_s32(a.low))),
                 vcvt_f32_f16(vreinterpret_f16_s16(vmovn_s32(a.high)))};
}

VEC_INLINE int16x8_t low_shorts(ints a) { return vqmovn_high_s32(vqmovn_s32(a.low), a.high); }
VEC_INLINE void shorts_store_ints(int16_t *p, ints a) { vst1q_s16(p, low_shorts(a)); }
VEC_INLINE void bytes_store_ints(int8_t *p, ints a) { vst1_s8(p, vqmovn_s16(low_shorts(a))); }

/* Four registers are a square that is transposed. */
VEC_INLINE void transpose_4(int32x4_t out[4], int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d) {
    const int64x2_t ab[2] = {vreinterpretq_s64_s32(vtrn1q_s32(a, b)),
                             vreinterpretq_s64_s32(vtrn2q_s32(a, b))};
    const int64x2_t cd[2] = {vreinterpretq_s64_s32(vtrn1q_s32(c, d)),
                             vreinterpretq_s64_s32(vtrn2q_s32(c, d))};
    for (int i = 0; i < 2; i++) {
        out[i] = vreinterpretq_s32_s64(vtrn1q_s64(ab[i], cd[i]));
        out[i + 2] = vreinterpretq_s32_s64(vtrn2q_s64(ab[i], cd[i]));
    }
}
/* Each quarter of the square is transposed, and two of them change places. */
VEC_INLINE void vec_transpose(vec x[LANES]) {
    int32x4_t low[8], high[8];
    ints rows[8];
    for (int i = 0; i < 8; i++) rows[i] = bits_of_vec(x[i]);
    for (int i = 0; i < 8; i += 4) {
        transpose_4(low + i, rows[i].low, rows[i + 1].low, rows[i + 2].low, rows[i + 3].low);
        transpose_4(high + i, rows[i].high, rows[i + 1].high, rows[i + 2].high, rows[i + 3].high);
    }
    for (int i = 0; i < 4; i++) {
        x[i] = vec_of_bits((ints){low[i], low[i + 4]});
        x[i + 4] = vec_of_bits((ints){high[i], high[i + 4]});
    }
}
VEC_INLINE void rows_4_u32(ints out[4], const uint8_t *p, const int64_t at[LANES]) {
    int32x4_t r[LANES], low[4], high[4];
    for (int i = 0; i < LANES; i++) r[i] = load_4(p + at[i]);
    transpose_4(low, r[0], r[1], r[2], r[3]);
    transpose_4(high, r[4], r[5], r[6], r[7]);
    for (int i = 0; i < 4; i++) out[i] = (ints){low[i], high[i]};
}

/* The four products of two registers of shorts, or the eight of bytes, with their neighbours added. */
VEC_INLINE int32x4_t pair_products(int32x4_t a, int32x4_t b) {
    const int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
    return vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
}
VEC_INLINE int16x8_t byte_products(int32x4_t a, int32x4_t b) {
    const int8x16_t x = vreinterpretq_s8_s32(a), y = vreinterpretq_s8_s32(b);
    return vpaddq_s16(vmull_s8(vget_low_s8(x), vget_low_s8(y)), vmull_high_s8(x, y));
}
VEC_INLINE ints dot_pairs(ints sum, ints a, ints b) {
    return ints_add(sum, (ints){pair_products(a.low, b.low), pair_products(a.high, b.high)});
}
VEC_INLINE ints byte_dots_begin(ints sum) { return (void)sum, ints_zero(); }
VEC_INLINE ints byte_dots_end(ints some, ints sum) {
    return (ints){vpadalq_s16(sum.low, vreinterpretq_s16_s32(some.low)),
                  vpadalq_s16(sum.high, vreinterpretq_s16_s32(some.high))};
}
VEC_INLINE ints byte_dot_lanes(const int is_signed, ints some, ints a, ints b) {
    (void)is_signed;
    const int16x8_t low = vaddq_s16(vreinterpretq_s16_s32(some.low), byte_products(a.low, b.low)),
                    high = vaddq_s16(vreinterpretq_s16_s32(some.high), byte_products(a.high, b.high));
    return (ints){vreinterpretq_s32_s16(low), vreinterpretq_s32_s16(high)};
}
VEC_INLINE ints byte_dot(const int is_signed, ints some, ints a, const int32_t *b) {
    return byte_dot_lanes(is_signed, some, a, ints_all(*b));
}

/* A table of bytes is looked up; a float is four of them. */
VEC_INLINE float32x4_t from_table_4(const float table[16], int32x4_t codes) {
    const uint8x16x4_t bytes = vld1q_u8_x4((const uint8_t *)table);
    const uint32x4_t four = vreinterpretq_u32_s32(codes & 15) * 0x04040404 + 0x03020100;
    return vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vreinterpretq_u8_u32(four)));
}
VEC_INLINE vec vec_from_table(const float table[16], ints codes) {
    return (vec){from_table_4(table, codes.low), from_table_4(table, codes.high)};
}
VEC_INLINE ints ints_of_16_bytes(const int8_t *p) { return (ints){load_4(p), load_4(p)}; }
VEC_INLINE int32x4_t bytes_of_table_4(int32x4_t table, int32x4_t codes) {
    return vreinterpretq_s32_s8(vqtbl1q_s8(vreinterpretq_s8_s32(table), vreinterpretq_u8_s32(codes)));
}
VEC_INLINE ints bytes_of_table(ints table, ints codes) {
    return (ints){bytes_of_table_4(table.low, codes.low), bytes_of_table_4(table.high, codes.high)};
}

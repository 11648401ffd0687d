/* linear for many tokens (prefill), in vectors: every weight is used T times, so all depends on multiplying.
 *
 * A panel: 2 LANES rows side by side, one row in each lane, KC weights of each as pairs of words.
 *
 *              row 0     row 1           row 31
 *     pair 0   q0 q2     q0 q2    ...    q0 q2         one register, or two of them
 *     pair 1   q1 q3     q1 q3
 *     pair 2   q4 q6     ...
 *
 * (k and k + 2, because a byte's neighbour but one is half of the same 32 bits.) A panel is unpacked once and
 * multiplied with all tokens. The tile: two registers of the panel x 8 tokens (AVX2: 4) are 16 sums; a step
 * loads the two, and for each token one pair of x into all lanes, and multiplies 16 times. 10 loads take 5
 * cycles, 16 vpdpwssd take 8 (AVX2, 8 vpmaddwd and 8 vpaddd: 8, too). After a unit of 32 weights (K formats:
 * more) sums must be scaled, or they would overflow: 32 * 8191 * 8191 < 2^31; Q6_K 64 * 4096 * 8191; Q5_K
 * 128 * 31 * 63 * 8191; Q4_K 256 * 15 * 63 * 8191. The exact way makes floats of the panel, and the same tile
 * multiplies them: an FMA instead, for half as many weights.
 *
 * Compiled from avx2.c and avx512.c. tests/kernels/test_fixed.py and tests/kernels/test_kernels.py hold it to
 * NumPy. */
#include "dispatch.h"
#include "vec.h"

enum { MC = 64 * TOKEN_GROUP };

/* ---------------------------------------------------------------- the panel */

typedef struct {
    int32_t pairs[KC / 2][2][LANES];
    float d[KC / QK][2][LANES], m[KC / QK][2][LANES];
    float floats[KC][2][LANES]; /* the exact way: the weights themselves */
} panel;

INLINE int unit_of(int format) {
    return format == Q4_K ? 256 : format == Q5_K ? 128 : format == Q6_K ? 64 : 32;
}

/* Where LANES rows lie, from the first of them on: as numbers, and in a register. */
typedef struct {
    int64_t at[LANES];
    ints lanes;
} panel_rows;

/* Bits of four bytes, from `shift` on: of bytes 0 and 2, and of 1 and 3, as two pairs. */
VEC_INLINE void split(ints out[2], ints four, const int shift, const int mask) {
    for (int i = 0; i < 2; i++)
        out[i] = ints_and(ints_right(four, shift + 8 * i), ints_all(mask | mask << 16));
}
/* The bits from `from` on become bits 4 and more of q, which are `mask`: of bytes i and i + 2 again. */
VEC_INLINE ints with_upper(ints q, ints four, const int i, const int from, const int mask) {
    const int left = 4 - from - 8 * i;
    return ints_or_and(q, repeated_left(four, left, left), ints_all(mask | mask << 16));
}
VEC_INLINE void put(panel *to, int64_t pair, int half, ints a) { ints_store(to->pairs[pair][half], a); }
VEC_INLINE ints both_shorts(ints a) { return ints_or(ints_and(a, ints_all(0xffff)), ints_left(a, 16)); }

VEC_INLINE void unpack_block(const int format, panel *to, int64_t b, int half, const uint8_t *p,
                             const panel_rows *rows) {
    const int64_t at = b * 16;
    const ints d_m = rows_u32(p, rows->lanes);
    const vec d = vec_from_low_f16(d_m),
              m = vec_from_low_f16(ints_right(d_m, 16)); /* m: where there is one */
    ints fours[4];
    const int start = format == Q8_0 || format == Q4_0 ? 2 : format == Q4_1 ? 4 : format == Q5_0 ? 6 : 8;
    if (format == Q8_0) {
        for (int j = 0; j < 8; j++) {
            if (j % 4 == 0) rows_4_u32(fours, p + start + 4 * j, rows->at);
            put(to, at + 2 * j, half, shorts_signed_right(shorts_left(fours[j % 4], 8), 8));
            put(to, at + 2 * j + 1, half, shorts_signed_right(fours[j % 4], 8));
        }
    } else {
        ints fifth = ints_zero();
        if (format == Q5_0 || format == Q5_1) fifth = rows_u32(p + start - 4, rows->lanes);
        rows_4_u32(fours, p + start, rows->at);
        for (int j = 0; j < 4; j++) {
            for (int upper = 0; upper < 2; upper++) {
                ints q[2];
                split(q, fours[j], 4 * upper, 15);
                for (int i = 0; i < 2; i++) {
                    if (format == Q5_0 || format == Q5_1) {
                        const int bit = 16 * upper + 4 * j + i; /* and that two places on */
                        const ints one = ints_and(ints_right(fifth, bit), ints_all(1));
                        const ints other = ints_and(ints_right(fifth, bit + 2), ints_all(1));
                        q[i] = ints_or(q[i], ints_or(ints_left(one, 4), ints_left(other, 20)));
                    }
                    put(to, at + 8 * upper + 2 * j + i, half, shorts_add(q[i], shorts_all(zero_of(format))));
                }
            }
        }
    }
    vec_store(to->d[b][half], d);
    vec_store(to->m[b][half], m);
}

VEC_INLINE vec one_float(const int format, ints low) {
    return format == F16 ? vec_from_low_f16(low) : vec_of_bits(ints_left(low, 16));
}

/* F16 and BF16: 32 floats in each lane, and the largest of them gives the scale. */
VEC_INLINE void unpack_floats(const int format, panel *to, int64_t b, int half, const uint8_t *p,
                              const panel_rows *rows) {
    vec w[QK];
    ints largest = ints_zero(), twos[4];
    for (int j = 0; j < 16; j++) {
        if (j % 4 == 0) rows_4_u32(twos, p + 4 * j, rows->at);
        const ints two = twos[j % 4];
        for (int i = 0; i < 2; i++) {
            const ints one = i ? ints_right(two, 16) : ints_and(two, ints_all(0xffff));
            w[2 * j + i] = one_float(format, one);
            largest = ints_max(largest, ints_and(bits_of_vec(w[2 * j + i]), ints_all(0x7fffffff)));
        }
    }
    /* below 1e-30 nothing is left of a weight, and 8191 / max must stay finite */
    const vec max = vec_of_bits(largest), lowest = vec_all(1e-30f);
    const vec inverse = vec_zero_below(max, lowest, vec_div(vec_all(X_MAX), vec_max(lowest, max)));
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 2; i++) {
            const ints one = ints_from_vec(vec_mul(w[4 * j + i], inverse));
            const ints other = ints_from_vec(vec_mul(w[4 * j + 2 + i], inverse));
            put(to, b * 16 + 2 * j + i, half, ints_or(ints_and(one, ints_all(0xffff)), ints_left(other, 16)));
        }
    vec_store(to->d[b][half], vec_zero_below(max, lowest, vec_mul(max, vec_all(1.0f / X_MAX))));
}

VEC_INLINE void unpack_q6_k(panel *to, int half, const uint8_t *p, const panel_rows *rows) {
    const vec d = vec_from_low_f16(ints_right(rows_u32(p + 206, rows->lanes), 16));
    ints sc[4], low[16], upper[8];
    for (int unit = 0; unit < QK_K / unit_of(Q6_K); unit++) vec_store(to->d[unit][half], d);
    rows_4_u32(sc, p + 192, rows->at);
    for (int i = 0; i < 8;
         i++) { /* of 32 weights each; four of them share 64 bytes of low bits, 32 of upper */
        for (int j = 0; j < (i % 4 ? 0 : 16); j += 4) rows_4_u32(low + j, p + i * 16 + 4 * j, rows->at);
        for (int j = 0; j < (i % 4 ? 0 : 8); j += 4) rows_4_u32(upper + j, p + 128 + i * 8 + 4 * j, rows->at);
        for (int j = 0; j < 8; j++) {
            const ints own = ints_signed_right(ints_left(sc[i / 2], 24 - 8 * (i % 2 * 2 + j / 4)), 24);
            ints q[2];
            split(q, low[i % 2 * 8 + j], i % 4 / 2 * 4, 15);
            for (int l = 0; l < 2; l++) {
                q[l] = shorts_add(with_upper(q[l], upper[j], l, i % 4 * 2, 48), shorts_all(-32));
                put(to, 16 * i + 2 * j + l, half, shorts_mul(q[l], both_shorts(own)));
            }
        }
    }
}

VEC_INLINE void unpack_q4_k_or_q5_k(const int format, panel *to, int half, const uint8_t *p,
                                    const panel_rows *rows) {
    ints head[4], scales[8], pairs[8], fifth[8]; /* d and dmin, and the 12 bytes of scales */
    rows_4_u32(head, p, rows->at);
    const ints low = head[1], middle = head[2], high = head[3];
    const vec d = vec_from_low_f16(head[0]), dmin = vec_from_low_f16(ints_right(head[0], 16));
    for (int unit = 0; unit < QK_K / unit_of(format); unit++) vec_store(to->d[unit][half], d);
    if (format == Q5_K)
        for (int j = 0; j < 8; j += 4) rows_4_u32(fifth + j, p + 16 + 4 * j, rows->at);
    const uint8_t *nibbles = p + 16 + (format == Q5_K ? 32 : 0);
    for (int i = 0; i < 8; i++) { /* sub-blocks of 32, of which two share 32 bytes */
        ints sc, m;
        const int s = 8 * (i % 4);
        if (i < 4) {
            sc = ints_and(ints_right(low, s), ints_all(63));
            m = ints_and(ints_right(middle, s), ints_all(63));
        } else {
            sc = ints_or(ints_and(ints_right(high, s), ints_all(15)),
                         ints_left(ints_and(ints_right(low, s + 6), ints_all(3)), 4));
            m = ints_or(ints_and(ints_right(high, s + 4), ints_all(15)),
                        ints_left(ints_and(ints_right(middle, s + 6), ints_all(3)), 4));
        }
        vec_store(to->m[i][half], vec_mul(vec_from_ints(m), vec_sub(vec_zero(), dmin)));
        scales[i] = both_shorts(sc);
    }
    for (int run = 0; run < 4; run++) {
        for (int j = 0; j < 8; j += 4) rows_4_u32(pairs + j, nibbles + 32 * run + 4 * j, rows->at);
        for (int i = 2 * run; i < 2 * run + 2; i++)
            for (int j = 0; j < 8; j++) {
                ints q[2];
                split(q, pairs[j], i % 2 * 4, 15);
                for (int l = 0; l < 2; l++) {
                    if (format == Q5_K) q[l] = with_upper(q[l], fifth[j], l, i, 16);
                    put(to, 16 * i + 2 * j + l, half, shorts_mul(q[l], scales[i]));
                }
            }
    }
}

/* Single numbers as they are. */
VEC_INLINE void read_floats(const int format, panel *to, int64_t k, int half, const uint8_t *p,
                            const panel_rows *rows) {
    ints fours[4];
    if (format == F32)
        for (int i = 0; i < QK; i++) {
            if (i % 4 == 0) rows_4_u32(fours, p + 4 * i, rows->at);
            vec_store(to->floats[k + i][half], vec_of_bits(fours[i % 4]));
        }
    else
        for (int i = 0; i < QK; i += 2) {
            if (i % 8 == 0) rows_4_u32(fours, p + 2 * i, rows->at);
            const ints two = fours[i / 2 % 4];
            vec_store(to->floats[k + i][half], one_float(format, ints_and(two, ints_all(0xffff))));
            vec_store(to->floats[k + i + 1][half], one_float(format, ints_right(two, 16)));
        }
}

/* d * q' + m. A scale has 11 bits, q' at most 13: the product is exact, and one FMA rounds as NumPy does. */
VEC_INLINE void dequantize_panel(const int format, panel *w, int64_t n, int half) {
    for (int64_t pair = 0; pair < n / 2; pair++) {
        const vec d = vec_load(w->d[2 * pair / unit_of(format)][half]);
        const vec m = has_minima(format) ? vec_load(w->m[2 * pair / QK][half]) : vec_zero();
        const ints two = ints_load(w->pairs[pair][half]);
        const int64_t k = pair / 2 * 4 + pair % 2;
        vec_store(w->floats[k][half],
                  vec_fma(vec_from_ints(ints_signed_right(ints_left(two, 16), 16)), d, m));
        vec_store(w->floats[k + 2][half], vec_fma(vec_from_ints(ints_signed_right(two, 16)), d, m));
    }
}

/* n weights of each row, from p on. */
VEC_INLINE void pack_panel(const int format, const int exact, panel *w, int64_t n, int half, const uint8_t *p,
                           const panel_rows *rows) {
    const int64_t weights = block_weights(format), single = is_single(format);
    for (int64_t k = 0; k < n; k += weights, p += block_bytes(format))
        if (single && exact)
            read_floats(format, w, k, half, p, rows);
        else if (single)
            unpack_floats(format, w, k / QK, half, p, rows);
        else if (format == Q6_K)
            unpack_q6_k(w, half, p, rows);
        else if (is_k(format))
            unpack_q4_k_or_q5_k(format, w, half, p, rows);
        else
            unpack_block(format, w, k / QK, half, p, rows);
    if (exact && !single) dequantize_panel(format, w, n, half);
}

/* ---------------------------------------------------------------- the tile: y += x @ panel.T */

VEC_INLINE void micro_kernel(const int tokens, float *y, const panel *w, int64_t n, int64_t unit,
                             const int minima, const gemm_activations *x) {
    vec sum[MR][2];
    for (int t = 0; t < tokens; t++)
        for (int h = 0; h < 2; h++) sum[t][h] = vec_load(y + t * 2 * LANES + h * LANES);
    for (int64_t u = 0; u * unit < n; u++) {
        ints dot[MR][2];
        for (int t = 0; t < tokens; t++) dot[t][0] = dot[t][1] = ints_zero();
        for (int64_t k = u * unit / 2; k < (u + 1) * unit / 2; k++) {
            __builtin_prefetch(x->pairs + (k + 64) * TOKEN_GROUP); /* x comes from the second level: 3% */
            const ints w0 = ints_load(w->pairs[k][0]), w1 = ints_load(w->pairs[k][1]);
            for (int t = 0; t < tokens; t++) {
                const ints two = ints_all(x->pairs[k * TOKEN_GROUP + t]);
                dot[t][0] = dot_pairs(dot[t][0], w0, two);
                dot[t][1] = dot_pairs(dot[t][1], w1, two);
            }
        }
        for (int h = 0; h < 2; h++) {
            const vec d = vec_load(w->d[u][h]);
            for (int t = 0; t < tokens; t++)
                sum[t][h] = vec_fma(vec_from_ints(dot[t][h]),
                                    vec_mul(d, vec_all(x->dx[u * (unit / QK) * TOKEN_GROUP + t])), sum[t][h]);
        }
    }
    if (minima)
        for (int64_t b = 0; b < n / QK; b++)
            for (int h = 0; h < 2; h++)
                for (int t = 0; t < tokens; t++)
                    sum[t][h] =
                        vec_fma(vec_load(w->m[b][h]), vec_all(x->sums[b * TOKEN_GROUP + t]), sum[t][h]);
    for (int t = 0; t < tokens; t++)
        for (int h = 0; h < 2; h++) vec_store(y + t * 2 * LANES + h * LANES, sum[t][h]);
}

/* x: the first token's number, IN from one token to the next. A chunk is summed by itself. */
VEC_INLINE void micro_kernel_exact(const int tokens, float *y, const panel *w, int64_t n, const float *x,
                                   int64_t IN) {
    vec sum[MR][2];
    for (int t = 0; t < tokens; t++) sum[t][0] = sum[t][1] = vec_zero();
    for (int64_t k = 0; k < n; k++) {
        const vec w0 = vec_load(w->floats[k][0]), w1 = vec_load(w->floats[k][1]);
        for (int t = 0; t < tokens; t++) {
            const vec one = vec_all(x[t * IN + k]);
            sum[t][0] = vec_fma(w0, one, sum[t][0]);
            sum[t][1] = vec_fma(w1, one, sum[t][1]);
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int h = 0; h < 2; h++) {
            float *at = y + t * 2 * LANES + h * LANES;
            vec_store(at, vec_add(vec_load(at), sum[t][h]));
        }
}

/* Each tile has its number of tokens as a constant, so that its sums are registers. */
#if MR == 8
#define EACH_NUMBER(CASE) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#else
#define EACH_NUMBER(CASE) CASE(1) CASE(2) CASE(3) CASE(4)
#endif
VEC_TARGET static void any_micro_kernel(int64_t tokens, float *y, const panel *w, int64_t n, int64_t unit,
                                        int minima, const gemm_activations *x) {
#define CASE(N)                                                                                              \
    case N: micro_kernel(N, y, w, n, unit, minima, x); break;
    switch (tokens) { EACH_NUMBER(CASE) }
#undef CASE
}
VEC_TARGET static void any_micro_kernel_exact(int64_t tokens, float *y, const panel *w, int64_t n,
                                              const float *x, int64_t IN) {
#define CASE(N)                                                                                              \
    case N: micro_kernel_exact(N, y, w, n, x, IN); break;
    switch (tokens) { EACH_NUMBER(CASE) }
#undef CASE
}

VEC_INLINE void gemm(const int format, const int exact, const linear_args *a, int64_t begin, int64_t end) {
    const int64_t row = a->IN / block_weights(format) * block_bytes(format);
    const gemm_activations all = gemm_activations_at(a->x, a->T, a->IN);
    _Alignas(64) panel w;
    _Alignas(64) float y[MC * 2 * LANES];
    for (int64_t t0 = 0; t0 < a->T; t0 += MC)
        for (int64_t r0 = begin; r0 < end; r0 += 2 * LANES) {
            const int64_t tokens = t0 + MC < a->T ? MC : a->T - t0;
            const int64_t rows = r0 + 2 * LANES < end ? 2 * LANES : end - r0;
            memset(y, 0, (size_t)(tokens * 2 * LANES) * sizeof(float));
            for (int64_t c = 0; c < a->IN; c += KC) {
                const int64_t n = c + KC < a->IN ? KC : a->IN - c;
                for (int half = 0; half < 2; half++) {
                    const int64_t first = half * LANES < rows ? half * LANES : 0;
                    panel_rows lie;
                    int32_t at[LANES];
                    for (int l = 0; l < LANES; l++) { /* lanes beyond the last row read that one again */
                        lie.at[l] = (first + l < rows ? l : rows - 1 - first) * row;
                        at[l] = (int32_t)lie.at[l];
                    }
                    lie.lanes = ints_load(at);
                    const uint8_t *p =
                        a->w + (r0 + first) * row + c / block_weights(format) * block_bytes(format);
                    pack_panel(format, exact, &w, n, half, p, &lie);
                    /* Thirty-two rows are more streams than a CPU sees. */
                    const int64_t chunk_bytes = KC / block_weights(format) * block_bytes(format);
                    for (int l = 0; l < LANES; l++)
                        for (int64_t i = 0; i < chunk_bytes; i += 64)
                            __builtin_prefetch(p + lie.at[l] + chunk_bytes + i);
                }
                for (int64_t t = 0; t < tokens; t += MR) {
                    const int64_t some = tokens - t < MR ? tokens - t : MR;
                    float *to = y + t * 2 * LANES;
                    if (exact) {
                        any_micro_kernel_exact(some, to, &w, n, (const float *)a->x + (t0 + t) * a->IN + c,
                                               a->IN);
                        continue;
                    }
                    const int64_t at = place_of(a->T, a->IN, (t0 + t) / TOKEN_GROUP, c), i = t % TOKEN_GROUP;
                    const gemm_activations x = {all.pairs + at / 2 + i, all.dx + at / QK + i,
                                                all.sums + at / QK + i};
                    any_micro_kernel(some, to, &w, n, unit_of(format), has_minima(format), &x);
                }
            }
            for (int64_t t = 0; t < tokens; t++)
                memcpy(a->y + (t0 + t) * a->OUT + r0, y + t * 2 * LANES, (size_t)rows * sizeof(float));
        }
}

/* ---------------------------------------------------------------- what dispatch.c offers
 *
 * One copy of each loop for each format: `format` is a constant in it, and nothing is left to ask. */

VEC_TARGET void VEC(linear_exact)(const linear_args *a, int64_t begin, int64_t end) {
#define CASE(FORMAT)                                                                                         \
    case FORMAT: gemm(FORMAT, 1, a, begin, end); break;
    switch (a->format) { EACH_FORMAT(CASE) }
#undef CASE
}

VEC_TARGET void VEC(linear)(const linear_args *a, int64_t begin, int64_t end) {
    if (a->T > GEMV_TOKENS || !is_single(a->format)) {
        VEC(linear_exact)(a, begin, end);
        return;
    }
    switch (a->format) {
    case F32: gemv_floats(F32, a, begin, end); break;
    case F16: gemv_floats(F16, a, begin, end); break;
    case BF16: gemv_floats(BF16, a, begin, end); break;
    }
}

VEC_TARGET void VEC(linear_quantized)(const linear_args *a, int64_t begin, int64_t end) {
#define CASE(FORMAT)                                                                                         \
    case FORMAT:                                                                                             \
        a->T > GEMV_TOKENS ? gemm(FORMAT, 0, a, begin, end) : gemv_quantized(FORMAT, a, begin, end);         \
        break;
    switch (a->format) { EACH_FORMAT(CASE) }
#undef CASE
}

/* linear for many tokens, as in prefill: GEMM, in vectors. Every weight is used T times, so the arithmetic is
 * the limit. In the letters of BLIS y is C, (T, OUT), x is A and w, transposed, is B:
 *
 *     for ic in 0, MC .. T                MC = 512 tokens: KC numbers of each are 256 KB, a part of L2
 *         for jr in begin, NR .. end      NR = 2 LANES rows of w, two registers; a thread's rows are its NC
 *             tiles = 0                   (MC, NR) float32: tiles of (MR, NR)
 *             for pc in 0, KC .. IN       KC = 256 weights of a row, a block of a K format
 *                 pack_panel              w[jr: jr + NR, pc: pc + KC], transposed: 8 or 16 KB, a part of L1
 *                 for ir in 0, MR .. MC   MR = 8 tokens (AVX2: 4): MR x 2 registers of sums
 *                     micro_kernel        tiles[ir: ir + MR] += x[ic + ir: ic + ir + MR, pc: pc + KC] @ panel
 *             y[ic: ic + MC, jr: jr + NR] = tiles
 *
 * The micro-kernel loads two registers of the panel, and for each token one pair of x into all lanes; then it
 * multiplies 2 MR times. With MR = 8 these are 10 loads, 5 cycles, for 16 vpdpwssd, 8 cycles. (AVX2: 6 loads,
 * 3 cycles, for 8 vpmaddwd and 8 vpaddd, 8 cycles.) So the multipliers are the limit.
 *
 * Products are summed in int32, a unit of weights at a time. The table in unpack.h proves that none
 * overflows.
 *
 * In the exact way a panel is floats, and its micro-kernel has an FMA in place of two integer products.
 *
 * Compiled once for each instruction set: the vector forms, and the scalar micro-kernels for their test
 * (README.md). tests/kernels/test_quantized_activations.py and tests/kernels/test_kernels.py compare it with
 * NumPy. tests/kernels/test_micro_kernel.py compares the two micro-kernels with each other. */
#include "dispatch.h"
#include "formats.h"
#include "unpack.h"
#include "vec.h"

enum { MC = 64 * TOKEN_GROUP };

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---------------------------------------------------------------- pack_panel */

/* panel (kc, NR) = w[jr: jr + nr, pc: pc + kc], transposed. Columns from nr on repeat the last row; their
 * results are not used. */
VEC_INLINE void pack_panel(const int format, const int exact, panel *to, const nl_matrix *w, int64_t jr,
                           int64_t nr, int64_t pc, int64_t kc) {
    const int64_t weights = block_weights(format), bytes = block_bytes(format),
                  row_bytes = w->IN / weights * bytes;
    for (int64_t column = 0; column < NR; column += LANES) {
        const int64_t first = column < nr ? column : 0; /* when no row is left: any row */
        const uint8_t *p = (const uint8_t *)w->data + (jr + first) * row_bytes + pc / weights * bytes;
        panel_rows rows = {.to = to, .column = column};
        int32_t at[LANES];
        for (int l = 0; l < LANES; l++) {
            rows.at[l] = min(l, nr - 1 - first) * row_bytes;
            at[l] = (int32_t)rows.at[l];
        }
        rows.at_lanes = ints_load(at);
        for (int64_t k = 0; k < kc; k += weights) unpack(format, exact, &rows, k, p + k / weights * bytes);
        if (exact && !is_single(format)) dequantize_panel(format, &rows, kc);
        /* The CPU itself prefetches fewer streams than a panel has rows. The next KC weights of each row: */
        const int64_t panel_bytes = KC / weights * bytes;
        for (int l = 0; l < LANES; l++) prefetch_to_l1(p + rows.at[l] + panel_bytes, panel_bytes);
    }
}

/* ---------------------------------------------------------------- micro-kernel: tile (mr, NR) += x @ panel
 *
 * First in scalar C. The form in vectors has the same signature and adds in the same order: the same bits. */

typedef void micro_kernel_function(int mr, float *tile, const panel *w, int64_t kc, int64_t unit, int minima,
                                   const gemm_activations *x);
typedef void micro_kernel_exact_function(int mr, float *tile, const panel *w, int64_t kc, const float *x,
                                         int64_t IN);

/* pairs (a0, a1) and (b0, b1) of 16-bit integers: a0 * b0 + a1 * b1 */
INLINE int32_t dot_of_pairs(int32_t a, int32_t b) { return (int16_t)a * (int16_t)b + (a >> 16) * (b >> 16); }

static void micro_kernel_scalar(int mr, float *tile, const panel *w, int64_t kc, int64_t unit, int minima,
                                const gemm_activations *x) {
    for (int t = 0; t < mr; t++)
        for (int r = 0; r < NR; r++) {
            float *y = tile + t * NR + r;
            for (int64_t u = 0; u < kc / unit; u++) {
                int32_t dot = 0;
                for (int64_t k = u * unit / 2; k < (u + 1) * unit / 2; k++)
                    dot += dot_of_pairs(w->pairs[k][r], x->pairs[k * TOKEN_GROUP + t]);
                *y = fmaf((float)dot, w->d[u][r] * x->dx[u * unit / QK * TOKEN_GROUP + t], *y);
            }
            for (int64_t b = 0; b < (minima ? kc / QK : 0); b++)
                *y = fmaf(w->m[b][r], x->sums[b * TOKEN_GROUP + t], *y);
        }
}

VEC_INLINE void micro_kernel_vectors(const int mr, float *tile, const panel *w, int64_t kc, int64_t unit,
                                     const int minima, const gemm_activations *x) {
    vec y[MR][2];
    for (int t = 0; t < mr; t++)
        for (int h = 0; h < 2; h++) y[t][h] = vec_load(tile + t * NR + h * LANES);
    for (int64_t u = 0; u * unit < kc; u++) {
        ints dot[MR][2];
        for (int t = 0; t < mr; t++) dot[t][0] = dot[t][1] = ints_zero();
        for (int64_t k = u * unit / 2; k < (u + 1) * unit / 2; k++) {
            prefetch_to_l1(x->pairs + (k + 64) * TOKEN_GROUP, 1); /* x comes from L2: 3% */
            const ints w0 = ints_load(w->pairs[k]), w1 = ints_load(w->pairs[k] + LANES);
            for (int t = 0; t < mr; t++) {
                const ints pair = ints_all(x->pairs[k * TOKEN_GROUP + t]);
                dot[t][0] = dot_pairs(dot[t][0], w0, pair);
                dot[t][1] = dot_pairs(dot[t][1], w1, pair);
            }
        }
        for (int h = 0; h < 2; h++) {
            const vec d = vec_load(w->d[u] + h * LANES);
            for (int t = 0; t < mr; t++)
                y[t][h] = vec_fma(vec_from_ints(dot[t][h]),
                                  vec_mul(d, vec_all(x->dx[u * (unit / QK) * TOKEN_GROUP + t])), y[t][h]);
        }
    }
    if (minima)
        for (int64_t b = 0; b < kc / QK; b++)
            for (int h = 0; h < 2; h++)
                for (int t = 0; t < mr; t++)
                    y[t][h] = vec_fma(vec_load(w->m[b] + h * LANES), vec_all(x->sums[b * TOKEN_GROUP + t]),
                                      y[t][h]);
    for (int t = 0; t < mr; t++)
        for (int h = 0; h < 2; h++) vec_store(tile + t * NR + h * LANES, y[t][h]);
}

/* The exact way: x points to the first token's number k = 0; the tokens lie IN apart. The sum of each panel
 * is added to the tile. */
static void micro_kernel_exact_scalar(int mr, float *tile, const panel *w, int64_t kc, const float *x,
                                      int64_t IN) {
    for (int t = 0; t < mr; t++)
        for (int r = 0; r < NR; r++) {
            float sum = 0;
            for (int64_t k = 0; k < kc; k++) sum = fmaf(w->floats[k][r], x[t * IN + k], sum);
            tile[t * NR + r] += sum;
        }
}

VEC_INLINE void micro_kernel_exact_vectors(const int mr, float *tile, const panel *w, int64_t kc,
                                           const float *x, int64_t IN) {
    vec sum[MR][2];
    for (int t = 0; t < mr; t++) sum[t][0] = sum[t][1] = vec_zero();
    for (int64_t k = 0; k < kc; k++) {
        const vec w0 = vec_load(w->floats[k]), w1 = vec_load(w->floats[k] + LANES);
        for (int t = 0; t < mr; t++) {
            const vec one = vec_all(x[t * IN + k]);
            sum[t][0] = vec_fma(w0, one, sum[t][0]);
            sum[t][1] = vec_fma(w1, one, sum[t][1]);
        }
    }
    for (int t = 0; t < mr; t++)
        for (int h = 0; h < 2; h++) {
            float *at = tile + t * NR + h * LANES;
            vec_store(at, vec_add(vec_load(at), sum[t][h]));
        }
}

/* Each number of tokens is a constant to its micro-kernel, so that its sums are registers. */
_Static_assert(MR == 4 || MR == 8, "EACH_MR has a case for each number of tokens up to MR");
#if MR == 8
#define EACH_MR(CASE) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#else
#define EACH_MR(CASE) CASE(1) CASE(2) CASE(3) CASE(4)
#endif
VEC_TARGET static void micro_kernel(int mr, float *tile, const panel *w, int64_t kc, int64_t unit, int minima,
                                    const gemm_activations *x) {
#define CASE(N)                                                                                              \
    case N: micro_kernel_vectors(N, tile, w, kc, unit, minima, x); break;
    switch (mr) { EACH_MR(CASE) }
#undef CASE
}
VEC_TARGET static void micro_kernel_exact(int mr, float *tile, const panel *w, int64_t kc, const float *x,
                                          int64_t IN) {
#define CASE(N)                                                                                              \
    case N: micro_kernel_exact_vectors(N, tile, w, kc, x, IN); break;
    switch (mr) { EACH_MR(CASE) }
#undef CASE
}

/* ---------------------------------------------------------------- the loop nest of the first comment */

VEC_INLINE void gemm(const int format, const int exact, const linear_args *a, int64_t begin, int64_t end) {
    const int64_t T = a->T, OUT = a->w.OUT, IN = a->w.IN;
    const int unit = unit_of(format), minima = has_minima(format);
    micro_kernel_function *const kernel = a->scalar_micro_kernel ? micro_kernel_scalar : micro_kernel;
    micro_kernel_exact_function *const kernel_exact =
        a->scalar_micro_kernel ? micro_kernel_exact_scalar : micro_kernel_exact;
    _Alignas(64) panel w;
    _Alignas(64) float tiles[MC * NR];
    for (int64_t ic = 0; ic < T; ic += MC)
        for (int64_t jr = begin; jr < end; jr += NR) {
            const int64_t mc = min(MC, T - ic), nr = min(NR, end - jr);
            memset(tiles, 0, (size_t)(mc * NR) * sizeof(float));
            for (int64_t pc = 0; pc < IN; pc += KC) {
                const int64_t kc = min(KC, IN - pc);
                pack_panel(format, exact, &w, &a->w, jr, nr, pc, kc);
                for (int64_t ir = 0; ir < mc; ir += MR) {
                    const int mr = (int)min(MR, mc - ir);
                    float *tile = tiles + ir * NR;
                    if (exact) {
                        const float *x = (const float *)a->x + (ic + ir) * IN + pc;
                        kernel_exact(mr, tile, &w, kc, x, IN);
                    } else {
                        const gemm_activations x = gemm_activations_of(a->x, T, IN, ic + ir, pc);
                        kernel(mr, tile, &w, kc, unit, minima, &x);
                    }
                }
            }
            for (int64_t t = 0; t < mc; t++)
                memcpy(a->y + (ic + t) * OUT + jr, tiles + t * NR, (size_t)nr * sizeof(float));
        }
}

/* linear for many tokens, as in prefill: GEMM, in vectors. Every weight is used T times, so the arithmetic is
 * the limit. In the letters of BLIS y is C, (T, OUT), x is A and w, transposed, is B:
 *
 *     for ic in 0, MC .. T                MC = 516 tokens: KC numbers of each are 200 KB, a part of L2
 *         for jr in begin, NR .. end      NR = 2 LANES rows of w, two registers; a thread's rows are its NC
 *             tiles = 0                   (MC, NR) float32: tiles of (MR, NR)
 *             for pc in 0, KC .. IN       KC = 256 weights of a row, a block of a K format
 *                 pack_panel              w[jr: jr + NR, pc: pc + KC], unpacked: 8 or 16 KB, a part of L1
 *                 for ir in 0, MR .. MC   MR = 6 tokens (AVX2: 4): MR x 2 registers of sums
 *                     micro_kernel        tiles[ir: ir + MR] += x[ic + ir: ic + ir + MR, pc: pc + KC] @ panel
 *             y[ic: ic + MC, jr: jr + NR] = tiles
 *
 * The micro-kernel loads two registers of the panel, and for each token four bytes of x into all lanes; then
 * it multiplies 2 MR times. With MR = 6 these are 8 loads, 4 cycles, for 12 vpdpbusd, 6 cycles. So the
 * multipliers are the limit. The tile stays in memory, in L1: its registers are needed for sums.
 *
 * Formats of whole numbers multiply bytes, all others pairs of 16-bit integers: quantized_activations.c.
 * Products are summed in int32, the weights of one scale at a time, and none overflows: 32 * 255 * 127 and 32
 * * 8191 * 8191 are below 2^31. The order of the sums is that of linear_gemv.c.
 *
 * In the exact way a panel is floats, and its micro-kernel has an FMA in place of the integer products.
 *
 * Compiled once for each instruction set: the vector forms, and the scalar micro-kernels for their test
 * (README.md). tests/kernels/test_quantized_activations.py and tests/kernels/test_kernels.py compare it with
 * NumPy. tests/kernels/test_micro_kernel.py compares the two micro-kernels with each other. */
#include "dispatch.h"
#include "formats.h"
#include "unpack.h"
#include "vec.h"

enum { MC = 43 * TOKEN_GROUP };
_Static_assert((int64_t)QK * X_MAX * X_MAX <= INT32_MAX, "a sum of pairs overflows");

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---------------------------------------------------------------- pack_panel */

/* panel (kc, NR) = w[jr: jr + nr, pc: pc + kc], transposed. Columns from nr on repeat other rows; their
 * results are not used. */
VEC_INLINE void pack_panel(const int format, const int exact, panel *to, const nl_matrix *w, int64_t jr,
                           int64_t nr, int64_t pc, int64_t kc) {
    const int64_t weights = block_weights(format), bytes = block_bytes(format),
                  row_bytes = w->IN / weights * bytes;
    for (int64_t column = 0; column < NR; column += LANES) {
        const int64_t first = column < nr ? column : 0; /* when no row is left: any row */
        if (is_packed(format)) {
            const int64_t group = (jr + first) / PACKED_ROWS * PACKED_ROWS;
            const uint8_t *p =
                (const uint8_t *)w->data + group * row_bytes + pc / weights * bytes * PACKED_ROWS;
            const int64_t lane = (jr + first) % PACKED_ROWS;
            if (!in_bytes(format) || (exact && has_table(format))) {
                unpack_packed_codes(format, exact, to, p, kc, column, lane);
                continue;
            }
            unpack_packed(format, exact, to, p, kc, column, lane);
            if (exact) dequantize_panel(format, to, kc, column);
            continue;
        }
        const uint8_t *p = (const uint8_t *)w->data + (jr + first) * row_bytes + pc / weights * bytes;
        panel_rows rows = {.to = to, .column = column};
        for (int l = 0; l < LANES; l++) rows.at[l] = min(l, nr - 1 - first) * row_bytes;
        for (int64_t k = 0; k < kc; k += weights)
            unpack_single(format, exact, &rows, k, p + k / weights * bytes);
        /* The CPU itself prefetches fewer streams than a panel has rows. The next KC weights of each row: */
        const int64_t panel_bytes = KC / weights * bytes;
        for (int l = 0; l < LANES; l++) prefetch_to_l1(p + rows.at[l] + panel_bytes, panel_bytes);
    }
}

/* ---------------------------------------------------------------- micro-kernel: tile (mr, NR) += x @ panel
 *
 * First in scalar C. The form in vectors has the same signature and adds in the same order: the same bits. */

/* Bytes: the blocks of a panel, of MR tokens of one group. Behind the last token there are zeros. */
typedef struct {
    int64_t blocks;
    const int32_t *first; /* the first bytes of the first token */
    second_bytes second;  /* the same, from the panel on */
} byte_panel;

typedef void micro_kernel_pairs_function(int mr, float *tile, const panel *w, int64_t kc,
                                         const pair_activations *x);
typedef void micro_kernel_exact_function(int mr, float *tile, const panel *w, int64_t kc, const float *x,
                                         int64_t IN);

/* Four bytes of weights, whose sign is that of the format in this instruction set, and of activations. */
INLINE int32_t dot_of_fours(const int format, int32_t w, int32_t x) {
    int32_t dot = 0;
    for (int i = 0; i < 4; i++) {
        const int w_i = SIGNED_BYTES && has_sign(format) ? (int8_t)(w >> 8 * i) : (uint8_t)(w >> 8 * i);
        dot += w_i * (int8_t)(x >> 8 * i);
    }
    return dot;
}

/* tile += block b of the panel, times a block of x. */
static void add_tile_block_scalar(int format, float *tile, const panel *w, int64_t b, const int32_t *x) {
    const int scales = QK / scale_weights(format), fours = scale_weights(format) / 4;
    for (int t = 0; t < MR; t++)
        for (int r = 0; r < NR; r++) {
            float *y = tile + t * NR + r;
            for (int i = 0; i < scales; i++) {
                int32_t dot = x_start(x, TOKEN_GROUP, i)[t];
                for (int k = i * fours; k < (i + 1) * fours; k++)
                    dot += dot_of_fours(format, w->fours[8 * b + k][r], x[k * TOKEN_GROUP + t]);
                *y = fmaf((float)dot, w->d[b * scales + i][r] * x_dx(x, TOKEN_GROUP)[t], *y);
            }
            if (has_minima(format)) *y = fmaf(w->m[b][r], x_sums(x, TOKEN_GROUP)[t], *y);
        }
}

/* sum[t][h] += the products of fours from .. from + n - 1, at most BYTE_RUN of them. */
VEC_INLINE void add_fours(const int format, ints sum[MR][2], const int32_t (*w)[NR], const int32_t *x,
                          const int from, const int n) {
    const int is_signed = SIGNED_BYTES && has_sign(format);
    ints some[MR][2];
    for (int t = 0; t < MR; t++)
        for (int h = 0; h < 2; h++) some[t][h] = byte_dots_begin(sum[t][h]);
    for (int k = from; k < from + n; k++) {
        const ints w0 = ints_load(w[k]), w1 = ints_load(w[k] + LANES);
        for (int t = 0; t < MR; t++) {
            const ints four = ints_all(x[k * TOKEN_GROUP + t]);
            some[t][0] = byte_dot_lanes(is_signed, some[t][0], w0, four);
            some[t][1] = byte_dot_lanes(is_signed, some[t][1], w1, four);
            if (n > 1) continue;
            for (int h = 0; h < 2; h++) sum[t][h] = byte_dots_end(some[t][h], sum[t][h]);
        }
    }
    for (int t = 0; t < (n > 1 ? MR : 0); t++)
        for (int h = 0; h < 2; h++) sum[t][h] = byte_dots_end(some[t][h], sum[t][h]);
}

VEC_INLINE void add_tile_block(const int format, float *tile, const panel *w, int64_t b, const int32_t *x) {
    const int scales = QK / scale_weights(format), fours = scale_weights(format) / 4;
    const int run = BYTE_RUN(largest_q(format)) < fours ? BYTE_RUN(largest_q(format)) : fours;
#pragma GCC unroll 2 /* as a loop, its sums would be copied at each turn */
    for (int i = 0; i < scales; i++) {
        ints sum[MR][2];
        for (int t = 0; t < MR; t++) sum[t][0] = sum[t][1] = ints_all(x_start(x, TOKEN_GROUP, i)[t]);
        for (int from = i * fours; from < (i + 1) * fours; from += run)
            add_fours(format, sum, w->fours + 8 * b, x, from, run);
        const int last = i + 1 == scales && has_minima(format);
        for (int h = 0; h < 2; h++) {
            const vec d = vec_load(w->d[b * scales + i] + h * LANES);
            const vec m = last ? vec_load(w->m[b] + h * LANES) : vec_zero();
            for (int t = 0; t < MR; t++) {
                float *to = tile + t * NR + h * LANES;
                vec y = vec_fma(vec_from_ints(sum[t][h]), vec_mul(d, vec_all(x_dx(x, TOKEN_GROUP)[t])),
                                vec_load(to));
                if (last) y = vec_fma(m, vec_all(x_sums(x, TOKEN_GROUP)[t]), y);
                vec_store(to, y);
            }
        }
    }
}

/* The first bytes of each block, and then its second bytes if it has them. */
static void micro_kernel_scalar(int format, float *tile, const panel *w, const byte_panel *x) {
    for (int64_t b = 0; b < x->blocks; b++) {
        const int32_t *block = x->first + b * x_block_size(TOKEN_GROUP);
        const int32_t *second = second_block(&x->second, b, TOKEN_GROUP);
        for (; block; block = second, second = NULL) add_tile_block_scalar(format, tile, w, b, block);
    }
}

VEC_INLINE void micro_kernel_vectors(const int format, float *tile, const panel *w, const byte_panel *x) {
    for (int64_t b = 0; b < x->blocks; b++) {
        const int32_t *block = x->first + b * x_block_size(TOKEN_GROUP);
        const int32_t *second = second_block(&x->second, b, TOKEN_GROUP);
        prefetch_to_l1(block + 4 * x_block_size(TOKEN_GROUP), 4 * x_block_size(TOKEN_GROUP)); /* from L2 */
        for (; block; block = second, second = NULL) {
            LOADED_FROM_HERE(w); /* gcc would load the panel and the tile before the loop, and spill them */
            LOADED_FROM_HERE(tile);
            add_tile_block(format, tile, w, b, block);
        }
    }
}

/* pairs (a0, a1) and (b0, b1) of 16-bit integers: a0 * b0 + a1 * b1 */
INLINE int32_t dot_of_pairs(int32_t a, int32_t b) { return (int16_t)a * (int16_t)b + (a >> 16) * (b >> 16); }

static void micro_kernel_pairs_scalar(int mr, float *tile, const panel *w, int64_t kc,
                                      const pair_activations *x) {
    for (int t = 0; t < mr; t++)
        for (int r = 0; r < NR; r++)
            for (int64_t b = 0; b < kc / QK; b++) {
                int32_t dot = 0;
                for (int64_t k = b * QK / 2; k < (b + 1) * QK / 2; k++)
                    dot += dot_of_pairs(w->pairs[k][r], x->pairs[k * TOKEN_GROUP + t]);
                float *y = tile + t * NR + r;
                *y = fmaf((float)dot, w->d[b][r] * x->dx[b * TOKEN_GROUP + t], *y);
            }
}

VEC_INLINE void micro_kernel_pairs_vectors(const int mr, float *tile, const panel *w, int64_t kc,
                                           const pair_activations *x) {
    for (int64_t b = 0; b * QK < kc; b++) {
        ints dot[MR][2];
        for (int t = 0; t < mr; t++) dot[t][0] = dot[t][1] = ints_zero();
        for (int64_t k = b * QK / 2; k < (b + 1) * QK / 2; k++) {
            prefetch_to_l1(x->pairs + (k + 64) * TOKEN_GROUP, 1); /* from L2 */
            const ints w0 = ints_load(w->pairs[k]), w1 = ints_load(w->pairs[k] + LANES);
            for (int t = 0; t < mr; t++) {
                const ints pair = ints_all(x->pairs[k * TOKEN_GROUP + t]);
                dot[t][0] = dot_pairs(dot[t][0], w0, pair);
                dot[t][1] = dot_pairs(dot[t][1], w1, pair);
            }
        }
        for (int h = 0; h < 2; h++) {
            const vec d = vec_load(w->d[b] + h * LANES);
            for (int t = 0; t < mr; t++) {
                float *to = tile + t * NR + h * LANES;
                vec_store(to, vec_fma(vec_from_ints(dot[t][h]),
                                      vec_mul(d, vec_all(x->dx[b * TOKEN_GROUP + t])), vec_load(to)));
            }
        }
    }
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

/* The number of tokens is a constant to these two, so that their sums are registers. */
_Static_assert(MR == 4 || MR == 6, "EACH_MR has a case for each number of tokens up to MR");
#if MR == 6
#define EACH_MR(CASE) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#else
#define EACH_MR(CASE) CASE(1) CASE(2) CASE(3) CASE(4)
#endif
VEC_TARGET static void micro_kernel_pairs(int mr, float *tile, const panel *w, int64_t kc,
                                          const pair_activations *x) {
#define CASE(N)                                                                                              \
    case N: micro_kernel_pairs_vectors(N, tile, w, kc, x); break;
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

/* The tokens from token ic + ir on, up to MR of them, times a panel. */
VEC_INLINE void add_tile(const int format, const int exact, const linear_args *a, int mr, float *tile,
                         const panel *w, int64_t token, int64_t pc, int64_t kc) {
    const int64_t T = a->T, IN = a->w.IN;
    if (exact) {
        micro_kernel_exact_function *const kernel =
            a->scalar_micro_kernel ? micro_kernel_exact_scalar : micro_kernel_exact;
        kernel(mr, tile, w, kc, (const float *)a->x + token * IN + pc, IN);
    } else if (in_bytes(format)) {
        const int64_t G = TOKEN_GROUP, groups = activation_groups(T), group = token / G, at = token % G;
        byte_panel x = {.blocks = kc / QK};
        x.first = first_bytes_of(a->x, G, groups, IN, group, pc) + at;
        x.second = second_bytes_of(a->x, G, groups, IN, group);
        x.second.place += pc / QK, x.second.blocks += at;
        if (a->scalar_micro_kernel)
            micro_kernel_scalar(format, tile, w, &x);
        else
            micro_kernel_vectors(format, tile, w, &x);
    } else {
        const pair_activations x = pair_activations_of(a->x, T, IN, token, pc);
        micro_kernel_pairs_function *const kernel =
            a->scalar_micro_kernel ? micro_kernel_pairs_scalar : micro_kernel_pairs;
        kernel(mr, tile, w, kc, &x);
    }
}

VEC_INLINE void gemm(const int format, const int exact, const linear_args *a, int64_t begin, int64_t end) {
    const int64_t T = a->T, OUT = a->w.OUT, IN = a->w.IN;
    _Alignas(64) panel w;
    _Alignas(64) float tiles[MC * NR];
    for (int64_t ic = 0; ic < T; ic += MC)
        for (int64_t jr = begin; jr < end; jr += NR) {
            const int64_t mc = min(MC, T - ic), nr = min(NR, end - jr);
            memset(tiles, 0, (size_t)(mc * NR) * sizeof(float));
            for (int64_t pc = 0; pc < IN; pc += KC) {
                const int64_t kc = min(KC, IN - pc);
                pack_panel(format, exact, &w, &a->w, jr, nr, pc, kc);
                for (int64_t ir = 0; ir < mc; ir += MR)
                    add_tile(format, exact, a, (int)min(MR, mc - ir), tiles + ir * NR, &w, ic + ir, pc, kc);
            }
            for (int64_t t = 0; t < mc; t++)
                memcpy(a->y + (ic + t) * OUT + jr, tiles + t * NR, (size_t)nr * sizeof(float));
        }
}

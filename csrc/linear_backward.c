/* linear for training, y = x @ w.T, and its gradients: three products c (M, N) = a (M, K) @ b (K, N).
 *
 *                       c                 a                 b                M      N     K
 *     nl_linear_y       y (T, OUT)    =   x (T, IN)         w.T (IN, OUT)    T      OUT   IN
 *     nl_linear_dx      dx (T, IN)    =   dy (T, OUT)       w (OUT, IN)      T      IN    OUT
 *     nl_linear_dw      dw (OUT, IN)  =   dy.T (OUT, T)     x (T, IN)        OUT    IN    T
 *
 * w has any format, and its weights are those of the exact way (linear.c): y has the bits of nl_linear_exact.
 * In the letters of BLIS:
 *
 *     for each PART of c                            PART = 1032 rows
 *         for ps in 0, KS .. K                      KS = 768
 *             pack_a                                a[:, ps: ps + KS] in tiles (KS, TILE_ROWS)
 *             barrier
 *             for jc in columns, NC                 NC = 256: the next ones for a thread that has time
 *                 pack_b                            b[ps: ps + KS, jc: jc + NC] in panels (KC, NR), 768 KB
 *                 for ic in 0, MC .. PART           MC = 120: KS numbers of each are 360 KB, a part of L2
 *                     for jr in jc, NR .. jc + NC   (MC, NR) numbers of c are 15 KB
 *                         for pc in ps, KC .. KS    KC = 256: a panel is 16 or 32 KB, in L1
 *                             for ir in ic, TILE_ROWS .. MC
 *                                 micro_kernel      c[ir: ir + TILE_ROWS, jr: jr + NR] += tile @ panel
 *             barrier
 *
 * Threads share the packing of a. Each packs columns of b just before it multiplies them: packed b stays in
 * its caches. Where columns are few, threads share the rows of PART too. A number of c is summed by one
 * thread: k ascending in each KC, from 0; then the KC ascending, from 0 or from dw. The scalar form makes one
 * long sum. So neither threads nor cuts of c change a bit.
 *
 * Compiled once as it stands: the loop over threads and the scalar form. Compiled once more for each
 * instruction set: the part under VECTOR_FORMS (README.md). tests/kernels/test_linear_backward.py compares
 * every form with NumPy. */
#include <stdlib.h>

#include "dispatch.h"
#include "formats.h"
#include "memory.h"
#include "vec.h"

/* What is packed at once: PART rows and KS columns of a, KS rows and NC columns of b. More would leave the
 * caches; fewer would be more barriers, and passes over c. PANELS is room for the latter in any form. */
enum { PART = 86 * ROW_GROUP, KS = 768, NC = 256, PANELS = 2 * KS * NC * (int)sizeof(float) };
_Static_assert(KS % KC == 0 && NC % QK_K == 0 && NC % NL_PANEL_ROWS == 0, "whole KC, blocks and panels");

#ifndef VECTOR_FORMS
#ifdef _OPENMP
#include <omp.h>
#endif

/* Columns of c that are packed together: whole blocks of b. */
static int64_t column_unit(const float_product *p) {
    const int64_t block = p->transpose_b ? 1 : block_weights(p->b.format);
    return block > NL_PANEL_ROWS ? block : NL_PANEL_ROWS;
}

/* How many threads side by side, each with n / across below it, have the smallest largest part of c. */
static int64_t threads_across(const float_product *p, int64_t n) {
    int64_t best = 1, least = INT64_MAX;
    for (int64_t across = 1; across <= n; across++) {
        const range rows = range_of(p->M, ROW_GROUP, 0, n / across),
                    columns = range_of(p->N, column_unit(p), 0, across);
        const int64_t part = (rows.end - rows.begin) * (columns.end - columns.begin);
        if (part < least) best = across, least = part;
    }
    return best;
}

typedef struct {
    range rows, columns;
} tile;

/* The next tile of c for a thread that has time, of up to NC columns: 0 if all are taken. The first tiles are
 * large and the last ones small, so a slow core delays the others little. */
static int take(tile *next, int64_t *taken, const float_product *p, int64_t down, int64_t threads) {
    const int64_t unit = column_unit(p), all = down * p->N;
    int64_t begin;
#pragma omp critical
    {
        begin = *taken;
        const range some = range_of(all - begin, unit, 0, threads);
        const int64_t size = some.end < NC ? some.end : NC, column = begin % p->N;
        next->columns = (range){column, p->N - column < size ? p->N : column + size};
        *taken = begin + next->columns.end - column;
    }
    if (begin < all) next->rows = range_of(p->M, ROW_GROUP, begin / p->N, down);
    return begin < all;
}

static int multiply(const float_product *p, int threads) {
    const kernels *kernel = chosen_kernels();
    if (!is_known(p->b.format)) return NL_UNKNOWN_FORMAT;
    if (!p->M || !p->N) return 0;
    const int64_t parts = (p->M + PART - 1) / PART; /* as equal as can be */
    const int64_t a_floats = (range_of(p->M, ROW_GROUP, 0, parts).end + ROW_GROUP) * KS;
    uint8_t *memory = allocate_aligned(a_floats * 4 + (int64_t)threads * PANELS);
    if (!memory) return NL_NO_MEMORY;
    float *packed_a = (float *)memory;
    int64_t taken = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t i = 0, n = 1;
#ifdef _OPENMP
        i = omp_get_thread_num(), n = omp_get_num_threads();
#endif
        void *panels = memory + a_floats * 4 + i * PANELS;
        for (int64_t ic = 0; ic < parts; ic++) {
            const range here = range_of(p->M, ROW_GROUP, ic, parts);
            float_product part = *p;
            part.c += here.begin * p->c_row, part.a += here.begin * p->a_row, part.M = here.end - here.begin;
            const int64_t down = n / threads_across(&part, n);
            for (int64_t ps = p->k_begin; ps < p->K; ps += KS) {
                kernel->pack_a(&part, packed_a, ps, range_of(part.M, ROW_GROUP, i, n));
#pragma omp single
                taken = 0; /* with a barrier at its end */
                for (tile tile; take(&tile, &taken, &part, down, n);) {
                    kernel->pack_b(&part, panels, ps, tile.columns);
                    kernel->multiply(&part, packed_a, panels, ps, tile.rows, tile.columns);
                }
#pragma omp barrier
            }
        }
    }
    free_aligned(memory);
    return 0;
}

int nl_linear_y(float *y, const float *x, int64_t T, const nl_matrix *w, int64_t begin, int64_t end,
                int threads) {
    const float_product p = {.c = y + begin,
                             .c_row = w->OUT,
                             .a = x,
                             .a_row = w->IN,
                             .a_column = 1,
                             .b = *w,
                             .transpose_b = 1,
                             .b_begin = begin,
                             .M = T,
                             .N = end - begin,
                             .K = w->IN};
    return multiply(&p, threads);
}

int nl_linear_dx(float *dx, const float *dy, int64_t T, const nl_matrix *w, int64_t N, int64_t begin,
                 int64_t end, int threads) {
    const float_product p = {.c = dx,
                             .c_row = N,
                             .a = dy,
                             .a_row = w->OUT,
                             .a_column = 1,
                             .b = *w,
                             .M = T,
                             .N = N,
                             .K = end,
                             .k_begin = begin};
    return multiply(&p, threads);
}

int nl_linear_dw(float *dw, const float *dy, const float *x, int64_t T, int64_t OUT, int64_t IN,
                 int64_t begin, int64_t end, int add, int threads) {
    const float_product p = {.c = dw + begin * IN,
                             .c_row = IN,
                             .add = add,
                             .a = dy + begin,
                             .a_row = 1,
                             .a_column = OUT,
                             .b = {x, F32, T, IN},
                             .M = end - begin,
                             .N = IN,
                             .K = T};
    return multiply(&p, threads);
}

/* ---------------------------------------------------------------- scalar: the definition in C */

/* b as floats (ks, NC). a is multiplied in place. */
void pack_a_scalar(const float_product *p, float *to, int64_t ps, range rows) {
    (void)p, (void)to, (void)ps, (void)rows;
}

INLINE void pack_b_by_format(const int format, const float_product *p, float *to, int64_t ps, range columns) {
    uint8_t room[QK_K];
    for (int64_t k = ps; k < ps + KS && k < p->K; k++)
        for (int64_t j = columns.begin; j < columns.end; j++) {
            const int64_t row = p->transpose_b ? p->b_begin + j : k, i = p->transpose_b ? k : p->b_begin + j;
            const int64_t in_block = i % block_weights(format);
            const uint8_t *block = block_of(format, room, &p->b, row, i - in_block);
            to[(k - ps) * NC + j - columns.begin] =
                weight(format, block, (int)in_block / 16, (int)in_block % 16);
        }
}

void pack_b_scalar(const float_product *p, void *to, int64_t ps, range columns) {
    switch (p->b.format) {
#define CASE(FORMAT, ...)                                                                                    \
    case FORMAT: pack_b_by_format(FORMAT, p, to, ps, columns); break;
        EACH_FORMAT(CASE)
#undef CASE
    }
}

void multiply_scalar(const float_product *p, const float *packed_a, const void *panels, int64_t ps,
                     range rows, range columns) {
    const float *b = panels;
    (void)packed_a;
    for (int64_t i = rows.begin; i < rows.end; i++) {
        float *c = p->c + i * p->c_row;
        for (int64_t j = columns.begin; j < (p->add || ps > 0 ? 0 : columns.end); j++) c[j] = 0;
        for (int64_t k = 0; k < KS && ps + k < p->K; k++) {
            const float a = p->a[i * p->a_row + (ps + k) * p->a_column];
            for (int64_t j = columns.begin; j < columns.end; j++) c[j] += a * b[k * NC + j - columns.begin];
        }
    }
}

#else
/* ---------------------------------------------------------------- vectors
 *
 * The micro-kernel loads two registers of the panel, and for each row four bytes of the tile into all lanes.
 * Then it multiplies 2 TILE_ROWS times. With AVX-512 these are 14 loads, 7 cycles, for 24 FMAs, 12 cycles. So
 * the FMA units are the limit. Sums take 24 of 32 registers, with AVX2 12 of 16; operands take 3.
 *
 * A number of a is packed once for N products, one of b once for M, and c is read and written
 * once for KC, and once for KS in memory. */

enum { ROWS_IN_L2 = 120, TILES = 8 };

_Static_assert(ROW_GROUP % TILE_ROWS == 0 && ROWS_IN_L2 % TILE_ROWS == 0, "threads and MC have whole tiles");
_Static_assert(NL_PANEL_ROWS % NR == 0 && KC % NR == 0, "threads have whole panels");
_Static_assert(TILE_ROWS <= LANES, "a row of a tile fits a register");
_Static_assert(KS / KC * (NC / NR) * sizeof(panel) <= PANELS, "room for the panels of NC columns");

/* The tiles of some rows, with zeros behind the last row. Rows of a that lie dense are transposed. Columns
 * are copied for TILES tiles at a time, whole cache lines. A register has up to LANES - TILE_ROWS numbers
 * more than a row of a tile; the next row is stored over them. */
VEC_TARGET void VEC(pack_a)(const float_product *p, float *to, int64_t ps, range rows) {
    const int64_t kc = min(KS, p->K - ps);
    for (int64_t ic = rows.begin; ic < rows.end; ic += TILES * TILE_ROWS) {
        const int64_t end = min(ic + TILES * TILE_ROWS, rows.end);
        int64_t done = 0;
        for (int64_t k = 0; p->a_row == 1 && end + LANES <= p->M && k + 1 < kc; k++, done++)
            for (int64_t i = ic; i < end; i += TILE_ROWS)
                vec_store(to + i * KS + k * TILE_ROWS, vec_load(p->a + i + (ps + k) * p->a_column));
        for (int64_t i = ic; i < end; i += TILE_ROWS) {
            const int64_t mr = min(TILE_ROWS, rows.end - i);
            const float *a = p->a + i * p->a_row + ps * p->a_column;
            float *tile = to + i * KS;
            int64_t k = done;
            for (; p->a_column == 1 && k + LANES < kc; k += LANES) {
                vec x[LANES];
                for (int r = 0; r < LANES; r++) x[r] = r < mr ? vec_load(a + r * p->a_row + k) : vec_zero();
                vec_transpose(x);
                for (int r = 0; r < LANES; r++) vec_store(tile + (k + r) * TILE_ROWS, x[r]);
            }
            for (; k < kc; k++)
                for (int64_t r = 0; r < TILE_ROWS; r++)
                    tile[k * TILE_ROWS + r] = r < mr ? a[r * p->a_row + k * p->a_column] : 0;
        }
    }
}

VEC_INLINE vec load_single(const int format, const uint8_t *p, int64_t i) {
    switch (format) {
    case F16: return vec_from_f16(p + 2 * i);
    case BF16: return vec_from_bf16(p + 2 * i);
    }
    return vec_load(p + 4 * i);
}

/* Single numbers, with zeros behind the last column. */
VEC_INLINE void pack_singles(const int format, const float_product *p, panel *to, int64_t pc, range columns) {
    const int64_t bytes = format_of(format).bytes, kc = min(KC, p->K - pc);
    const int64_t n = columns.end - columns.begin, whole = n / NR * NR;
    for (int64_t k = 0; k < kc; k++) {
        const uint8_t *row =
            (const uint8_t *)p->b.data + ((pc + k) * p->b.IN + p->b_begin + columns.begin) * bytes;
        for (int64_t j = 0; j < whole; j += LANES)
            vec_store(to[j / NR].floats[k] + j % NR, load_single(format, row, j));
        for (int64_t j = whole; j < (whole < n ? whole + NR : 0); j++)
            to[j / NR].floats[k][j % NR] = j < n ? weight(format, row + j * bytes, 0, 0) : 0;
    }
}

/* Packed rows: NR of them are unpacked as columns of a panel of linear_gemm.c, and transposed. */
VEC_INLINE void pack_blocks(const int format, const float_product *p, panel *to, int64_t pc, range columns) {
    const int64_t kc = min(KC, p->K - pc), n = columns.end - columns.begin;
    _Alignas(64) panel w;
    for (int64_t k = 0; k < kc; k += NR) {
        pack_panel(format, 1, &w, &p->b, pc + k, min(NR, kc - k), p->b_begin + columns.begin, n);
        for (int64_t i = 0; i < n; i += LANES)
            for (int h = 0; h < NR; h += LANES) {
                vec x[LANES];
                for (int l = 0; l < LANES; l++) x[l] = vec_load(w.floats[i + l] + h);
                vec_transpose(x);
                for (int l = 0; l < LANES; l++) vec_store(to[i / NR].floats[k + h + l] + i % NR, x[l]);
            }
    }
}

/* b = w.T: panels of linear_gemm.c. */
VEC_INLINE void pack_transposed(const int format, const float_product *p, panel *to, int64_t pc,
                                range columns) {
    for (int64_t j = columns.begin; j < columns.end; j += NR, to++)
        pack_panel(format, 1, to, &p->b, p->b_begin + j, min(NR, columns.end - j), pc, min(KC, p->K - pc));
}

/* KC rows and NC columns. */
VEC_TARGET static void pack_panels(const float_product *p, panel *to, int64_t pc, range columns) {
    switch (p->b.format) {
#define CASE(FORMAT, ...)                                                                                    \
    case FORMAT:                                                                                             \
        if (p->transpose_b)                                                                                  \
            pack_transposed(FORMAT, p, to, pc, columns);                                                     \
        else if (is_single(FORMAT))                                                                          \
            pack_singles(FORMAT, p, to, pc, columns);                                                        \
        else                                                                                                 \
            pack_blocks(FORMAT, p, to, pc, columns);                                                         \
        break;
        EACH_FORMAT(CASE)
#undef CASE
    }
}

VEC_TARGET void VEC(pack_b)(const float_product *p, void *to, int64_t ps, range columns) {
    panel *panels = to;
    for (int64_t pc = ps; pc < min(ps + KS, p->K); pc += KC, panels += NC / NR)
        pack_panels(p, panels, pc, columns);
}

/* c (TILE_ROWS, NR) = a (TILE_ROWS, kc) @ b (kc, NR), or += */
VEC_INLINE void float_micro_kernel(float *c, int64_t c_row, int add, const float *a, const float *b,
                                   int64_t kc) {
    vec sum[TILE_ROWS][2];
    for (int r = 0; r < TILE_ROWS; r++) sum[r][0] = sum[r][1] = vec_zero();
    for (int r = 0; r < TILE_ROWS; r++) prefetch_to_l1(c + r * c_row, NR * sizeof(float));
    for (int64_t k = 0; k < kc; k++, a += TILE_ROWS, b += NR) {
        const vec left = vec_load(b), right = vec_load(b + LANES);
        for (int r = 0; r < TILE_ROWS; r++) {
            const vec one = vec_all(a[r]);
            sum[r][0] = vec_fma(one, left, sum[r][0]);
            sum[r][1] = vec_fma(one, right, sum[r][1]);
        }
    }
    for (int r = 0; r < TILE_ROWS; r++)
        for (int h = 0; h < 2; h++) {
            float *to = c + r * c_row + h * LANES;
            vec_store(to, vec_add(add ? vec_load(to) : vec_zero(), sum[r][h]));
        }
}

/* The same for the first mr rows and nr columns of c. */
VEC_TARGET static void add_tile_of_floats(float *c, int64_t c_row, int add, int64_t mr, int64_t nr,
                                          const float *a, const float *b, int64_t kc) {
    float tile[TILE_ROWS * NR];
    const int whole = mr == TILE_ROWS && nr == NR;
    float_micro_kernel(whole ? c : tile, whole ? c_row : NR, whole && add, a, b, kc);
    for (int64_t r = 0; r < (whole ? 0 : mr); r++)
        for (int64_t j = 0; j < nr; j++) c[r * c_row + j] = (add ? c[r * c_row + j] : 0) + tile[r * NR + j];
}

VEC_TARGET void VEC(multiply)(const float_product *p, const float *packed_a, const void *panels, int64_t ps,
                              range rows, range columns) {
    const int64_t n = columns.end - columns.begin, end = min(KS, p->K - ps);
    for (int64_t ic = rows.begin; ic < rows.end; ic += ROWS_IN_L2)
        for (int64_t jr = 0; jr < n; jr += NR)
            for (int64_t pc = 0; pc < end; pc += KC) {
                const panel *b = (const panel *)panels + pc / KC * (NC / NR) + jr / NR;
                for (int64_t ir = ic; ir < min(ic + ROWS_IN_L2, rows.end); ir += TILE_ROWS)
                    add_tile_of_floats(p->c + ir * p->c_row + columns.begin + jr, p->c_row,
                                       p->add || ps + pc > 0, min(TILE_ROWS, rows.end - ir), min(NR, n - jr),
                                       packed_a + ir * KS + pc * TILE_ROWS, b->floats[0], min(KC, end - pc));
            }
}
#endif

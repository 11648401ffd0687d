/* attention: softmax(q @ k.T / sqrt(Dh) + causal mask) @ v, without ever storing the (T, S) scores.
 *
 * The T queries are the last T of the S positions: query t sees positions 0 .. t + S - T.
 * H / K query heads share one key/value head (GQA): head h reads key/value head h / (H / K).
 *
 * Streaming softmax (Milakov & Gimelshein 2018; Dao et al. 2022, algorithm 1): walk the positions once and
 * keep, for each query, the largest score so far m, the sum l of exp(score - m) and the sum of
 * exp(score - m) v. When a larger score comes, what was summed is scaled by exp(old m - new m).
 *
 *     positions    0              SPAN            2 SPAN         S
 *     a query      |---------------|---------------|-------------|
 *                   m, l, sum       m, l, sum       m, l, sum       each span is walked as if it were alone,
 *                       `-- merge -------`- merge ------'           and then joins what lies before it
 *
 * So it does not matter who walks the spans, one thread or several: the sums are the same, bit for bit.
 *
 * Compiled once as it stands: the loop over threads and the scalar form. Compiled once more for each
 * instruction set: the part under VECTOR_FORMS (README.md). tests/test_attention_kernel.py holds every form
 * to NumPy, and any split of T and of the threads to the same bits. */
#include <float.h>
#include <stdlib.h>

#include "dispatch.h"
#include "formats.h"
#include "vec.h"

/* An item of work: one batch, one key/value head, and up to ITEM_ROWS of the queries that read it. Its rows
 * are the pairs (t, which of the n_rep heads), so that queries which read the same keys lie side by side. */
enum { ITEM_ROWS = 240, SPAN = 1024, BLOCK = 128, MAX_DH = 256 };

typedef struct {
    int64_t b, kv, first, rows, n_rep;
} item_rows;

INLINE int64_t items_a_head(const attention_args *a) {
    return ((a->end - a->begin) * (a->H / a->K) + ITEM_ROWS - 1) / ITEM_ROWS;
}

INLINE item_rows rows_of(const attention_args *a, int64_t item) {
    const int64_t per_head = items_a_head(a), n_rep = a->H / a->K, all = (a->end - a->begin) * n_rep;
    const int64_t first = item % per_head * ITEM_ROWS, left = all - first;
    return (item_rows){item / per_head / a->K, item / per_head % a->K, first,
                       left < ITEM_ROWS ? left : ITEM_ROWS, n_rep};
}

/* Where row i's query, and its output, begins; and how many positions it sees. */
INLINE int64_t query_at(const attention_args *a, const item_rows *it, int64_t i) {
    const int64_t t = a->begin + (it->first + i) / it->n_rep,
                  h = it->kv * it->n_rep + (it->first + i) % it->n_rep;
    return ((it->b * a->T + t) * a->H + h) * a->Dh;
}
INLINE int64_t sees(const attention_args *a, const item_rows *it, int64_t i) {
    return a->begin + (it->first + i) / it->n_rep + a->S - a->T + 1;
}

INLINE int64_t number_bytes(const int format) { return format == F16 ? 2 : 4; }
INLINE float number(const int format, const uint8_t *p, int64_t i) {
    return format == F16 ? load_f16(p + 2 * i) : load_f32(p + 4 * i);
}

INLINE const uint8_t *position(const attention_args *a, const uint8_t *base, const int64_t strides[3],
                               const item_rows *it, int64_t j) {
    return base + (it->b * strides[0] + j * strides[1] + it->kv * strides[2]) * number_bytes(a->format);
}

/* What is known of an item's rows after some positions: m, l and sum (rows, Dp). Dp is Dh in whole registers;
 * and there is room for MORE_ROWS than asked for, since tiles take four rows where there may be one. */
typedef struct {
    float *sum, *m, *l;
} knowledge;

enum { MORE_ROWS = 3 };

INLINE int64_t padded(int64_t n) { return (n + 31) / 32 * 32; }
INLINE int64_t knowledge_size(int64_t rows, int64_t Dh) {
    return (rows + MORE_ROWS) * padded(Dh) + 2 * padded(rows + MORE_ROWS);
}
INLINE knowledge knowledge_in(float *room, int64_t rows, int64_t Dh) {
    float *m = room + (rows + MORE_ROWS) * padded(Dh);
    return (knowledge){room, m, m + padded(rows + MORE_ROWS)};
}

/* What walking a span needs beside: q, scores, two numbers a row, and a panel of keys or values. */
INLINE int64_t scratch_size(int64_t rows) {
    return (rows + MORE_ROWS) * (MAX_DH + BLOCK) + 2 * padded(rows + MORE_ROWS) + 32 * MAX_DH;
}

#ifndef VECTOR_FORMS
/* The span from `begin` on joins what is known of all before. */
static void merge(const attention_args *a, const item_rows *it, float *known, float *span, int64_t begin) {
    const knowledge all = knowledge_in(known, it->rows, a->Dh), part = knowledge_in(span, it->rows, a->Dh);
    for (int64_t i = 0; i < it->rows; i++) {
        if (sees(a, it, i) <= begin) continue;
        const float m = part.m[i] > all.m[i] ? part.m[i] : all.m[i];
        const float before = expf(all.m[i] - m), here = expf(part.m[i] - m);
        float *sum = all.sum + i * padded(a->Dh), *more = part.sum + i * padded(a->Dh);
        for (int64_t d = 0; d < a->Dh; d++) sum[d] = sum[d] * before + more[d] * here;
        all.l[i] = all.l[i] * before + part.l[i] * here;
        all.m[i] = m;
    }
}

static void finish(const attention_args *a, const item_rows *it, float *known) {
    const knowledge all = knowledge_in(known, it->rows, a->Dh);
    for (int64_t i = 0; i < it->rows; i++) {
        const float *sum = all.sum + i * padded(a->Dh), share = 1 / all.l[i];
        for (int64_t d = 0; d < a->Dh; d++) a->out[query_at(a, it, i) + d] = sum[d] * share;
    }
}

static float *new_floats(int64_t n) { return aligned_alloc(128, padded(n) * sizeof(float)); }

int nl_attention(float *out, const float *q, const void *k, const void *v, int format, int64_t B, int64_t T,
                 int64_t S, int64_t H, int64_t K, int64_t Dh, const int64_t *k_strides,
                 const int64_t *v_strides, int64_t begin, int64_t end, int threads) {
    if (begin >= end) return 0;
    attention_args a = {q, k, v, out, format, B, T, S, H, K, Dh, {0}, {0}, begin, end};
    memcpy(a.k_strides, k_strides, sizeof a.k_strides);
    memcpy(a.v_strides, v_strides, sizeof a.v_strides);
    const kernels *kernel = chosen_kernels();
    const int64_t items = B * K * items_a_head(&a), spans = (S + SPAN - 1) / SPAN;
    const int64_t rows = rows_of(&a, 0).rows, size = knowledge_size(rows, Dh);
    /* One item a head, as in decoding, would be few for many threads: then each span is an item. */
    const int64_t parts = items == B * K ? spans : 1;
    float *known = new_floats(parts > 1 ? items * parts * size : 1);
    int out_of_memory = known ? 0 : -1;
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *room = new_floats(2 * size + scratch_size(rows));
        if (!room) {
#pragma omp atomic write
            out_of_memory = -1;
        }
        /* Later queries see more positions, so equal shares would not be equal work. */
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < items * parts; i++) {
            if (!room || !known) continue;
            const item_rows it = rows_of(&a, i / parts);
            float *all = parts > 1 ? known + i * size : room, *part = room + size, *scratch = part + size;
            kernel->attention(&a, i / parts, i % parts * SPAN, all, scratch);
            if (parts > 1) continue;
            for (int64_t from = SPAN; from < sees(&a, &it, it.rows - 1); from += SPAN) {
                kernel->attention(&a, i, from, part, scratch);
                merge(&a, &it, all, part, from);
            }
            finish(&a, &it, all);
        }
#pragma omp for
        for (int64_t i = 0; i < (parts > 1 && !out_of_memory ? items : 0); i++) {
            const item_rows it = rows_of(&a, i);
            float *all = known + i * parts * size;
            for (int64_t p = 1; p < parts; p++) merge(&a, &it, all, all + p * size, p * SPAN);
            finish(&a, &it, all);
        }
        free(room);
    }
    free(known);
    return out_of_memory;
}

void nl_exp(float *y, const float *x, int64_t n) { chosen_kernels()->exp(y, x, n); }

/* ---------------------------------------------------------------- scalar: the definition in C */

void attention_scalar(const attention_args *a, int64_t item, int64_t begin, float *known, float *scratch) {
    const item_rows it = rows_of(a, item);
    const knowledge to = knowledge_in(known, it.rows, a->Dh);
    const float scale = 1 / sqrtf((float)a->Dh);
    (void)scratch;
    for (int64_t i = 0; i < it.rows; i++) {
        const float *q = a->q + query_at(a, &it, i);
        float *sum = to.sum + i * padded(a->Dh), m = -FLT_MAX, l = 0; /* not -INFINITY: -inf - -inf is NaN */
        for (int64_t d = 0; d < a->Dh; d++) sum[d] = 0;
        for (int64_t j = begin; j < begin + SPAN && j < sees(a, &it, i); j++) {
            const uint8_t *k = position(a, a->k, a->k_strides, &it, j);
            const uint8_t *v = position(a, a->v, a->v_strides, &it, j);
            float score = 0;
            for (int64_t d = 0; d < a->Dh; d++) score += q[d] * number(a->format, k, d);
            score *= scale;
            const float new_m = score > m ? score : m;
            const float old = expf(m - new_m), p = expf(score - new_m);
            for (int64_t d = 0; d < a->Dh; d++) sum[d] = sum[d] * old + p * number(a->format, v, d);
            l = l * old + p;
            m = new_m;
        }
        to.m[i] = m, to.l[i] = l;
    }
}

void exp_scalar(float *y, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] = x[i] < -87.0f ? 0 : expf(x[i]);
}

#else
/* ---------------------------------------------------------------- vectors
 *
 * The same walk, BLOCK positions at a time. Both products are one and the same loop, `product`: rows of
 * numbers, each put into all lanes, times a panel two registers wide.
 *
 *     scores   s[row][position]  =  sum over d of         q[row][d]         *  k[d][position]     (turned)
 *     values   sum[row][d]      +=  sum over positions of p[row][position]  *  v[position][d]
 *
 * With TILE_ROWS rows all sums stay in registers, and a step needs 2 loads and a broadcast a row for two FMA
 * a row: the FMA units are the limit. Nothing is summed across lanes but the 128 of the softmax.
 *
 * Keys and values are turned and widened once for all rows of an item. For a few tokens, as in decoding, the
 * limit is the memory, and keys and values in float16 are used where they lie: while the keys are worked on,
 * the values are asked for, line by line, and the other way round.
 *
 * Every sum adds in the order of the positions, whichever rows stand beside it, and every score in the order
 * of d, but for those few tokens: splitting T into pieces of more than NL_GEMV_TOKENS never changes a bit,
 * nor does it in float32. Positions that a query may not see get the score -inf, and their values are not
 * even read for it, for 0 * NaN would be NaN. */

enum { WIDE = 2 * LANES, FEW_BLOCK = 64 };

/* e^x = 2^n p, for |x| up to some hundred: n whole, r = x - n ln2, |r| <= ln2 / 2; p = exp(r) = 1 + r + r^2
 * q(r), where q was fitted by least squares at Chebyshev nodes, reweighted until its error was level. */
VEC_INLINE vec exp_parts(vec x, vec *n) {
    *n = vec_round(vec_mul(x, vec_all(1.44269504f)));
    vec r = vec_fma(*n, vec_all(-0.693145752f), x); /* ln2 in two parts; n times this one is exact */
    r = vec_fma(*n, vec_all(-1.4286068e-6f), r);
    vec q = vec_all(0.0013814596f);
    q = vec_fma(q, r, vec_all(0.0083687175f));
    q = vec_fma(q, r, vec_all(0.04166839f));
    q = vec_fma(q, r, vec_all(0.16666521f));
    q = vec_fma(q, r, vec_all(0.49999994f));
    return vec_add(vec_fma(vec_mul(r, r), q, r), vec_all(1.0f));
}

/* exp(x) for x <= 0, and for x up to 88; exactly 0 below -87, exactly 1 at 0, NaN for NaN. The largest error,
 * all floats tried (tests/instruments/exhaustive.py), is 1.01 units in the last place. */
VEC_INLINE vec vec_exp(vec x) {
    const vec lowest = vec_all(-87.0f);
    vec n;
    const vec p = exp_parts(vec_max(lowest, x), &n);
    return vec_zero_below(x, lowest, vec_times_2_to(n, p));
}

VEC_INLINE vec load_vec(const int format, const uint8_t *p) {
    return format == F16 ? vec_from_f16(p) : vec_load(p);
}

/* The memory that `ask_for` names is on its way while something else is computed; nothing waits for it. */
VEC_INLINE void ask_for(const uint8_t *p, int64_t nbytes) {
    for (int64_t i = 0; i < nbytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

/* c[r] = old[r] * c[r] + sum over i < n of x[r][i] * panel[i], WIDE numbers each. Without `old`, c begins at
 * 0. `ahead`: as many bytes as the panel has are asked for from there. */
VEC_INLINE void product(const int rows, float *c, int64_t c_stride, const float *old, const float *x,
                        const int64_t x_stride, const int format, const uint8_t *panel, int64_t stride,
                        int64_t n, const uint8_t *ahead) {
    const int64_t half = LANES * number_bytes(format);
    vec sum[TILE_ROWS][2];
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < 2; w++)
            sum[r][w] = old ? vec_mul(vec_all(old[r]), vec_load(c + r * c_stride + w * LANES)) : vec_zero();
    for (int64_t i = 0; i < n; i++, x++, panel += stride) {
        const vec left = load_vec(format, panel), right = load_vec(format, panel + half);
        if (ahead) ask_for(ahead + i * 2 * half, 2 * half);
        for (int r = 0; r < rows; r++) {
            const vec a = vec_all(x[r * x_stride]);
            sum[r][0] = vec_fma(a, left, sum[r][0]);
            sum[r][1] = vec_fma(a, right, sum[r][1]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < 2; w++) vec_store(c + r * c_stride + w * LANES, sum[r][w]);
}

/* A block of n positions from j on, for all rows of an item. Strides: q MAX_DH, s BLOCK, sums padded(Dh). */
typedef struct {
    const attention_args *a;
    item_rows it;
    int64_t j, n;
    float *q, *s, *old, *added, *panel;
    knowledge known;
} block;

/* How many of the block's positions row i sees. Rows behind the last see what it sees. */
VEC_INLINE int64_t seen(const block *b, int64_t i) {
    const int64_t left = sees(b->a, &b->it, i < b->it.rows ? i : b->it.rows - 1) - b->j;
    return left < 0 ? 0 : left < b->n ? left : b->n;
}

/* Where n keys lie; behind the block's last there are zeros. */
VEC_INLINE void keys_at(const uint8_t *k[], int n, const block *b, int64_t from) {
    static const uint8_t zeros[4 * MAX_DH];
    for (int i = 0; i < n; i++)
        k[i] = from + i < b->n ? position(b->a, b->a->k, b->a->k_strides, &b->it, b->j + from + i) : zeros;
}

/* x[i] = number d + i of LANES keys, each in a lane of its own. */
VEC_INLINE void turned(vec x[LANES], const int format, const uint8_t *const k[LANES], int64_t d, int64_t Dh) {
    if (d + LANES <= Dh) {
        for (int i = 0; i < LANES; i++) x[i] = load_vec(format, k[i] + d * number_bytes(format));
        vec_transpose(x);
        return;
    }
    float rest[LANES][LANES] = {{0}};
    for (int i = 0; i < LANES; i++)
        for (int64_t e = d; e < Dh; e++) rest[e - d][i] = number(format, k[i], e);
    for (int i = 0; i < LANES; i++) x[i] = vec_load(rest[i]);
}

/* The block's scores of four rows from r on, keys as they lie: what four rows have of a key is in four
 * registers, and is summed across lanes. */
VEC_INLINE void few_scores(const block *b, int64_t r) {
    enum { KEYS = LANES / 4 }; /* sixteen sums, or eight */
    const int64_t Dh = b->a->Dh, nbytes = number_bytes(F16);
    const uint8_t *v = position(b->a, b->a->v, b->a->v_strides, &b->it, b->j), *k[KEYS];
    for (int64_t from = 0; from < b->n; from += KEYS) {
        vec sum[KEYS][4];
        for (int i = 0; i < KEYS; i++)
            for (int row = 0; row < 4; row++) sum[i][row] = vec_zero();
        keys_at(k, KEYS, b, from);
        for (int64_t d = 0; d < Dh; d += LANES) {
            vec x[KEYS];
            for (int i = 0; i < KEYS; i++) x[i] = load_vec(F16, k[i] + d * nbytes);
            ask_for(v + (from * Dh + d * KEYS) * nbytes, KEYS * LANES * nbytes);
            for (int row = 0; row < 4; row++) {
                const vec q = vec_load(b->q + (r + row) * MAX_DH + d);
                for (int i = 0; i < KEYS; i++) sum[i][row] = vec_fma(q, x[i], sum[i][row]);
            }
        }
        for (int i = 0; i < KEYS; i++) {
            float four[4];
            vec_store_sums(four, sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
            for (int row = 0; row < 4; row++) b->s[(r + row) * BLOCK + from + i] = four[row];
        }
    }
}

/* The panel of WIDE turned keys: [d][position]. */
VEC_INLINE void turn_keys(const int format, const block *b, int64_t from) {
    const uint8_t *k[LANES];
    vec x[LANES];
    for (int64_t side = 0; side < WIDE; side += LANES) {
        keys_at(k, LANES, b, from + side);
        for (int64_t d = 0; d < b->a->Dh; d += LANES) {
            turned(x, format, k, d, b->a->Dh);
            for (int i = 0; i < LANES; i++) vec_store(b->panel + (d + i) * WIDE + side, x[i]);
        }
    }
}

/* The panel of numbers d .. d + WIDE of the block's values: [position][d]. Behind Dh zeros. */
VEC_INLINE void widen_values(const int format, const block *b, int64_t d) {
    for (int64_t i = 0; i < b->n; i++) {
        const uint8_t *v = position(b->a, b->a->v, b->a->v_strides, &b->it, b->j + i);
        float *to = b->panel + i * WIDE;
        if (d + WIDE <= b->a->Dh)
            for (int w = 0; w < WIDE; w += LANES)
                vec_store(to + w, load_vec(format, v + (d + w) * number_bytes(format)));
        else
            for (int w = 0; w < WIDE; w++) to[w] = d + w < b->a->Dh ? number(format, v, d + w) : 0;
    }
}

/* From scores to exp(score - m); m and l go on, and `old` is what the sums so far are to be scaled by. */
VEC_INLINE void softmax(const block *b) {
    for (int64_t r = 0; r < b->it.rows; r++) {
        float *s = b->s + r * BLOCK;
        const int64_t n = seen(b, r), whole = (n + LANES - 1) / LANES * LANES;
        for (int64_t i = n; i < whole; i++) s[i] = -INFINITY;
        vec largest = vec_all(b->known.m[r]), added = vec_zero();
        for (int64_t i = 0; i < whole; i += LANES) largest = vec_max(largest, vec_load(s + i));
        const float m = vec_largest(largest);
        for (int64_t i = 0; i < whole; i += LANES) {
            const vec p = vec_exp(vec_sub(vec_load(s + i), vec_all(m)));
            vec_store(s + i, p);
            added = vec_add(added, p);
        }
        b->old[r] = b->known.m[r] - m;
        b->added[r] = vec_sum(added);
        b->known.m[r] = m;
    }
    for (int64_t r = 0; r < b->it.rows; r += LANES) {
        const vec old = vec_exp(vec_load(b->old + r));
        vec_store(b->old + r, old);
        vec_store(b->known.l + r, vec_fma(vec_load(b->known.l + r), old, vec_load(b->added + r)));
    }
}

VEC_INLINE void scores(const int rows, const block *b, int64_t r, int64_t from) {
    if (from < seen(b, r + rows - 1))
        product(rows, b->s + r * BLOCK + from, BLOCK, NULL, b->q + r * MAX_DH, MAX_DH, F32,
                (const uint8_t *)b->panel, WIDE * sizeof(float), b->a->Dh, NULL);
}

VEC_INLINE void values(const int rows, const block *b, int64_t r, int64_t d, const int format,
                       const uint8_t *v, int64_t stride, const uint8_t *ahead) {
    const int64_t Dp = padded(b->a->Dh), all_see = seen(b, r);
    const float *p = b->s + r * BLOCK, as_it_is = 1;
    float *sum = b->known.sum + r * Dp + d;
    product(rows, sum, Dp, b->old + r, p, BLOCK, format, v, stride, all_see, ahead);
    if (seen(b, r + rows - 1) == all_see) return;
    for (int i = 0; i < rows; i++) /* the diagonal: what only some may see */
        product(1, sum + i * Dp, Dp, &as_it_is, p + i * BLOCK + all_see, BLOCK, format, v + all_see * stride,
                stride, seen(b, r + i) - all_see, NULL);
}

VEC_INLINE void few_rows(const block *b) {
    const attention_args *a = b->a;
    const int64_t nbytes = number_bytes(F16);
    const uint8_t *v = position(a, a->v, a->v_strides, &b->it, b->j);
    const uint8_t *next = position(a, a->k, a->k_strides, &b->it, b->j + FEW_BLOCK);
    for (int64_t r = 0; r < b->it.rows; r += 4) few_scores(b, r);
    softmax(b);
    for (int64_t d = 0; d < a->Dh; d += WIDE)
        for (int64_t r = 0; r < b->it.rows; r += 4)
            values(4, b, r, d, F16, v + d * nbytes, a->v_strides[1] * nbytes, next + d * FEW_BLOCK * nbytes);
}

VEC_INLINE void many_rows(const int format, const block *b) {
    const uint8_t *panel = (const uint8_t *)b->panel;
    const int64_t rows = b->it.rows, in_tiles = rows / TILE_ROWS * TILE_ROWS;
    for (int64_t from = 0; from < b->n; from += WIDE) {
        turn_keys(format, b, from);
        for (int64_t r = 0; r < in_tiles; r += TILE_ROWS) scores(TILE_ROWS, b, r, from);
        for (int64_t r = in_tiles; r < rows; r += 4) scores(4, b, r, from);
    }
    softmax(b);
    for (int64_t d = 0; d < b->a->Dh; d += WIDE) {
        widen_values(format, b, d);
        for (int64_t r = 0; r < in_tiles; r += TILE_ROWS)
            values(TILE_ROWS, b, r, d, F32, panel, WIDE * sizeof(float), NULL);
        for (int64_t r = in_tiles; r < rows; r += 4)
            values(4, b, r, d, F32, panel, WIDE * sizeof(float), NULL);
    }
}

VEC_TARGET void VEC(attention)(const attention_args *a, int64_t item, int64_t begin, float *known,
                               float *scratch) {
    block b = {a, rows_of(a, item), begin, 0, scratch, NULL, NULL, NULL, NULL, {0}};
    const int64_t rows = b.it.rows + MORE_ROWS, any_sees = sees(a, &b.it, b.it.rows - 1);
    const int64_t end = any_sees < begin + SPAN ? any_sees : begin + SPAN;
    const float scale = 1 / sqrtf((float)a->Dh);
    b.known = knowledge_in(known, b.it.rows, a->Dh);
    b.s = b.q + rows * MAX_DH;
    b.old = b.s + rows * BLOCK, b.added = b.old + padded(rows), b.panel = b.added + padded(rows);
    memset(known, 0, knowledge_size(b.it.rows, a->Dh) * sizeof(float));
    memset(scratch, 0, (b.panel - scratch) * sizeof(float));
    for (int64_t i = 0; i < rows; i++) b.known.m[i] = -FLT_MAX;
    for (int64_t i = 0; i < b.it.rows; i++) {
        const float *q = a->q + query_at(a, &b.it, i);
        for (int64_t d = 0; d < a->Dh; d++) b.q[i * MAX_DH + d] = q[d] * scale;
    }
    const int few = a->format == F16 && a->T <= NL_GEMV_TOKENS && a->Dh % WIDE == 0;
    const int64_t step = few ? FEW_BLOCK : BLOCK;
    for (; b.j < end; b.j += step) {
        b.n = end - b.j < step ? end - b.j : step;
        if (few)
            few_rows(&b);
        else if (a->format == F16)
            many_rows(F16, &b);
        else
            many_rows(F32, &b);
    }
}

VEC_TARGET void VEC(exp)(float *y, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        float some[LANES] = {0};
        const size_t bytes = (n - i < LANES ? n - i : LANES) * sizeof(float);
        memcpy(some, x + i, bytes);
        vec_store(some, vec_exp(vec_load(some)));
        memcpy(y + i, some, bytes);
    }
}
#endif

/* The gradient of attention (Dao 2023, algorithm 2): no (T, T) array is stored, the weights p are computed
 * again from lse = m + log(l), which the forward pass has kept. All T positions are one sequence: S = T.
 *
 *     p  = exp(q @ k.T / sqrt(Dh) - lse)     where t sees j, else 0
 *     dp = dout @ v.T
 *     ds = p * (dp - delta)                  delta = sum(dout * out), over Dh
 *     dq = ds @ k / sqrt(Dh)        dk = ds.T @ q / sqrt(Dh)        dv = p.T @ dout
 *
 *     for each sequence and query head                    one thread
 *         for each key block of KEYS positions
 *             for each query block of QUERIES positions that sees it
 *                 p, dp, ds                               (QUERIES, KEYS), in L1 and L2
 *                 dv += p.T @ dout;  dk += ds.T @ q;  dq += ds @ k
 *     dk, dv of a KV head = their sum over its query heads
 *
 * The order of a sum is ascending: in dq the keys; in dk and dv the queries of a head, and then the heads. So
 * neither threads nor cuts between keys change a bit.
 *
 * Compiled once as it stands: the loop over threads and the scalar form. Compiled once more for each
 * instruction set: the part under VECTOR_FORMS (README.md). tests/kernels/test_attention_backward.py compares
 * every form with NumPy. */
#include <stdlib.h>

#include "dispatch.h"
#include "exp_log.h"
#include "formats.h"
#include "memory.h"
#include "vec.h"

/* NL_KEYS is a multiple of QUERIES, so the first query block of a key block begins where that does. */
enum { KEYS = NL_KEYS, QUERIES = 48 };

/* From one position to the next: of q, dq, dout and out; of k, v, dk and dv. */
INLINE int64_t q_row(const nl_attention_backward_args *a) { return a->H * a->Dh; }
INLINE int64_t k_row(const nl_attention_backward_args *a) { return a->K * a->Dh; }

/* The first number of sequence b and head h: of arrays as q, and of arrays as k. */
INLINE int64_t q_head(const nl_attention_backward_args *a, int64_t b, int64_t h) {
    return b * a->T * q_row(a) + h * a->Dh;
}
INLINE int64_t k_head(const nl_attention_backward_args *a, int64_t b, int64_t h) {
    return b * a->T * k_row(a) + h / (a->H / a->K) * a->Dh;
}

/* Rows of Dh numbers, and arrays of queries, are padded to whole registers of every instruction set. */
INLINE int64_t whole_registers(int64_t n) { return (n + 31) / 32 * 32; }

/* Scratch of one head, as head_scratch shows it. */
INLINE int64_t backward_scratch_floats(const nl_attention_backward_args *a) {
    const int64_t width = whole_registers(a->Dh), queries = a->T - a->begin + QUERIES;
    return 3 * queries * width + 2 * whole_registers(queries) + 5 * KEYS * width + 2 * QUERIES * KEYS;
}

#ifndef VECTOR_FORMS
int nl_attention_backward(const nl_attention_backward_args *a, int threads) {
    const kernels *kernel = chosen_kernels();
    const int64_t B = a->B, H = a->H, K = a->K, Dh = a->Dh, n_rep = H / K;
    const int64_t keys = a->end - a->begin, part = 2 * keys * Dh; /* dk and dv of a query head: (keys, Dh) */
    if (keys <= 0) return 0;
    float *parts = malloc((size_t)(B * H * part) * sizeof(float));
    int status = parts ? 0 : NL_NO_MEMORY;
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *scratch = allocate_aligned(backward_scratch_floats(a) * (int64_t)sizeof(float));
        if (!scratch) {
#pragma omp atomic write
            status = NL_NO_MEMORY;
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < B * H; i++)
            if (parts && scratch) kernel->attention_backward(a, i / H, i % H, parts + i * part, scratch);
#pragma omp for
        for (int64_t i = 0; i < B * K * keys; i++) {
            const int64_t b = i / keys / K, h = i / keys % K * n_rep, j = i % keys;
            const int64_t to = k_head(a, b, h) + (a->begin + j) * k_row(a);
            for (int64_t d = 0; d < (status ? 0 : Dh); d++) {
                const float *from = parts + (b * H + h) * part + j * Dh + d;
                float dk = from[0], dv = from[keys * Dh];
                for (int64_t r = 1; r < n_rep; r++) dk += from[r * part], dv += from[r * part + keys * Dh];
                a->dk[to + d] = dk, a->dv[to + d] = dv;
            }
        }
        free_aligned(scratch);
    }
    free(parts);
    return status;
}

/* ---------------------------------------------------------------- scalar: the definition in C */

static float dot(const float *x, const float *y, int64_t n) {
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * y[i];
    return sum;
}

void attention_backward_scalar(const nl_attention_backward_args *a, int64_t b, int64_t h, float *part,
                               float *scratch) {
    const int64_t T = a->T, Dh = a->Dh, keys = a->end - a->begin, first = q_head(a, b, h);
    const float scale = 1 / sqrtf((float)Dh), *lse = a->lse + (b * a->H + h) * T;
    float *delta = scratch;
    for (int64_t t = a->begin; t < T; t++) {
        const int64_t at = first + t * q_row(a);
        delta[t - a->begin] = dot(a->dout + at, a->out + at, Dh);
        for (int64_t d = 0; d < Dh && a->begin == 0; d++) a->dq[at + d] = 0;
    }
    for (int64_t j = a->begin; j < a->end; j++) {
        const float *k = a->k + k_head(a, b, h) + j * k_row(a), *v = a->v + k_head(a, b, h) + j * k_row(a);
        float *dk = part + (j - a->begin) * Dh, *dv = dk + keys * Dh;
        for (int64_t d = 0; d < Dh; d++) dk[d] = dv[d] = 0;
        for (int64_t t = j; t < T; t++) {
            const int64_t at = first + t * q_row(a);
            const float *q = a->q + at, *dout = a->dout + at;
            const float p = exp_float(dot(q, k, Dh) * scale - lse[t]);
            const float ds = p * (dot(dout, v, Dh) - delta[t - a->begin]) * scale;
            for (int64_t d = 0; d < Dh; d++) {
                a->dq[at + d] += ds * k[d];
                dk[d] += ds * q[d];
                dv[d] += p * dout[d];
            }
        }
    }
}

#else
/* ---------------------------------------------------------------- vectors
 *
 * All five products have one micro-kernel. Its tile of TILE_ROWS x TILE_COLS sums is that of attention.c: one
 * step takes 2 loads, TILE_ROWS broadcasts and 2 * TILE_ROWS FMAs. Queries and keys that do not see each
 * other are left out in whole rows and columns of tiles. The rows of a head are packed, with zeros up to
 * whole tiles. */

_Static_assert(KEYS % TILE_COLS == 0 && KEYS % TILE_ROWS == 0 && QUERIES % TILE_ROWS == 0, "whole tiles");
_Static_assert(KEYS % QUERIES == 0, "the first query block of a key block begins where that does");

/* c (TILE_ROWS, n_vecs registers) = a (TILE_ROWS, n) @ b (n, the same), or += where `add` is 1. a_row,
 * a_column: from one row of a, or column, to the next. */
VEC_INLINE void add_product(const int n_vecs, const int add, float *c, int64_t c_row, const float *a,
                            const int64_t a_row, const int64_t a_column, const float *b, int64_t b_row,
                            int64_t n) {
    vec sum[TILE_ROWS][2];
    for (int r = 0; r < TILE_ROWS; r++)
        for (int w = 0; w < n_vecs; w++) sum[r][w] = add ? vec_load(c + r * c_row + w * LANES) : vec_zero();
    for (int64_t i = 0; i < n; i++, a += a_column, b += b_row) {
        vec b_i[2];
        for (int w = 0; w < n_vecs; w++) b_i[w] = vec_load(b + w * LANES);
        for (int r = 0; r < TILE_ROWS; r++) {
            const vec one = vec_all(a[r * a_row]);
            for (int w = 0; w < n_vecs; w++) sum[r][w] = vec_fma(one, b_i[w], sum[r][w]);
        }
    }
    for (int r = 0; r < TILE_ROWS; r++)
        for (int w = 0; w < n_vecs; w++) vec_store(c + r * c_row + w * LANES, sum[r][w]);
}

/* One head. Rows of Dh numbers are padded to `width`. */
typedef struct {
    int64_t width;
    float *q;                   /* (queries, Dh)     scaled by 1 / sqrt(Dh) */
    float *dout, *dq;           /* (queries, Dh) */
    float *lse, *delta;         /* (queries,) */
    float *k;                   /* (KEYS, Dh)        scaled by 1 / sqrt(Dh) */
    float *k_turned, *v_turned; /* (Dh, KEYS)      transposed */
    float *dk, *dv;             /* (KEYS, Dh) */
    float *p, *ds;              /* (QUERIES, KEYS) */
} head_scratch;

/* to (rows, width) = scale * x, with zeros behind the n rows of x and behind Dh. */
VEC_INLINE void pack_head(float *to, int64_t width, const float *x, int64_t x_row, int64_t n, int64_t rows,
                          int64_t Dh, float scale) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < width; d += LANES) {
            float *at = to + r * width + d;
            if (r < n && d + LANES <= Dh)
                vec_store(at, vec_mul(vec_load(x + r * x_row + d), vec_all(scale)));
            else
                for (int64_t l = 0; l < LANES; l++)
                    at[l] = r < n && d + l < Dh ? x[r * x_row + d + l] * scale : 0;
        }
}

/* to (width, KEYS) = x (KEYS, width), transposed */
VEC_INLINE void turn(float *to, const float *x, int64_t width) {
    for (int64_t j = 0; j < KEYS; j += LANES)
        for (int64_t d = 0; d < width; d += LANES) {
            vec square[LANES];
            for (int i = 0; i < LANES; i++) square[i] = vec_load(x + (j + i) * width + d);
            vec_transpose(square);
            for (int i = 0; i < LANES; i++) vec_store(to + (d + i) * KEYS + j, square[i]);
        }
}

VEC_INLINE void unpack_head(float *to, int64_t to_row, const float *x, int64_t width, int64_t n, int64_t Dh) {
    for (int64_t r = 0; r < n; r++) memcpy(to + r * to_row, x + r * width, (size_t)Dh * sizeof(float));
}

/* How many keys of the block at j query t sees. */
VEC_INLINE int64_t seen_keys(int64_t t, int64_t j) { return t + 1 - j < KEYS ? t + 1 - j : KEYS; }

/* p and ds of n queries from t on. Their rows are zeros behind the last key that is seen, and behind row n.
 */
VEC_INLINE void weights_and_gradient(const head_scratch *s, int64_t first, int64_t t, int64_t n, int64_t j,
                                     int64_t Dh) {
    const int64_t at = t - first;
    for (int64_t r = 0; r < n; r += TILE_ROWS)
        for (int64_t c = 0; c < seen_keys(t + r + TILE_ROWS - 1, j); c += TILE_COLS) {
            add_product(2, 0, s->p + r * KEYS + c, KEYS, s->q + (at + r) * s->width, s->width, 1,
                        s->k_turned + c, KEYS, Dh);
            add_product(2, 0, s->ds + r * KEYS + c, KEYS, s->dout + (at + r) * s->width, s->width, 1,
                        s->v_turned + c, KEYS, Dh);
        }
    for (int64_t r = 0; r < QUERIES; r++) {
        float *p = s->p + r * KEYS, *ds = s->ds + r * KEYS;
        const int64_t seen = r < n ? seen_keys(t + r, j) : 0, whole = (seen + LANES - 1) / LANES * LANES;
        const vec lse = vec_all(s->lse[at + r]), delta = vec_all(s->delta[at + r]);
        for (int64_t c = seen; c < whole; c++) p[c] = -INFINITY;
        for (int64_t c = 0; c < whole; c += LANES) {
            const vec p_c = vec_exp(vec_sub(vec_load(p + c), lse));
            vec_store(p + c, p_c);
            vec_store(ds + c, vec_mul(p_c, vec_sub(vec_load(ds + c), delta)));
        }
        for (int64_t c = whole; c < KEYS; c += LANES)
            vec_store(p + c, vec_zero()), vec_store(ds + c, vec_zero());
    }
}

/* dk, dv and dq += the products of one query block and one key block, for the numbers of n_vecs registers
 * from d on. */
VEC_INLINE void add_gradients(const int n_vecs, const head_scratch *s, int64_t first, int64_t t, int64_t n,
                              int64_t j, int64_t d) {
    const int64_t at = t - first, width = s->width;
    for (int64_t c = 0; c < KEYS; c += TILE_ROWS) {
        const int64_t r = j + c > t ? j + c - t : 0; /* the first query that sees key j + c */
        if (r >= n) break;
        add_product(n_vecs, 1, s->dv + c * width + d, width, s->p + r * KEYS + c, 1, KEYS,
                    s->dout + (at + r) * width + d, width, n - r);
        add_product(n_vecs, 1, s->dk + c * width + d, width, s->ds + r * KEYS + c, 1, KEYS,
                    s->q + (at + r) * width + d, width, n - r);
    }
    for (int64_t r = 0; r < n; r += TILE_ROWS)
        add_product(n_vecs, 1, s->dq + (at + r) * width + d, width, s->ds + r * KEYS, KEYS, 1, s->k + d,
                    width, seen_keys(t + r + TILE_ROWS - 1, j));
}

VEC_TARGET void VEC(attention_backward)(const nl_attention_backward_args *a, int64_t b, int64_t h,
                                        float *part, float *scratch) {
    const int64_t T = a->T, Dh = a->Dh, first = a->begin, n = T - first, rows = n + QUERIES;
    const int64_t at = q_head(a, b, h) + first * q_row(a), keys = a->end - a->begin;
    const int64_t width = (Dh + LANES - 1) / LANES * LANES, q_floats = rows * width, k_floats = KEYS * width;
    const float scale = 1 / sqrtf((float)Dh);
    float *lse = scratch + 3 * q_floats, *k = lse + 2 * whole_registers(rows);
    const head_scratch s = {.width = width,
                            .q = scratch,
                            .dout = scratch + q_floats,
                            .dq = scratch + 2 * q_floats,
                            .lse = lse,
                            .delta = lse + whole_registers(rows),
                            .k = k,
                            .k_turned = k + k_floats,
                            .v_turned = k + 2 * k_floats,
                            .dk = k + 3 * k_floats,
                            .dv = k + 4 * k_floats,
                            .p = k + 5 * k_floats,
                            .ds = k + 5 * k_floats + QUERIES * KEYS};
    pack_head(s.q, width, a->q + at, q_row(a), n, rows, Dh, scale);
    pack_head(s.dq, width, a->out + at, q_row(a), n, rows, Dh, 1); /* for delta */
    pack_head(s.dout, width, a->dout + at, q_row(a), n, rows, Dh, 1);
    for (int64_t r = 0; r < rows; r++) {
        vec sum = vec_zero();
        for (int64_t d = 0; d < width; d += LANES)
            sum = vec_fma(vec_load(s.dout + r * width + d), vec_load(s.dq + r * width + d), sum);
        s.delta[r] = vec_sum(sum), s.lse[r] = r < n ? a->lse[(b * a->H + h) * T + first + r] : 0;
    }
    pack_head(s.dq, width, a->dq + at, q_row(a), first > 0 ? n : 0, rows, Dh, 1);
    for (int64_t j = a->begin; j < a->end; j += KEYS) {
        const int64_t here = a->end - j < KEYS ? a->end - j : KEYS, key = k_head(a, b, h) + j * k_row(a);
        pack_head(s.k, width, a->v + key, k_row(a), here, KEYS, Dh, 1);
        turn(s.v_turned, s.k, width);
        pack_head(s.k, width, a->k + key, k_row(a), here, KEYS, Dh, 1);
        turn(s.k_turned, s.k, width);
        pack_head(s.k, width, a->k + key, k_row(a), here, KEYS, Dh, scale);
        memset(s.dk, 0, (size_t)(2 * k_floats) * sizeof(float));
        for (int64_t t = j; t < T; t += QUERIES) {
            const int64_t queries = T - t < QUERIES ? T - t : QUERIES;
            weights_and_gradient(&s, first, t, queries, j, Dh);
            int64_t d = 0;
            for (; d + TILE_COLS <= width; d += TILE_COLS) add_gradients(2, &s, first, t, queries, j, d);
            if (d < width) add_gradients(1, &s, first, t, queries, j, d);
        }
        unpack_head(part + (j - a->begin) * Dh, Dh, s.dk, width, here, Dh);
        unpack_head(part + (keys + j - a->begin) * Dh, Dh, s.dv, width, here, Dh);
    }
    unpack_head(a->dq + at, q_row(a), s.dq, width, n, Dh);
}
#endif

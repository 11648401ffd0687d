/* attention: softmax(q @ k.T / sqrt(Dh) + causal mask) @ v, without ever storing the (T, S) scores.
 *
 * The T queries are the last T of the S positions: query t sees positions 0 .. t + S - T.
 * H / K query heads share one key/value head (GQA): head h reads key/value head h / (H / K).
 *
 * Streaming softmax (Milakov & Gimelshein 2018; Dao et al. 2022, algorithm 1): walk the positions once and
 * keep, for each query, the largest score so far m, the sum l of exp(score - m) and the sum of
 * exp(score - m) v. When a larger score comes, what was summed is scaled by exp(old m - new m).
 *
 * Like linear.c, this file is compiled three times: as it is, for the loop over threads and the scalar
 * form, and from avx2.c and avx512.c for the vector form. tests/test_kernels.py holds every form to
 * NumPy, and any split of T and of the threads to the same bits. */
#include <float.h>
#include <stdlib.h>

#include "dispatch.h"
#include "kernels.h"
#include "vec.h"

/* An item of work: one batch, one key/value head, and 16 of the queries that read it. Its rows are the
 * pairs (t, which of the n_rep heads), so that queries which read the same keys lie side by side. */
enum { ITEM_ROWS = 16, BLOCK = 64, MAX_DH = 256 };
enum { SCRATCH = 2 * ITEM_ROWS * MAX_DH + 2 * BLOCK * MAX_DH };

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

INLINE const uint8_t *position(const attention_args *a, const uint8_t *base, const int64_t strides[3],
                               int64_t b, int64_t j, int64_t head) {
    return base + (b * strides[0] + j * strides[1] + head * strides[2]) * (a->format == F16 ? 2 : 4);
}

INLINE float number(const attention_args *a, const uint8_t *p, int64_t i) {
    return a->format == F16 ? half_to_float(load_u16(p + 2 * i)) : load_f32(p + 4 * i);
}

#ifndef LANES
int nl_attention(float *out, const float *q, const void *k, const void *v, int format, int64_t B, int64_t T,
                 int64_t S, int64_t H, int64_t K, int64_t Dh, const int64_t *k_strides,
                 const int64_t *v_strides, int64_t begin, int64_t end, int threads) {
    attention_args a = {q, k, v, out, format, B, T, S, H, K, Dh, {0}, {0}, begin, end};
    memcpy(a.k_strides, k_strides, sizeof a.k_strides);
    memcpy(a.v_strides, v_strides, sizeof a.v_strides);
    const kernels *kernel = chosen_kernels();
    const int64_t items = B * K * items_a_head(&a);
    int out_of_memory = 0;
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *scratch = malloc(SCRATCH * sizeof(float));
        if (!scratch) {
#pragma omp atomic write
            out_of_memory = -1;
        }
        /* Later queries see more positions, so equal shares would not be equal work. */
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < items; i++)
            if (scratch) kernel->attention(&a, i, scratch);
        free(scratch);
    }
    return out_of_memory;
}

void nl_exp(float *y, const float *x, int64_t n) { chosen_kernels()->exp(y, x, n); }

/* ---------------------------------------------------------------- scalar: the definition in C */

void attention_scalar(const attention_args *a, int64_t item, float *scratch) {
    const item_rows it = rows_of(a, item);
    const float scale = 1 / sqrtf((float)a->Dh);
    float *sum = scratch;
    for (int64_t i = 0; i < it.rows; i++) {
        const float *q = a->q + query_at(a, &it, i);
        float m = -FLT_MAX, l = 0; /* not -INFINITY: -inf - -inf would be NaN */
        for (int64_t d = 0; d < a->Dh; d++) sum[d] = 0;
        for (int64_t j = 0; j < sees(a, &it, i); j++) {
            const uint8_t *k = position(a, a->k, a->k_strides, it.b, j, it.kv);
            const uint8_t *v = position(a, a->v, a->v_strides, it.b, j, it.kv);
            float score = 0;
            for (int64_t d = 0; d < a->Dh; d++) score += q[d] * number(a, k, d);
            score *= scale;
            const float new_m = score > m ? score : m;
            const float old = expf(m - new_m), p = expf(score - new_m);
            for (int64_t d = 0; d < a->Dh; d++) sum[d] = sum[d] * old + p * number(a, v, d);
            l = l * old + p;
            m = new_m;
        }
        for (int64_t d = 0; d < a->Dh; d++) a->out[query_at(a, &it, i) + d] = sum[d] / l;
    }
}

void exp_scalar(float *y, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] = x[i] < -87.0f ? 0 : expf(x[i]);
}

#else
/* ---------------------------------------------------------------- vectors
 *
 * The same walk, 64 positions at a time and four queries together, so that each key and value that is
 * loaded serves four queries. A block's scores lie as s[j][4]: position j of each of the four.
 *
 *     scores   4 queries x 3 positions = 12 accumulators along Dh, as in linear.c's tile
 *     softmax  max, exp and sum down the columns of s: LANES / 4 positions in one register
 *     values   4 queries x 2 registers of the Dh = 8 accumulators along the positions, ascending
 *
 * Blocks begin at fixed positions and every query adds in this order, whichever queries stand beside
 * it: splitting T never changes a bit. A position that a query may not see gets the score -inf, and
 * its value is not even read, for 0 * NaN would be NaN. */

enum { GROUP = 4, ACROSS = LANES / GROUP };

typedef struct {
    const float *p;
    int64_t stride;
} block;

/* exp(x) for x <= 0, and for x up to 88; exactly 0 below -87, exactly 1 at 0, NaN for NaN.
 * x = n ln2 + r with n whole, |r| <= ln2 / 2; exp(x) = 2^n exp(r); exp(r) = 1 + r + r^2 p(r), where p was
 * fitted by least squares at Chebyshev nodes, reweighted until its error was level. All 288 million
 * floats from -87 to -2^-28 were tried: the largest error is 1.01 units in the last place. */
WORD vec vec_exp(vec x) {
    const vec lowest = vec_all(-87.0f), clamped = vec_max(lowest, x);
    const vec n = vec_round(vec_mul(clamped, vec_all(1.44269504f)));
    vec r = vec_fma(n, vec_all(-0.693145752f), clamped); /* ln2 in two parts; n times this one is exact */
    r = vec_fma(n, vec_all(-1.4286068e-6f), r);
    vec p = vec_all(0.0013814596f);
    p = vec_fma(p, r, vec_all(0.0083687175f));
    p = vec_fma(p, r, vec_all(0.04166839f));
    p = vec_fma(p, r, vec_all(0.16666521f));
    p = vec_fma(p, r, vec_all(0.49999994f));
    p = vec_add(vec_fma(vec_mul(r, r), p, r), vec_all(1.0f));
    return vec_zero_below(x, lowest, vec_times_2_to(n, p));
}

/* Positions j .. j + n of one head as float32, Dh padded with zeros to whole registers: where they
 * lie if they lie so already, else copied to `room`. */
WORD block load_block(const attention_args *a, const uint8_t *base, const int64_t strides[3],
                      const item_rows *it, int64_t j, int64_t n, float *room) {
    const int64_t Dp = (a->Dh + LANES - 1) / LANES * LANES;
    const uint8_t *p = position(a, base, strides, it->b, j, it->kv);
    if (a->format == F32 && Dp == a->Dh) return (block){(const float *)(const void *)p, strides[1]};
    for (int64_t i = 0; i < n; i++, p = position(a, base, strides, it->b, j + i, it->kv)) {
        int64_t d = 0;
        for (; d + LANES <= a->Dh; d += LANES)
            vec_store(room + i * Dp + d, a->format == F16 ? vec_from_f16(p + 2 * d) : vec_load(p + 4 * d));
        for (; d < Dp; d++) room[i * Dp + d] = d < a->Dh ? number(a, p, d) : 0;
    }
    return (block){room, Dp};
}

/* s[j][g] = scale * q[g] . k[j] for `count` positions. */
WORD void scores(const int count, float *s, const float *q, const float *k, int64_t k_stride, int64_t Dp,
                 __m128 scale) {
    vec sum[3][GROUP];
    for (int j = 0; j < count; j++)
        for (int g = 0; g < GROUP; g++) sum[j][g] = vec_zero();
    for (int64_t d = 0; d < Dp; d += LANES)
        for (int g = 0; g < GROUP; g++) {
            const vec x = vec_load(q + g * Dp + d);
            for (int j = 0; j < count; j++) sum[j][g] = vec_fma(x, vec_load(k + j * k_stride + d), sum[j][g]);
        }
    for (int j = 0; j < count; j++)
        _mm_storeu_ps(s + j * GROUP, _mm_mul_ps(scale, vec_sums(sum[j][0], sum[j][1], sum[j][2], sum[j][3])));
}

/* sum[g][d .. d + LANES wide] = old[g] * sum + p[j][g] * v[j], over the positions that each query sees. */
WORD void values(const int wide, float *sum, int64_t Dp, const float *old, const float *p, const float *v,
                 int64_t v_stride, const int64_t seen[GROUP], int64_t all_see, int64_t any_sees) {
    vec acc[GROUP][2];
    for (int g = 0; g < GROUP; g++)
        for (int i = 0; i < wide; i++)
            acc[g][i] = vec_mul(vec_load(sum + g * Dp + LANES * i), vec_all(old[g]));
    for (int64_t j = 0; j < all_see; j++)
        for (int g = 0; g < GROUP; g++)
            for (int i = 0; i < wide; i++)
                acc[g][i] =
                    vec_fma(vec_all(p[j * GROUP + g]), vec_load(v + j * v_stride + LANES * i), acc[g][i]);
    for (int64_t j = all_see; j < any_sees; j++)
        for (int g = 0; g < GROUP; g++)
            if (j < seen[g])
                for (int i = 0; i < wide; i++)
                    acc[g][i] =
                        vec_fma(vec_all(p[j * GROUP + g]), vec_load(v + j * v_stride + LANES * i), acc[g][i]);
    for (int g = 0; g < GROUP; g++)
        for (int i = 0; i < wide; i++) vec_store(sum + g * Dp + LANES * i, acc[g][i]);
}

/* One block of positions for one group of four queries: m, l and sum go on from where they were. */
WORD void group_block(float *m, float *l, float *sum, const float *q, block k, block v, int64_t Dp,
                      const int64_t seen[GROUP], float scale) {
    _Alignas(32) float s[BLOCK * GROUP], old[GROUP];
    int64_t all_see = seen[0], any_sees = seen[0], j = 0;
    for (int g = 1; g < GROUP; g++) {
        all_see = seen[g] < all_see ? seen[g] : all_see;
        any_sees = seen[g] > any_sees ? seen[g] : any_sees;
    }
    for (; j + 3 <= any_sees; j += 3)
        scores(3, s + j * GROUP, q, k.p + j * k.stride, k.stride, Dp, _mm_set1_ps(scale));
    for (; j < any_sees; j++)
        scores(1, s + j * GROUP, q, k.p + j * k.stride, k.stride, Dp, _mm_set1_ps(scale));
    for (int g = 0; g < GROUP; g++) /* what a query may not see; and more, to fill the last register */
        for (j = seen[g]; j < (any_sees + ACROSS - 1) / ACROSS * ACROSS; j++) s[j * GROUP + g] = -INFINITY;

    vec largest = vec_all(-INFINITY), added = vec_zero();
    for (j = 0; j < any_sees; j += ACROSS) largest = vec_max(largest, vec_load(s + j * GROUP));
    const __m128 old_m = _mm_loadu_ps(m), new_m = _mm_max_ps(old_m, fours_max(largest));
    const vec shift = vec_of_fours(new_m);
    for (j = 0; j < any_sees; j += ACROSS) {
        const vec p = vec_exp(vec_sub(vec_load(s + j * GROUP), shift));
        vec_store(s + j * GROUP, p);
        added = vec_add(added, p);
    }
    const __m128 scaled = first_four(vec_exp(vec_of_fours(_mm_sub_ps(old_m, new_m))));
    _mm_store_ps(old, scaled);
    _mm_storeu_ps(m, new_m);
    _mm_storeu_ps(l, _mm_add_ps(_mm_mul_ps(_mm_loadu_ps(l), scaled), fours_sum(added)));

    int64_t d = 0;
    for (; d + 2 * LANES <= Dp; d += 2 * LANES)
        values(2, sum + d, Dp, old, s, v.p + d, v.stride, seen, all_see, any_sees);
    for (; d < Dp; d += LANES) values(1, sum + d, Dp, old, s, v.p + d, v.stride, seen, all_see, any_sees);
}

TARGET void VEC(attention)(const attention_args *a, int64_t item, float *scratch) {
    const item_rows it = rows_of(a, item);
    const int64_t Dp = (a->Dh + LANES - 1) / LANES * LANES, groups = (it.rows + GROUP - 1) / GROUP;
    const float scale = 1 / sqrtf((float)a->Dh);
    float *q = scratch, *sum = q + ITEM_ROWS * Dp, *k_room = sum + ITEM_ROWS * Dp,
          *v_room = k_room + BLOCK * Dp;
    float m[ITEM_ROWS], l[ITEM_ROWS] = {0};
    memset(scratch, 0, 2 * ITEM_ROWS * Dp * sizeof(float));
    for (int64_t i = 0; i < ITEM_ROWS; i++) m[i] = -FLT_MAX;
    for (int64_t i = 0; i < it.rows; i++)
        memcpy(q + i * Dp, a->q + query_at(a, &it, i), a->Dh * sizeof(float));

    const int64_t any_sees = sees(a, &it, it.rows - 1);
    for (int64_t j = 0; j < any_sees; j += BLOCK) {
        const int64_t n = j + BLOCK < any_sees ? BLOCK : any_sees - j;
        const block k = load_block(a, a->k, a->k_strides, &it, j, n, k_room);
        const block v = load_block(a, a->v, a->v_strides, &it, j, n, v_room);
        for (int64_t g = 0; g < groups; g++) {
            int64_t seen[GROUP]; /* of this block; the rows beyond the last are copies of it, never written */
            for (int i = 0; i < GROUP; i++) {
                const int64_t row = g * GROUP + i < it.rows ? g * GROUP + i : it.rows - 1;
                const int64_t left = sees(a, &it, row) - j;
                seen[i] = left < 0 ? 0 : left < n ? left : n;
            }
            const int64_t row = g * GROUP;
            group_block(m + row, l + row, sum + row * Dp, q + row * Dp, k, v, Dp, seen, scale);
        }
    }
    for (int64_t i = 0; i < it.rows; i++)
        for (int64_t d = 0; d < a->Dh; d++) a->out[query_at(a, &it, i) + d] = sum[i * Dp + d] / l[i];
}

TARGET void VEC(exp)(float *y, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        float some[LANES] = {0};
        const size_t bytes = (n - i < LANES ? n - i : LANES) * sizeof(float);
        memcpy(some, x + i, bytes);
        vec_store(some, vec_exp(vec_load(some)));
        memcpy(y + i, some, bytes);
    }
}
#endif

/* attention: out = softmax(q @ k.T / sqrt(Dh) + causal mask) @ v, without a (T, S) array of scores.
 *
 * The T queries are the last T of the S positions, so query t sees positions 0 .. t + S - T. With a sliding
 * window it sees the last `window` of these. No loop enters blocks that all of its rows do not see.
 * H / K query heads share one KV head (GQA): head h reads KV head h / (H / K).
 *
 * The softmax is computed online (Milakov & Gimelshein 2018; Dao et al. 2022, algorithm 1). Its state has
 * three parts for each query:
 *
 *     m     the largest score so far
 *     l     the sum of exp(score - m)
 *     o     the sum of exp(score - m) v
 *
 *     for each query block of up to QUERY_ROWS rows                     one thread; its rows share a KV head
 *         for each KV span of KV_SPAN positions                         a "split" of Flash-Decoding
 *             m, l, o = -FLT_MAX, 0, 0
 *             for each KV block of KV_BLOCK positions in the span       attention_scalar: of one position
 *                 s     = q @ k.T / sqrt(Dh)
 *                 new_m = max(m, rowmax(s))
 *                 p     = exp(s - new_m)
 *                 alpha = exp(m - new_m)
 *                 m, l, o = new_m, alpha * l + rowsum(p), alpha * o + p @ v
 *             merge the span's m, l, o into those of the spans before   merge_states
 *         out = o / l;  lse = m + log(l)                                write_output
 *
 *     positions    0             KV_SPAN         2 KV_SPAN         S
 *     a query      |---------------|---------------|---------------|
 *                      m, l, o         m, l, o         m, l, o
 *                         `---- merge -----'---- merge ----'
 *
 * Every span starts from an empty state. So the bits are the same when one thread walks all spans and when
 * each span has a thread of its own.
 *
 * Compiled once as it stands: the loop over threads and the scalar form. Compiled once more for each
 * instruction set: the part under VECTOR_FORMS (README.md).
 * tests/kernels/test_attention_kernel.py compares every form with NumPy. It also compares any split of T, and
 * any number of threads, with one call of one thread. */
#include <float.h>
#include <stdlib.h>

#include "dispatch.h"
#include "exp_log.h"
#include "formats.h"
#include "memory.h"
#include "vec.h"

/* Rows of q, o, m and l are padded to PAD floats: whole registers of every instruction set. The last rows are
 * computed SMALL_TILE at a time, so there is room for PAD_ROWS rows more. */
enum { QUERY_ROWS = NL_QUERY_ROWS, KV_SPAN = 1024, KV_BLOCK = 128, MAX_DH = NL_MAX_DH };
enum { PAD = 32, SMALL_TILE = 4, PAD_ROWS = SMALL_TILE - 1 };

INLINE int64_t padded(int64_t n) { return (n + PAD - 1) / PAD * PAD; }

/* A query block: rows first .. first + rows - 1 of the pairs (query t, query head) that read one KV head.
 * The n_rep heads of one query are neighbours. */
typedef struct {
    int64_t b, kv_head, first, rows, n_rep;
} query_block;

INLINE int64_t query_blocks_per_head(const nl_attention_args *a) {
    return ((a->end - a->begin) * (a->H / a->K) + QUERY_ROWS - 1) / QUERY_ROWS;
}

INLINE query_block query_block_at(const nl_attention_args *a, int64_t index) {
    const int64_t per_head = query_blocks_per_head(a), n_rep = a->H / a->K;
    const int64_t first = index % per_head * QUERY_ROWS, left = (a->end - a->begin) * n_rep - first;
    return (query_block){index / per_head / a->K, index / per_head % a->K, first,
                         left < QUERY_ROWS ? left : QUERY_ROWS, n_rep};
}

/* Where a row begins in q and in out. */
INLINE int64_t row_offset(const nl_attention_args *a, const query_block *qb, int64_t row) {
    const int64_t t = a->begin + (qb->first + row) / qb->n_rep;
    const int64_t h = qb->kv_head * qb->n_rep + (qb->first + row) % qb->n_rep;
    return ((qb->b * a->T + t) * a->H + h) * a->Dh;
}

/* Its place in lse. */
INLINE float *lse_at(const nl_attention_args *a, const query_block *qb, int64_t row) {
    const int64_t t = a->begin + (qb->first + row) / qb->n_rep;
    const int64_t h = qb->kv_head * qb->n_rep + (qb->first + row) % qb->n_rep;
    return a->lse + (qb->b * a->H + h) * a->T + t;
}

/* The causal mask: a row sees positions 0 .. visible_positions - 1. */
INLINE int64_t visible_positions(const nl_attention_args *a, const query_block *qb, int64_t row) {
    return a->begin + (qb->first + row) / qb->n_rep + a->S - a->T + 1;
}

/* The sliding window: the first position that a row sees. */
INLINE int64_t first_visible(const nl_attention_args *a, const query_block *qb, int64_t row) {
    const int64_t visible = visible_positions(a, qb, row);
    return a->window && visible > a->window ? visible - a->window : 0;
}

/* The key, or the value, of position j: Dh elements. `format` is that of the arguments, as a constant where
 * the caller has it. */
INLINE const uint8_t *key_at(const int format, const nl_attention_args *a, const query_block *qb, int64_t j) {
    const int64_t *s = a->k_strides, stored = j - a->dropped;
    const int64_t offset = qb->b * s[0] + stored * s[1] + qb->kv_head * s[2];
    return (const uint8_t *)a->k + bytes_of(format, offset);
}
INLINE const uint8_t *value_at(const int format, const nl_attention_args *a, const query_block *qb,
                               int64_t j) {
    const int64_t *s = a->v_strides, stored = j - a->dropped;
    const int64_t offset = qb->b * s[0] + stored * s[1] + qb->kv_head * s[2];
    return (const uint8_t *)a->v + bytes_of(format, offset);
}

/* The softmax state of a query block after some positions. */
typedef struct {
    float *m; /* (rows,)           the largest score */
    float *l; /* (rows,)           sum of exp(score - m) */
    float *o; /* (rows, padded Dh) sum of exp(score - m) v */
} softmax_state;

INLINE int64_t softmax_state_floats(int64_t rows, int64_t Dh) {
    return (rows + PAD_ROWS) * padded(Dh) + 2 * padded(rows + PAD_ROWS);
}
INLINE softmax_state softmax_state_in(float *memory, int64_t rows, int64_t Dh) {
    float *m = memory + (rows + PAD_ROWS) * padded(Dh);
    return (softmax_state){.m = m, .l = m + padded(rows + PAD_ROWS), .o = memory};
}

/* Scratch of one span beside its state: q, s, alpha, rowsum(p), and one panel of keys or values. */
INLINE int64_t scratch_floats(int64_t rows) {
    return (rows + PAD_ROWS) * (MAX_DH + KV_BLOCK) + 2 * padded(rows + PAD_ROWS) + PAD * MAX_DH;
}

#ifndef VECTOR_FORMS
/* all = all merged with span, the softmax state of the KV span that begins at position span_begin. */
static void merge_states(const nl_attention_args *a, const query_block *qb, float *all_memory,
                         float *span_memory, int64_t span_begin) {
    const softmax_state all = softmax_state_in(all_memory, qb->rows, a->Dh);
    const softmax_state span = softmax_state_in(span_memory, qb->rows, a->Dh);
    for (int64_t row = 0; row < qb->rows; row++) {
        if (visible_positions(a, qb, row) <= span_begin) continue;
        if (first_visible(a, qb, row) >= span_begin + KV_SPAN) continue;
        if (first_visible(a, qb, row) >= span_begin) { /* it saw nothing before */
            memcpy(all.o + row * padded(a->Dh), span.o + row * padded(a->Dh), a->Dh * sizeof(float));
            all.m[row] = span.m[row], all.l[row] = span.l[row];
            continue;
        }
        const float m = span.m[row] > all.m[row] ? span.m[row] : all.m[row];
        const float before = exp_float(all.m[row] - m), here = exp_float(span.m[row] - m);
        float *o = all.o + row * padded(a->Dh), *span_o = span.o + row * padded(a->Dh);
        for (int64_t d = 0; d < a->Dh; d++) o[d] = o[d] * before + span_o[d] * here;
        all.l[row] = all.l[row] * before + span.l[row] * here;
        all.m[row] = m;
    }
}

/* out = o / l, lse = m + log(l) */
static void write_output(const nl_attention_args *a, const query_block *qb, float *memory) {
    const softmax_state all = softmax_state_in(memory, qb->rows, a->Dh);
    for (int64_t row = 0; row < qb->rows; row++) {
        const float *o = all.o + row * padded(a->Dh), inverse_l = 1 / all.l[row];
        for (int64_t d = 0; d < a->Dh; d++) a->out[row_offset(a, qb, row) + d] = o[d] * inverse_l;
        if (a->lse) *lse_at(a, qb, row) = all.m[row] + (float)log_float64(all.l[row]);
    }
}

/* Memory for n floats, or NULL. */
static float *allocate_floats(int64_t n) { return allocate_aligned(padded(n) * (int64_t)sizeof(float)); }

int nl_attention(const nl_attention_args *a, int threads) {
    if (!is_cached(a->format)) return NL_UNKNOWN_FORMAT;
    if (a->begin >= a->end) return 0;
    const kernels *kernel = chosen_kernels();
    const query_block earliest = query_block_at(a, 0);
    const int64_t blocks = a->B * a->K * query_blocks_per_head(a);
    const int64_t first_span = first_visible(a, &earliest, 0) / KV_SPAN;
    const int64_t spans = (a->S + KV_SPAN - 1) / KV_SPAN - first_span;
    const int64_t rows = earliest.rows, state_floats = softmax_state_floats(rows, a->Dh);
    /* Decode has one query block for each head, too few for many threads: then each span is a task. */
    const int64_t tasks_per_block = blocks == a->B * a->K ? spans : 1;
    float *states = allocate_floats(tasks_per_block > 1 ? blocks * tasks_per_block * state_floats : 1);
    int status = states ? 0 : NL_NO_MEMORY;
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *memory = allocate_floats(2 * state_floats + scratch_floats(rows));
        if (!memory) {
#pragma omp atomic write
            status = NL_NO_MEMORY;
        }
        /* Later queries see more positions, so tasks differ in their work: hence dynamic. */
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < blocks * tasks_per_block; task++) {
            if (!memory || !states) continue;
            const int64_t index = task / tasks_per_block;
            const query_block qb = query_block_at(a, index);
            const int64_t own_first = tasks_per_block > 1 ? first_span : first_visible(a, &qb, 0) / KV_SPAN;
            const int64_t begin = (own_first + task % tasks_per_block) * KV_SPAN;
            float *all = tasks_per_block > 1 ? states + task * state_floats : memory;
            float *span = memory + state_floats, *scratch = span + state_floats;
            kernel->attention(a, index, begin, all, scratch);
            if (tasks_per_block > 1) continue;
            for (int64_t j = begin + KV_SPAN; j < visible_positions(a, &qb, qb.rows - 1); j += KV_SPAN) {
                kernel->attention(a, index, j, span, scratch);
                merge_states(a, &qb, all, span, j);
            }
            write_output(a, &qb, all);
        }
#pragma omp for
        for (int64_t index = 0; index < (tasks_per_block > 1 && !status ? blocks : 0); index++) {
            const query_block qb = query_block_at(a, index);
            float *all = states + index * spans * state_floats;
            for (int64_t i = 1; i < spans; i++)
                merge_states(a, &qb, all, all + i * state_floats, (first_span + i) * KV_SPAN);
            write_output(a, &qb, all);
        }
        free_aligned(memory);
    }
    free_aligned(states);
    return status;
}

void nl_exp(float *y, const float *x, int64_t n) { chosen_kernels()->exp(y, x, n); }

/* ---------------------------------------------------------------- scalar: the definition in C */

void attention_scalar(const nl_attention_args *a, int64_t index, int64_t span_begin, float *memory,
                      float *scratch) {
    const query_block qb = query_block_at(a, index);
    const softmax_state state = softmax_state_in(memory, qb.rows, a->Dh);
    const float scale = 1 / sqrtf((float)a->Dh);
    (void)scratch;
    for (int64_t row = 0; row < qb.rows; row++) {
        const float *q = a->q + row_offset(a, &qb, row);
        float k[MAX_DH], v[MAX_DH], *o = state.o + row * padded(a->Dh);
        float m = -FLT_MAX, l = 0; /* -inf - -inf would be NaN */
        for (int64_t d = 0; d < a->Dh; d++) o[d] = 0;
        const int64_t seen_from = first_visible(a, &qb, row),
                      from = seen_from > span_begin ? seen_from : span_begin;
        for (int64_t j = from; j < span_begin + KV_SPAN && j < visible_positions(a, &qb, row); j++) {
            load_head(k, a->format, key_at(a->format, a, &qb, j), a->Dh);
            load_head(v, a->format, value_at(a->format, a, &qb, j), a->Dh);
            float score = 0;
            for (int64_t d = 0; d < a->Dh; d++) score += q[d] * k[d];
            score *= scale;
            const float higher = score > m ? score : m;
            const float before = exp_float(m - higher), here = exp_float(score - higher);
            for (int64_t d = 0; d < a->Dh; d++) o[d] = o[d] * before + here * v[d];
            l = l * before + here;
            m = higher;
        }
        state.m[row] = m, state.l[row] = l;
    }
}

void exp_scalar(float *y, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] = x[i] < -87.0f ? 0 : exp_float(x[i]);
}

#else
/* ---------------------------------------------------------------- vectors
 *
 * A query block walks its span one KV block at a time. Both products have the same micro-kernel:
 *
 *     scores   s (rows, KV_BLOCK)  =              q (rows, Dh)       @ k.T (Dh, KV_BLOCK), packed transposed
 *     output   o (rows, Dh)        =  alpha * o + p (rows, KV_BLOCK) @ v   (KV_BLOCK, Dh)
 *
 * A tile of TILE_ROWS x TILE_COLS sums stays in registers: MR x NR in BLIS. One step of the loop takes 2
 * loads, TILE_ROWS broadcasts and 2 * TILE_ROWS FMAs: the FMA units are the limit. Registers in use:
 *
 *                              sums             operands            AVX2            AVX-512
 *     attention_micro_kernel   2 * TILE_ROWS    2 of b, 1 of a      12 + 3 of 16    24 + 3 of 32
 *     decode_scores            LANES            LANES / 4 keys, q    8 + 3 of 16    16 + 5 of 32
 *
 *     prefill_block   many rows: keys and values are packed once for all rows of the query block
 *     decode_block    up to NL_GEMV_TOKENS tokens, F16 or Q8_0, Dh in whole tiles: memory is the limit.
 *                     Keys and values are read in place. The values are prefetched while the scores
 *                     are computed, and the next keys while the output is. Only these prefetches
 *                     assume that positions lie side by side, as in a KVCache.
 *
 * In Q8_0 a number is d * q, which is exact in float32. Prefill packs it, and decode computes it for keys.
 * For values decode multiplies p * d by q: one more product for each block, not for each number.
 *
 * The order of each sum decides its last bits. It never depends on the other rows:
 *
 *     s in prefill_block         ascending d
 *     s in decode_block          d = i, i + LANES, ... in lane i, then a tree over the lanes
 *     l                          KV blocks ascending; in a block as in decode_block's s
 *     o                          ascending positions
 *
 * So T may be cut into pieces of more than NL_GEMV_TOKENS without a change of bits, and in float32 into any
 * pieces. Positions that a row does not see get the score -inf. Their values are not read: 0 * NaN is NaN. */

enum { TILE_COLS = 2 * LANES, DECODE_KV_BLOCK = 64, DECODE_KEYS = LANES / 4 };

_Static_assert(PAD % TILE_COLS == 0, "o and the panels are read and written in whole tiles");
_Static_assert(KV_BLOCK <= MAX_DH, "a panel of keys or of values fits PAD * MAX_DH floats");
_Static_assert(KV_BLOCK % TILE_COLS == 0, "a row of s is written in whole tiles");
_Static_assert(MAX_DH % LANES == 0, "Dh in whole registers is at most MAX_DH");
_Static_assert(SMALL_TILE <= TILE_ROWS, "the micro-kernel keeps TILE_ROWS rows of sums");
_Static_assert(SMALL_TILE == 4, "decode_scores adds four registers at once, with vec_store_sums");
_Static_assert(DECODE_KV_BLOCK % DECODE_KEYS == 0, "decode_block takes DECODE_KEYS keys at a time");

/* e^x = 2^n e^r for |x| up to some hundred: n whole, r = x - n ln2, |r| <= ln2 / 2.
 * e^r = 1 + r + r^2 q(r). q is a fit by least squares at Chebyshev nodes, with weights that make its error
 * level. ln2 is the sum of two floats; n times the first one is exact. */
VEC_INLINE vec exp_parts(vec x, vec *n) {
    *n = vec_round(vec_mul(x, vec_all(1.44269504f)));
    vec r = vec_fma(*n, vec_all(-0.693145752f), x);
    r = vec_fma(*n, vec_all(-1.4286068e-6f), r);
    vec q = vec_all(0.0013814596f);
    q = vec_fma(q, r, vec_all(0.0083687175f));
    q = vec_fma(q, r, vec_all(0.04166839f));
    q = vec_fma(q, r, vec_all(0.16666521f));
    q = vec_fma(q, r, vec_all(0.49999994f));
    return vec_add(vec_fma(vec_mul(r, r), q, r), vec_all(1.0f));
}

/*     x             < -87   -87 .. 0     0   0 .. 88      > 88           NaN
 *     vec_exp(x)    0       1.01 ulp     1   1.01 ulp     not promised   NaN
 *
 * The largest error, of all floats: tests/robustness/instruments/exhaustive.py. */
VEC_INLINE vec vec_exp(vec x) {
    const vec lowest = vec_all(-87.0f);
    vec n;
    const vec p = exp_parts(vec_max(lowest, x), &n);
    return vec_zero_below(x, lowest, vec_times_2_to(n, p));
}

/* Elements d .. d + LANES - 1 of the row at p: a head, or a row of a panel. In Q8_0 they are q alone. */
VEC_INLINE vec load_lanes(const int format, const uint8_t *p, uint64_t d) {
    switch (format) {
    case F32: return vec_load(p + 4 * d);
    case F16: return vec_from_f16(p + 2 * d);
    }
    return vec_from_i8(p + d / QK * format_of(Q8_0).bytes + format_of(Q8_0).quants + d % QK);
}

/* The same; in Q8_0 they are d * q. */
VEC_INLINE vec load_scaled(const int format, const uint8_t *p, uint64_t d) {
    const vec x = load_lanes(format, p, d);
    return format == Q8_0 ? vec_mul(x, vec_all_f16(p + d / QK * format_of(Q8_0).bytes)) : x;
}

/* c (rows, TILE_COLS) = alpha * c + a (rows, n) @ b[:, d : d + TILE_COLS]. Where b is in Q8_0, it is q alone.
 * alpha has one number a row; NULL: c starts at 0. b_stride is in bytes. Unless `next` is NULL, as many bytes
 * as are read of b are prefetched from there. */
VEC_INLINE void attention_micro_kernel(const int rows, float *c, int64_t c_stride, const float *alpha,
                                       const float *a, const int64_t a_stride, const int format,
                                       const uint8_t *b, int64_t b_stride, int64_t d, int64_t n,
                                       const uint8_t *next) {
    const int64_t bytes = bytes_of(format, TILE_COLS);
    vec sum[TILE_ROWS][2];
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < 2; w++)
            sum[r][w] =
                alpha ? vec_mul(vec_all(alpha[r]), vec_load(c + r * c_stride + w * LANES)) : vec_zero();
    for (int64_t i = 0; i < n; i++, a++, b += b_stride) {
        const vec left = load_lanes(format, b, d), right = load_lanes(format, b, d + LANES);
        if (next) prefetch_to_l2(next + i * bytes, bytes);
        for (int r = 0; r < rows; r++) {
            const vec a_r = vec_all(a[r * a_stride]);
            sum[r][0] = vec_fma(a_r, left, sum[r][0]);
            sum[r][1] = vec_fma(a_r, right, sum[r][1]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < 2; w++) vec_store(c + r * c_stride + w * LANES, sum[r][w]);
}

/* A KV block: positions j .. j + n - 1, for all rows of a query block. */
typedef struct {
    const nl_attention_args *a;
    query_block qb;
    int64_t j, n;
    float *q;       /* (rows, MAX_DH)     scaled by 1 / sqrt(Dh) */
    float *s;       /* (rows, KV_BLOCK)   scores, then p = exp(s - m) */
    float *alpha;   /* (rows,)            exp(old m - new m) */
    float *row_sum; /* (rows,)            sum of p over the block */
    float *panel;   /* (Dh, TILE_COLS) keys, or (KV_BLOCK, TILE_COLS) values */
    softmax_state state;
} kv_block;

/* How many positions of the block a row sees. The padding rows behind the last see what the last one sees. */
VEC_INLINE int64_t visible_in_block(const kv_block *b, int64_t row) {
    const int64_t real_row = row < b->qb.rows ? row : b->qb.rows - 1;
    const int64_t left = visible_positions(b->a, &b->qb, real_row) - b->j;
    return left < 0 ? 0 : left < b->n ? left : b->n;
}

/* How many of its first positions a row does not see, because they are before its sliding window. */
VEC_INLINE int64_t hidden_in_block(const kv_block *b, int64_t row) {
    const int64_t real_row = row < b->qb.rows ? row : b->qb.rows - 1;
    const int64_t hidden = first_visible(b->a, &b->qb, real_row) - b->j;
    return hidden < 0 ? 0 : hidden < b->n ? hidden : b->n;
}

/* k[i] = the key of position `from` + i of the block; zeros behind the block's last. */
VEC_INLINE void key_pointers(const int format, const uint8_t *k[], int count, const kv_block *b,
                             int64_t from) {
    static const uint8_t zeros[4 * MAX_DH];
    for (int i = 0; i < count; i++)
        k[i] = from + i < b->n ? key_at(format, b->a, &b->qb, b->j + from + i) : zeros;
}

/* Lane l of x[i] = element d + i of key l, and 0 from Dh on. */
VEC_INLINE void load_transposed(vec x[LANES], const int format, const uint8_t *const k[LANES], int64_t d,
                                int64_t Dh) {
    if (d + LANES <= Dh) {
        for (int i = 0; i < LANES; i++) x[i] = load_scaled(format, k[i], d);
        vec_transpose(x);
        return;
    }
    float rest[LANES][LANES] = {{0}};
    for (int i = 0; i < LANES; i++)
        for (int64_t e = d; e < Dh; e++) rest[e - d][i] = load_element(format, k[i], e);
    for (int i = 0; i < LANES; i++) x[i] = vec_load(rest[i]);
}

/* scales[j][i] = the scale of block j of the head at `heads`, i positions behind it, and 0 from n on. */
VEC_INLINE void load_scales(float scales[][DECODE_KV_BLOCK], const uint8_t *heads, int64_t stride, int64_t n,
                            int64_t Dh) {
    uint16_t d[MAX_DH / QK][DECODE_KV_BLOCK] = {{0}};
    for (int64_t j = 0; j < Dh / QK; j++)
        for (int64_t i = 0; i < n; i++) d[j][i] = load_u16(heads + i * stride + bytes_of(Q8_0, j * QK));
    for (int64_t j = 0; j < Dh / QK; j++)
        for (int64_t i = 0; i < DECODE_KV_BLOCK; i += LANES) vec_store(scales[j] + i, vec_from_f16(d[j] + i));
}

/* s[row .. row + 3] = q[row .. row + 3] @ k.T, with the keys in place. The LANES sums of one step stay in
 * registers. Then each is added across its lanes. A key in Q8_0 is multiplied by its scales. */
VEC_INLINE void decode_scores(const int format, const kv_block *b, int64_t row,
                              float scales[][DECODE_KV_BLOCK]) {
    const int64_t Dh = b->a->Dh, step = format == Q8_0 ? QK : LANES, bytes = bytes_of(format, step);
    const uint8_t *k[DECODE_KEYS], *v = value_at(format, b->a, &b->qb, b->j);
    for (int64_t from = 0; from < b->n; from += DECODE_KEYS) {
        vec sum[DECODE_KEYS][SMALL_TILE];
        for (int i = 0; i < DECODE_KEYS; i++)
            for (int r = 0; r < SMALL_TILE; r++) sum[i][r] = vec_zero();
        key_pointers(format, k, DECODE_KEYS, b, from);
        for (int64_t j = 0; j < Dh / step; j++, v += DECODE_KEYS * bytes) {
            prefetch_to_l2(v, DECODE_KEYS * bytes);
            for (int64_t e = 0; e < step; e += LANES) {
                vec x[DECODE_KEYS];
                for (int i = 0; i < DECODE_KEYS; i++) {
                    x[i] = load_lanes(format, k[i] + j * bytes, e);
                    if (format == Q8_0) x[i] = vec_mul(x[i], vec_all(scales[j][from + i]));
                }
                for (int r = 0; r < SMALL_TILE; r++) {
                    const vec q = vec_load(b->q + (row + r) * MAX_DH + j * step + e);
                    for (int i = 0; i < DECODE_KEYS; i++) sum[i][r] = vec_fma(q, x[i], sum[i][r]);
                }
            }
        }
        for (int i = 0; i < DECODE_KEYS; i++) {
            float scores[SMALL_TILE];
            vec_store_sums(scores, sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
            for (int r = 0; r < SMALL_TILE; r++) b->s[(row + r) * KV_BLOCK + from + i] = scores[r];
        }
    }
}

/* panel[d][i] = element d of the key of position `from` + i, for TILE_COLS positions. */
VEC_INLINE void pack_keys_transposed(const int format, const kv_block *b, int64_t from) {
    const uint8_t *k[LANES];
    vec x[LANES];
    for (int64_t half = 0; half < TILE_COLS; half += LANES) {
        key_pointers(format, k, LANES, b, from + half);
        for (int64_t d = 0; d < b->a->Dh; d += LANES) {
            load_transposed(x, format, k, d, b->a->Dh);
            for (int i = 0; i < LANES; i++) vec_store(b->panel + (d + i) * TILE_COLS + half, x[i]);
        }
    }
}

/* panel[i][e] = element d + e of the value of the block's position i, for TILE_COLS elements; 0 from Dh on.
 */
VEC_INLINE void pack_values(const int format, const kv_block *b, int64_t d) {
    for (int64_t i = 0; i < b->n; i++) {
        const uint8_t *v = value_at(format, b->a, &b->qb, b->j + i);
        float *to = b->panel + i * TILE_COLS;
        if (d + TILE_COLS <= b->a->Dh)
            for (int e = 0; e < TILE_COLS; e += LANES) vec_store(to + e, load_scaled(format, v, d + e));
        else
            for (int e = 0; e < TILE_COLS; e++) to[e] = d + e < b->a->Dh ? load_element(format, v, d + e) : 0;
    }
}

/* s becomes p = exp(s - new m); alpha = exp(m - new m); l = alpha * l + rowsum(p); m = new m. */
VEC_INLINE void online_softmax(const kv_block *b) {
    for (int64_t row = 0; row < b->qb.rows; row++) {
        float *s = b->s + row * KV_BLOCK;
        const int64_t n = visible_in_block(b, row), whole = (n + LANES - 1) / LANES * LANES;
        for (int64_t i = n; i < whole; i++) s[i] = -INFINITY;
        for (int64_t i = hidden_in_block(b, row) - 1; i >= 0; i--) s[i] = -INFINITY;
        vec largest = vec_all(b->state.m[row]), row_sum = vec_zero();
        for (int64_t i = 0; i < whole; i += LANES) largest = vec_max(largest, vec_load(s + i));
        const float new_m = vec_largest(largest);
        for (int64_t i = 0; i < whole; i += LANES) {
            const vec p = vec_exp(vec_sub(vec_load(s + i), vec_all(new_m)));
            vec_store(s + i, p);
            row_sum = vec_add(row_sum, p);
        }
        b->alpha[row] = b->state.m[row] - new_m;
        b->row_sum[row] = vec_sum(row_sum);
        b->state.m[row] = new_m;
    }
    for (int64_t row = 0; row < b->qb.rows; row += LANES) {
        const vec alpha = vec_exp(vec_load(b->alpha + row));
        vec_store(b->alpha + row, alpha);
        vec_store(b->state.l + row, vec_fma(vec_load(b->state.l + row), alpha, vec_load(b->row_sum + row)));
    }
}

/* s[row .. row + rows - 1][from .. from + TILE_COLS - 1], unless the last of these rows sees none of them. */
VEC_INLINE void prefill_scores(const int rows, const kv_block *b, int64_t row, int64_t from) {
    if (from < visible_in_block(b, row + rows - 1))
        attention_micro_kernel(rows, b->s + row * KV_BLOCK + from, KV_BLOCK, NULL, b->q + row * MAX_DH,
                               MAX_DH, F32, (const uint8_t *)b->panel, TILE_COLS * sizeof(float), 0, b->a->Dh,
                               NULL);
}

/* o = alpha * o + p @ v, for elements d .. d + TILE_COLS - 1 of some rows. They are elements v_d and so on of
 * the rows of v. One tile takes the positions that all rows see. On the diagonal each row then adds the
 * others that it sees. Where a sliding window begins at another position for each row, each adds its own. */
VEC_INLINE void accumulate_output(const int rows, const kv_block *b, int64_t row, int64_t d, const float *p,
                                  const int64_t p_stride, const int format, const uint8_t *v,
                                  int64_t v_stride, int64_t v_d, const uint8_t *next) {
    const int64_t o_stride = padded(b->a->Dh), all_see = visible_in_block(b, row);
    const int64_t hidden = hidden_in_block(b, row);
    const float one = 1;
    float *o = b->state.o + row * o_stride + d;
    if (hidden_in_block(b, row + rows - 1) != hidden) {
        for (int r = 0; r < rows; r++) {
            const int64_t from = hidden_in_block(b, row + r);
            attention_micro_kernel(1, o + r * o_stride, o_stride, b->alpha + row + r, p + r * p_stride + from,
                                   p_stride, format, v + from * v_stride, v_stride, v_d,
                                   visible_in_block(b, row + r) - from, NULL);
        }
        return;
    }
    attention_micro_kernel(rows, o, o_stride, b->alpha + row, p + hidden, p_stride, format,
                           v + hidden * v_stride, v_stride, v_d, all_see - hidden, next);
    if (visible_in_block(b, row + rows - 1) == all_see) return;
    for (int r = 0; r < rows; r++)
        attention_micro_kernel(1, o + r * o_stride, o_stride, &one, p + r * p_stride + all_see, p_stride,
                               format, v + all_see * v_stride, v_stride, v_d,
                               visible_in_block(b, row + r) - all_see, NULL);
}

VEC_INLINE void decode_block(const int format, const kv_block *b) {
    const nl_attention_args *a = b->a;
    const int64_t rows = b->qb.rows, v_stride = bytes_of(format, a->v_strides[1]);
    const uint8_t *v = value_at(format, a, &b->qb, b->j);
    const uint8_t *next_k = key_at(format, a, &b->qb, b->j + DECODE_KV_BLOCK);
    float scales[MAX_DH / QK][DECODE_KV_BLOCK], p_scaled[SMALL_TILE][DECODE_KV_BLOCK];
    if (format == Q8_0)
        load_scales(scales, key_at(format, a, &b->qb, b->j), bytes_of(format, a->k_strides[1]), b->n, a->Dh);
    for (int64_t row = 0; row < rows; row += SMALL_TILE) decode_scores(format, b, row, scales);
    online_softmax(b);
    if (format == Q8_0) load_scales(scales, v, v_stride, b->n, a->Dh);
    for (int64_t d = 0; d < a->Dh; d += TILE_COLS)
        for (int64_t row = 0; row < rows; row += SMALL_TILE) {
            const float *p = b->s + row * KV_BLOCK;
            for (int r = 0; r < (format == Q8_0 ? SMALL_TILE : 0); r++)
                for (int i = 0; i < DECODE_KV_BLOCK; i += LANES)
                    vec_store(p_scaled[r] + i,
                              vec_mul(vec_load(p + r * KV_BLOCK + i), vec_load(scales[d / QK] + i)));
            accumulate_output(SMALL_TILE, b, row, d, format == Q8_0 ? p_scaled[0] : p,
                              format == Q8_0 ? DECODE_KV_BLOCK : KV_BLOCK, format, v, v_stride, d,
                              next_k + bytes_of(format, d * DECODE_KV_BLOCK));
        }
}

VEC_INLINE void prefill_block(const int format, const kv_block *b) {
    const uint8_t *panel = (const uint8_t *)b->panel;
    const int64_t rows = b->qb.rows, in_tiles = rows / TILE_ROWS * TILE_ROWS;
    const int64_t panel_stride = TILE_COLS * sizeof(float);
    for (int64_t from = 0; from < b->n; from += TILE_COLS) {
        pack_keys_transposed(format, b, from);
        for (int64_t row = 0; row < in_tiles; row += TILE_ROWS) prefill_scores(TILE_ROWS, b, row, from);
        for (int64_t row = in_tiles; row < rows; row += SMALL_TILE) prefill_scores(SMALL_TILE, b, row, from);
    }
    online_softmax(b);
    for (int64_t d = 0; d < b->a->Dh; d += TILE_COLS) {
        pack_values(format, b, d);
        for (int64_t row = 0; row < in_tiles; row += TILE_ROWS)
            accumulate_output(TILE_ROWS, b, row, d, b->s + row * KV_BLOCK, KV_BLOCK, F32, panel, panel_stride,
                              0, NULL);
        for (int64_t row = in_tiles; row < rows; row += SMALL_TILE)
            accumulate_output(SMALL_TILE, b, row, d, b->s + row * KV_BLOCK, KV_BLOCK, F32, panel,
                              panel_stride, 0, NULL);
    }
}

VEC_TARGET void VEC(attention)(const nl_attention_args *a, int64_t index, int64_t span_begin, float *memory,
                               float *scratch) {
    kv_block b = {.a = a, .qb = query_block_at(a, index), .j = span_begin, .q = scratch};
    const int64_t rows = b.qb.rows + PAD_ROWS, visible = visible_positions(a, &b.qb, b.qb.rows - 1);
    const int64_t span_end = visible < span_begin + KV_SPAN ? visible : span_begin + KV_SPAN;
    const float scale = 1 / sqrtf((float)a->Dh);
    b.state = softmax_state_in(memory, b.qb.rows, a->Dh);
    b.s = b.q + rows * MAX_DH;
    b.alpha = b.s + rows * KV_BLOCK, b.row_sum = b.alpha + padded(rows), b.panel = b.row_sum + padded(rows);
    memset(memory, 0, softmax_state_floats(b.qb.rows, a->Dh) * sizeof(float));
    memset(scratch, 0, (b.panel - scratch) * sizeof(float));
    for (int64_t row = 0; row < rows; row++) b.state.m[row] = -FLT_MAX;
    for (int64_t row = 0; row < b.qb.rows; row++) {
        const float *q = a->q + row_offset(a, &b.qb, row);
        for (int64_t d = 0; d < a->Dh; d++) b.q[row * MAX_DH + d] = q[d] * scale;
    }
    const int decode = a->format != F32 && a->T <= NL_GEMV_TOKENS && a->Dh % TILE_COLS == 0;
    const int64_t step = decode ? DECODE_KV_BLOCK : KV_BLOCK, seen_from = first_visible(a, &b.qb, 0);
    if (seen_from > b.j) b.j += (seen_from - b.j) / step * step;
    if (a->dropped > b.j) b.j = a->dropped;
    for (; b.j < span_end; b.j += step) {
        b.n = span_end - b.j < step ? span_end - b.j : step;
        switch (a->format) {
        case F32: prefill_block(F32, &b); break;
        case F16: decode ? decode_block(F16, &b) : prefill_block(F16, &b); break;
        case Q8_0: decode ? decode_block(Q8_0, &b) : prefill_block(Q8_0, &b); break;
        }
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

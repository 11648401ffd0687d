/* lora: the update of a weight by LoRA, y += scale * x @ a.T @ b.T, and its gradients.
 *
 *     low  = scale * x @ a.T        (T, r)        x (T, IN)     a (r, IN)
 *     y   += low @ b.T              (T, OUT)                    b (OUT, r)
 *
 *     dlow = scale * dy @ b         (T, r)        dy (T, OUT)
 *     dx  += dlow @ a               (T, IN)
 *     da   = dlow.T @ x             (r, IN)
 *     db   = dy.T @ low             (OUT, r)
 *
 * The rank r is small: a number of x, y, dx or dy takes part in r multiply-adds only. So memory is the limit.
 * linear_backward.c would first copy the wide array into panels. Three kernels make all six products without
 * a copy. b is transposed for them.
 *
 *     project         low (T, r)   = scale * x (T, N) @ a (r, N).T        of x and a, and of dy and b.T
 *     update          y (T, N)    += low (T, r) @ b (r, N)                of y and b.T, and of dx and a
 *     low_gradient    da (r, N)    = low (T, r).T @ x (T, N)              da, and db.T of low and dy
 *
 * One thread computes all of them for a chunk of NL_LORA_TOKENS tokens, which stays in its L2. Each chunk has
 * its own sum for da and db. They are added in the order of the chunks. So neither threads nor cuts between
 * chunks change a bit.
 *
 * Compiled once as it stands: the loops over threads and the scalar forms. Compiled once more for each
 * instruction set: the part under VECTOR_FORMS (README.md). tests/kernels/test_lora_backward.py compares
 * every form with NumPy. layer.c has the same update in blocks of a model that does not learn. */
#include <stdlib.h>

#include "dispatch.h"
#include "formats.h"
#include "vec.h"

#ifndef VECTOR_FORMS

/* Chunks of each thread that have sums in memory at a time; numbers of a sum that one thread adds. */
enum { CHUNKS = 4, PIECE = 1 << 10 };

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t chunks_of(int64_t T) { return (T + NL_LORA_TOKENS - 1) / NL_LORA_TOKENS; }

/* The threads that call these three functions share the loops: parts of OUT, or of n. */
static void transpose(float *to, const float *b, int64_t OUT, int64_t r) {
#pragma omp for
    for (int64_t o = 0; o < OUT; o++)
        for (int64_t i = 0; i < r; i++) to[i * OUT + o] = b[o * r + i];
}

static void transpose_back(float *b, const float *from, int64_t OUT, int64_t r) {
#pragma omp for
    for (int64_t o = 0; o < OUT; o++)
        for (int64_t i = 0; i < r; i++) b[o * r + i] = from[i * OUT + o];
}

/* to += the first n numbers of each chunk; chunks lie `stride` apart. */
static void add_chunks(float *to, const float *from, int64_t n, int64_t stride, int64_t chunks) {
#pragma omp for
    for (int64_t begin = 0; begin < n; begin += PIECE)
        for (int64_t c = 0; c < chunks; c++)
            for (int64_t j = begin; j < smaller(n, begin + PIECE); j++) to[j] += from[c * stride + j];
}

int nl_add_lora(float *y, const float *x, const nl_lora_part *p, int64_t T, int threads) {
    const kernels *kernel = chosen_kernels();
    const int64_t IN = p->IN, OUT = p->OUT, r = p->r;
    float *b = malloc((size_t)((OUT + T) * r + 1) * sizeof(float));
    if (!b) return NL_NO_MEMORY;
    float *low = b + OUT * r;
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        transpose(b, p->b, OUT, r);
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < T; t += NL_LORA_TOKENS) {
            const int64_t n = smaller(NL_LORA_TOKENS, T - t);
            kernel->project(low + t * r, x + t * IN, p->a, p->scale, n, r, IN);
            kernel->update(y + t * OUT, low + t * r, b, n, r, OUT, (range){0, OUT});
        }
    }
    free(b);
    return 0;
}

int nl_lora_backward(const nl_lora_gradients *g, const nl_lora_part *p, int64_t T, int threads) {
    const kernels *kernel = chosen_kernels();
    const int64_t IN = p->IN, OUT = p->OUT, r = p->r, at_once = smaller(CHUNKS * threads, chunks_of(T));
    const int64_t stride = r * (IN + OUT + 2 * NL_LORA_TOKENS); /* of a chunk: da, db.T, low, dlow */
    float *b = malloc((size_t)(2 * OUT * r + at_once * stride + 1) * sizeof(float));
    if (!b) return NL_NO_MEMORY;
    float *db = b + OUT * r, *chunks = db + OUT * r; /* b and db are transposed */
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        transpose(b, p->b, OUT, r);
        transpose(db, g->db, OUT, r);
        for (int64_t begin = 0; begin < T; begin += at_once * NL_LORA_TOKENS) {
            const int64_t end = smaller(T, begin + at_once * NL_LORA_TOKENS);
            const int64_t n_chunks = chunks_of(end - begin);
#pragma omp for schedule(dynamic)
            for (int64_t c = 0; c < n_chunks; c++) {
                const int64_t t = begin + c * NL_LORA_TOKENS, n = smaller(NL_LORA_TOKENS, end - t);
                const float *x = g->x + t * IN, *dy = g->dy + t * OUT;
                float *da = chunks + c * stride, *low = da + r * (IN + OUT), *dlow = low + NL_LORA_TOKENS * r;
                kernel->project(low, x, p->a, p->scale, n, r, IN);
                kernel->project(dlow, dy, b, p->scale, n, r, OUT);
                kernel->update(g->dx + t * IN, dlow, p->a, n, r, IN, (range){0, IN});
                kernel->low_gradient(da, dlow, x, n, r, IN, (range){0, IN});
                kernel->low_gradient(da + r * IN, low, dy, n, r, OUT, (range){0, OUT});
            }
            add_chunks(g->da, chunks, r * IN, stride, n_chunks);
            add_chunks(db, chunks + r * IN, r * OUT, stride, n_chunks);
        }
        transpose_back(g->db, db, OUT, r);
    }
    free(b);
    return 0;
}

/* ---------------------------------------------------------------- scalar: the definition in C */

/* low (T, r) = scale * x (T, N) @ a.T, with a (r, N) */
void project_scalar(float *low, const float *x, const float *a, float scale, int64_t T, int64_t r,
                    int64_t N) {
    for (int64_t t = 0; t < T; t++)
        for (int64_t i = 0; i < r; i++) {
            float sum = 0;
            for (int64_t j = 0; j < N; j++) sum += x[t * N + j] * a[i * N + j];
            low[t * r + i] = scale * sum;
        }
}

/* y[:, columns] += low @ b[:, columns], with y (T, N), low (T, r), b (r, N) */
void update_scalar(float *y, const float *low, const float *b, int64_t T, int64_t r, int64_t N,
                   range columns) {
    for (int64_t t = 0; t < T; t++)
        for (int64_t j = columns.begin; j < columns.end; j++) {
            float sum = 0;
            for (int64_t i = 0; i < r; i++) sum += low[t * r + i] * b[i * N + j];
            y[t * N + j] += sum;
        }
}

/* da[:, columns] = low.T @ x[:, columns], with da (r, N), low (T, r), x (T, N) */
void low_gradient_scalar(float *da, const float *low, const float *x, int64_t T, int64_t r, int64_t N,
                         range columns) {
    for (int64_t i = 0; i < r; i++) {
        for (int64_t j = columns.begin; j < columns.end; j++) da[i * N + j] = 0;
        for (int64_t t = 0; t < T; t++)
            for (int64_t j = columns.begin; j < columns.end; j++)
                da[i * N + j] += low[t * r + i] * x[t * N + j];
    }
}

#else
/* ---------------------------------------------------------------- vectors
 *
 * A tile has 16 sums with AVX-512, 8 with AVX2, and loads 8 or 6 numbers or registers for as many FMAs. So
 * the FMA units are the limit while the wide array comes from the caches. Columns behind the last register
 * are those of the scalar form. */

enum { RANKS = 4, TOKENS = TILE_ROWS / 3, WIDTH = TILE_ROWS / 3 }; /* of a tile; WIDTH is in registers */

INLINE const float *row_or_last(const float *a, int64_t i, int64_t r, int64_t N) {
    return a + (i < r ? i : r - 1) * N;
}

/* Some tokens, and ranks i .. i + RANKS - 1. */
VEC_INLINE void project_tile(const int tokens, float *low, const float *x, const float *a, float scale,
                             int64_t i, int64_t r, int64_t N) {
    const float *row[RANKS];
    vec sum[TOKENS][RANKS];
    for (int k = 0; k < RANKS; k++) row[k] = row_or_last(a, i + k, r, N);
    for (int t = 0; t < tokens; t++)
        for (int k = 0; k < RANKS; k++) sum[t][k] = vec_zero();
    int64_t j = 0;
    for (; j + LANES <= N; j += LANES) {
        vec a_j[RANKS];
        for (int k = 0; k < RANKS; k++) a_j[k] = vec_load(row[k] + j);
        for (int t = 0; t < tokens; t++) {
            const vec x_j = vec_load(x + t * N + j);
            for (int k = 0; k < RANKS; k++) sum[t][k] = vec_fma(x_j, a_j[k], sum[t][k]);
        }
    }
    for (int t = 0; t < tokens; t++) {
        float sums[RANKS];
        vec_store_sums(sums, sum[t][0], sum[t][1], sum[t][2], sum[t][3]);
        for (int k = 0; k < min(RANKS, r - i); k++) {
            for (int64_t l = j; l < N; l++) sums[k] += x[t * N + l] * row[k][l];
            low[t * r + i + k] = scale * sums[k];
        }
    }
}

VEC_TARGET void VEC(project)(float *low, const float *x, const float *a, float scale, int64_t T, int64_t r,
                             int64_t N) {
    int64_t t = 0;
    for (; t + TOKENS <= T; t += TOKENS)
        for (int64_t i = 0; i < r; i += RANKS)
            project_tile(TOKENS, low + t * r, x + t * N, a, scale, i, r, N);
    for (; t < T; t++)
        for (int64_t i = 0; i < r; i += RANKS) project_tile(1, low + t * r, x + t * N, a, scale, i, r, N);
}

VEC_INLINE void update_tile(const int tokens, const int width, float *y, const float *low, const float *b,
                            int64_t r, int64_t N) {
    vec sum[TOKENS][WIDTH];
    for (int t = 0; t < tokens; t++)
        for (int h = 0; h < width; h++) sum[t][h] = vec_zero();
    for (int64_t i = 0; i < r; i++) {
        vec b_i[WIDTH];
        for (int h = 0; h < width; h++) b_i[h] = vec_load(b + i * N + h * LANES);
        for (int t = 0; t < tokens; t++) {
            const vec one = vec_all(low[t * r + i]);
            for (int h = 0; h < width; h++) sum[t][h] = vec_fma(one, b_i[h], sum[t][h]);
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int h = 0; h < width; h++) {
            float *to = y + t * N + h * LANES;
            vec_store(to, vec_add(vec_load(to), sum[t][h]));
        }
}

VEC_INLINE void update_token_tile(const int tokens, float *y, const float *low, const float *b, int64_t r,
                                  int64_t N, range columns) {
    int64_t j = columns.begin;
    for (; j + WIDTH * LANES <= columns.end; j += WIDTH * LANES)
        update_tile(tokens, WIDTH, y + j, low, b + j, r, N);
    for (; j + LANES <= columns.end; j += LANES) update_tile(tokens, 1, y + j, low, b + j, r, N);
    update_scalar(y, low, b, tokens, r, N, (range){j, columns.end});
}

VEC_TARGET void VEC(update)(float *y, const float *low, const float *b, int64_t T, int64_t r, int64_t N,
                            range columns) {
    int64_t t = 0;
    for (; t + TOKENS <= T; t += TOKENS) update_token_tile(TOKENS, y + t * N, low + t * r, b, r, N, columns);
    for (; t < T; t++) update_token_tile(1, y + t * N, low + t * r, b, r, N, columns);
}

/* Some columns, and ranks i .. i + RANKS - 1. */
VEC_INLINE void low_gradient_tile(const int width, float *da, const float *low, const float *x, int64_t T,
                                  int64_t i, int64_t r, int64_t N) {
    const float *column[RANKS];
    vec sum[RANKS][WIDTH];
    for (int k = 0; k < RANKS; k++) column[k] = row_or_last(low, i + k, r, 1);
    for (int k = 0; k < RANKS; k++)
        for (int h = 0; h < width; h++) sum[k][h] = vec_zero();
    for (int64_t t = 0; t < T; t++) {
        vec x_t[WIDTH];
        for (int h = 0; h < width; h++) x_t[h] = vec_load(x + t * N + h * LANES);
        for (int k = 0; k < RANKS; k++) {
            const vec one = vec_all(column[k][t * r]);
            for (int h = 0; h < width; h++) sum[k][h] = vec_fma(one, x_t[h], sum[k][h]);
        }
    }
    for (int k = 0; k < min(RANKS, r - i); k++)
        for (int h = 0; h < width; h++) vec_store(da + (i + k) * N + h * LANES, sum[k][h]);
}

VEC_TARGET void VEC(low_gradient)(float *da, const float *low, const float *x, int64_t T, int64_t r,
                                  int64_t N, range columns) {
    int64_t j = columns.begin;
    for (; j + WIDTH * LANES <= columns.end; j += WIDTH * LANES)
        for (int64_t i = 0; i < r; i += RANKS) low_gradient_tile(WIDTH, da + j, low, x + j, T, i, r, N);
    for (; j + LANES <= columns.end; j += LANES)
        for (int64_t i = 0; i < r; i += RANKS) low_gradient_tile(1, da + j, low, x + j, T, i, r, N);
    low_gradient_scalar(da, low, x, T, r, N, (range){j, columns.end});
}
#endif

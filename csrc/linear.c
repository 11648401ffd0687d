/* linear: y = x @ w.T, with the weights in the bytes in which they are stored.
 *
 *            IN                         IN                      OUT
 *      +-----------+              +-----------+            +-----------+
 *    T |     x     |          OUT |     w     |          T |     y     |
 *      +-----------+              |  row by   |            +-----------+
 *        float32                  |    row    |              float32
 *                                 +-----------+
 *
 * Both x and w lie dense along IN, so one output is the dot product of two streams. A weight is
 * unpacked to exactly the float32 that numpy_llama/quantize.py says it is, and multiplied as float32.
 * Threads share out the rows of w.
 *
 * This file is compiled three times: as it is, for the loop over threads and the scalar form; and from
 * avx2.c and avx512.c, which define LANES, for the vector form below. tests/test_kernels.py holds every
 * form to NumPy, and any split of T, of the rows and of the threads to the same bits. */
#include "dispatch.h"
#include "kernels.h"
#include "vec.h"

#ifndef LANES
#ifdef _OPENMP
#include <omp.h>
#endif

void nl_linear(float *y, const float *x, const void *w, int format, int64_t T, int64_t OUT, int64_t IN,
               int64_t begin, int64_t end, int threads) {
    const linear_args a = {x, w, y, format, T, OUT, IN};
    const kernels *k = chosen_kernels();
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            int64_t n = omp_get_num_threads(), i = omp_get_thread_num();
            int64_t share = ((end - begin + n - 1) / n + 3) / 4 * 4; /* whole groups of 4 rows */
            int64_t from = begin + i * share, to = from + share;
            if (from < end) k->linear(&a, from, to < end ? to : end);
        }
        return;
    }
#endif
    (void)threads;
    k->linear(&a, begin, end);
}

/* ---------------------------------------------------------------- scalar: the definition in C */

INLINE void rows_scalar(const int format, const linear_args *a, int64_t begin, int64_t end) {
    const int64_t weights = block_weights(format), bytes = block_bytes(format), blocks = a->IN / weights;
    for (int64_t r = begin; r < end; r++) {
        for (int64_t t = 0; t < a->T; t++) a->y[t * a->OUT + r] = 0;
        for (int64_t b = 0; b < blocks; b++) {
            float w[QK_K];
            for (int s = 0; s < weights / 16; s++)
                for (int i = 0; i < 16; i++)
                    w[16 * s + i] = weight(format, a->w + (r * blocks + b) * bytes, s, i);
            for (int64_t t = 0; t < a->T; t++) {
                const float *x = (const float *)a->x + t * a->IN + b * weights;
                float sum = a->y[t * a->OUT + r];
                for (int i = 0; i < weights; i++) sum += w[i] * x[i];
                a->y[t * a->OUT + r] = sum;
            }
        }
    }
}

void linear_scalar(const linear_args *a, int64_t begin, int64_t end) {
#define CASE(FORMAT)                                                                                         \
    case FORMAT: rows_scalar(FORMAT, a, begin, end); break;
    switch (a->format) { EACH_FORMAT(CASE) }
#undef CASE
}

#else
/* ---------------------------------------------------------------- vectors
 *
 * The same sum in a fixed order: IN is cut into chunks; inside a chunk every lane adds every LANES-th
 * product, ascending; the lanes are summed in one tree (vec_sums); the chunks are added in ascending
 * order. One token or many, any number of threads: every output sees this order, so its bits never change.
 *
 * One token (decode): each weight is used once. Unpack in registers and multiply at once; four rows
 * together, because one row's chain of additions would wait for each FMA (4 cycles) to end. The four lie
 * a quarter of the thread's share apart: memory is read fastest as a few long streams, and four short rows
 * side by side are not seen as such (SmolLM2's output matrix: 4 GB/s a thread so, 12 GB/s in quarters).
 *
 * Many tokens (prefill): each weight is used T times. Unpack 16 rows of a chunk into `panel` (32 or 64 KB,
 * it stays in the first or second level of the cache) and run the tile over it:
 *
 *     AVX2     4 rows x 3 tokens = 12 accumulators; a step loads 4 + 3 registers and does 12 FMAs:
 *              7 loads take 3.5 cycles, 12 FMAs take 6, so the FMAs set the pace
 *     AVX-512  4 rows x 6 tokens = 24 accumulators, 10 loads (5 cycles), 24 FMAs (12 cycles)
 *
 * Accumulators, the tokens of the step and one row are all the 16 (of 32) registers there are. Tokens go
 * in blocks of 192, whose chunk of x stays in the second level while all panels pass by. */

/* A chunk is whole blocks of every format. */
enum { CHUNK = 64 * LANES, PANEL_ROWS = 16, TOKEN_BLOCK = 192, PARTS = 16 / LANES };

/* A K format's weights are d * q + m, with d and m of the 16 (Q4_K, Q5_K: 8) sub-blocks of their block. */
typedef struct {
    float d[16], m[16];
} scales;

WORD void unpack_scales(const int format, scales *to, const uint8_t *p) {
    if (format == Q4_K || format == Q5_K) {
        /* k_scale and k_minimum of four j at once, each in its own byte of 32 bits. */
        const uint32_t low = load_u32(p + 4), middle = load_u32(p + 8), high = load_u32(p + 12);
        const uint32_t upper_sc = (high & 0x0f0f0f0f) | (low >> 2 & 0x30303030);
        const uint32_t upper_m = (high >> 4 & 0x0f0f0f0f) | (middle >> 2 & 0x30303030);
        const vec sc = vec_from_8_bytes((low & 0x3f3f3f3f) | (uint64_t)upper_sc << 32);
        const vec m = vec_from_8_bytes((middle & 0x3f3f3f3f) | (uint64_t)upper_m << 32);
        vec_store(to->d, vec_mul(vec_all_f16(p), sc));
        vec_store(to->m, vec_mul(vec_mul(vec_all(-1), vec_all_f16(p + 2)), m));
    }
    if (format == Q6_K)
        for (int i = 0; i < 16; i += LANES) {
            const vec d = vec_mul(vec_all_f16(p + 208), vec_from_i8(p + 192 + i));
            vec_store(to->d + i, d);
            vec_store(to->m + i, vec_mul(vec_all(-32), d));
        }
}

/* Weights 16 s .. 16 s + 15 of the block at p: `weight` of vec.h, LANES at a time. */
WORD void unpack(const int format, vec w[PARTS], const uint8_t *p, const scales *k, int s) {
    const uint8_t *const dense = p + 16 * s * block_bytes(format) / QK; /* formats of single numbers */
    vec d = vec_zero(), m = vec_zero();
    bytes16 q;
    switch (format) {
    case F32:
        for (int i = 0; i < PARTS; i++) w[i] = vec_load(dense + 4 * LANES * i);
        return;
    case F16:
        for (int i = 0; i < PARTS; i++) w[i] = vec_from_f16(dense + 2 * LANES * i);
        return;
    case BF16:
        for (int i = 0; i < PARTS; i++) w[i] = vec_from_bf16(dense + 2 * LANES * i);
        return;
    case Q8_0:
        for (int i = 0; i < PARTS; i++)
            w[i] = vec_mul(vec_all_f16(p), vec_from_i8(p + 2 + 16 * s + LANES * i));
        return;
    /* All others are d * q + m, where for example Q4_0 has m = -8 d. A scale has 11 bits, times sc at most
     * 18, times q at most 24: all products are exact, so one FMA rounds as NumPy does. */
    case Q4_0: q = field(load_bytes16(p + 2), 4 * s, 15); break;
    case Q4_1: q = field(load_bytes16(p + 4), 4 * s, 15); break;
    case Q5_0: q = plus_fifth_bits(field(load_bytes16(p + 6), 4 * s, 15), load_u16(p + 2 + 2 * s)); break;
    case Q5_1: q = plus_fifth_bits(field(load_bytes16(p + 8), 4 * s, 15), load_u16(p + 4 + 2 * s)); break;
    case Q4_K: q = field(load_bytes16(p + 16 + s / 4 * 32 + s % 2 * 16), s / 2 % 2 * 4, 15); break;
    case Q5_K:
        q = join(field(load_bytes16(p + 48 + s / 4 * 32 + s % 2 * 16), s / 2 % 2 * 4, 15),
                 field(load_bytes16(p + 16 + s % 2 * 16), s / 2, 1));
        break;
    case Q6_K:
        q = join(field(load_bytes16(p + s / 8 * 64 + s % 4 * 16), s / 4 % 2 * 4, 15),
                 field(load_bytes16(p + 128 + s / 8 * 32 + s % 2 * 16), s / 2 % 4 * 2, 3));
        break;
    }
    switch (format) {
    case Q4_0: d = vec_all_f16(p), m = vec_mul(d, vec_all(-8)); break;
    case Q5_0: d = vec_all_f16(p), m = vec_mul(d, vec_all(-16)); break;
    case Q4_1:
    case Q5_1: d = vec_all_f16(p), m = vec_all_f16(p + 2); break;
    case Q4_K:
    case Q5_K: d = vec_all(k->d[s / 2]), m = vec_all(k->m[s / 2]); break;
    case Q6_K: d = vec_all(k->d[s]), m = vec_all(k->m[s]); break;
    }
    for (int i = 0; i < PARTS; i++) w[i] = vec_fma(vec_from_bytes16(q, LANES * i), d, m);
}

WORD void one_token(const int format, const linear_args *a, int64_t begin, int64_t end) {
    const int64_t weights = block_weights(format), bytes = block_bytes(format);
    const int64_t blocks = a->IN / weights, quarter = (end - begin + 3) / 4;
    for (int64_t r = begin; r < begin + quarter; r++) {
        const uint8_t *w[4];
        for (int i = 0; i < 4; i++) {
            const int64_t row = r + i * quarter;
            w[i] = a->w + (row < end ? row : end - 1) * blocks * bytes;
        }
        __m128 y = _mm_setzero_ps();
        for (int64_t c = 0; c < a->IN; c += CHUNK) {
            const int64_t c_end = c + CHUNK < a->IN ? c + CHUNK : a->IN;
            vec sum[4] = {vec_zero(), vec_zero(), vec_zero(), vec_zero()};
            for (int64_t k = c; k < c_end; k += weights) {
                scales s[4];
                for (int i = 0; i < 4; i++) unpack_scales(format, &s[i], w[i] + k / weights * bytes);
                for (int j = 0; j < weights / 16; j++)
                    for (int i = 0; i < 4; i++) {
                        vec u[PARTS];
                        unpack(format, u, w[i] + k / weights * bytes, &s[i], j);
                        for (int l = 0; l < PARTS; l++)
                            sum[i] =
                                vec_fma(u[l], vec_load((const float *)a->x + k + 16 * j + LANES * l), sum[i]);
                    }
            }
            y = _mm_add_ps(y, vec_sums(sum[0], sum[1], sum[2], sum[3]));
        }
        float four[4];
        _mm_storeu_ps(four, y);
        for (int i = 0; i < 4; i++)
            if (r + i * quarter < end) a->y[r + i * quarter] = four[i];
    }
}

/* y[t .. t + tokens, r .. r + rows] += x[t.., c .. c + n] @ panel.T, of whose 4 rows `rows` are real. */
WORD void tile(const int tokens, const linear_args *a, const float *panel, int64_t c, int64_t n, int64_t r,
               int64_t rows, int64_t t) {
    vec sum[TILE_TOKENS][4];
    for (int i = 0; i < tokens; i++)
        for (int j = 0; j < 4; j++) sum[i][j] = vec_zero();
    const float *x = (const float *)a->x + t * a->IN + c;
    for (int64_t k = 0; k < n; k += LANES)
        for (int j = 0; j < 4; j++) {
            const vec w = vec_load(panel + j * CHUNK + k);
            for (int i = 0; i < tokens; i++) sum[i][j] = vec_fma(w, vec_load(x + i * a->IN + k), sum[i][j]);
        }
    for (int i = 0; i < tokens; i++) {
        float *y = a->y + (t + i) * a->OUT + r;
        const __m128 sums = vec_sums(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
        if (rows >= 4) {
            _mm_storeu_ps(y, _mm_add_ps(c == 0 ? _mm_setzero_ps() : _mm_loadu_ps(y), sums));
        } else {
            float four[4];
            _mm_storeu_ps(four, sums);
            for (int64_t j = 0; j < rows; j++) y[j] = (c == 0 ? 0 : y[j]) + four[j];
        }
    }
}

/* Each tile has its number of tokens as a constant, so that its sums are registers. */
TARGET static void any_tile(int64_t tokens, const linear_args *a, const float *panel, int64_t c, int64_t n,
                            int64_t r, int64_t rows, int64_t t) {
    switch (tokens) {
    case 1: tile(1, a, panel, c, n, r, rows, t); break;
    case 2: tile(2, a, panel, c, n, r, rows, t); break;
    case 3: tile(3, a, panel, c, n, r, rows, t); break;
#if TILE_TOKENS > 3
    case 4: tile(4, a, panel, c, n, r, rows, t); break;
    case 5: tile(5, a, panel, c, n, r, rows, t); break;
    case 6: tile(6, a, panel, c, n, r, rows, t); break;
#endif
    }
}

WORD void many_tokens(const int format, const linear_args *a, int64_t begin, int64_t end) {
    const int64_t weights = block_weights(format), bytes = block_bytes(format), blocks = a->IN / weights;
    _Alignas(64) float panel[PANEL_ROWS * CHUNK] = {0}; /* a last tile of under 4 rows reads all 4 */
    for (int64_t t0 = 0; t0 < a->T; t0 += TOKEN_BLOCK) {
        const int64_t t_end = t0 + TOKEN_BLOCK < a->T ? t0 + TOKEN_BLOCK : a->T;
        for (int64_t c = 0; c < a->IN; c += CHUNK) {
            const int64_t n = c + CHUNK < a->IN ? CHUNK : a->IN - c;
            for (int64_t r0 = begin; r0 < end; r0 += PANEL_ROWS) {
                const int64_t rows = r0 + PANEL_ROWS < end ? PANEL_ROWS : end - r0;
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t k = 0; k < n; k += weights) {
                        const uint8_t *w = a->w + ((r0 + r) * blocks + (c + k) / weights) * bytes;
                        scales s;
                        unpack_scales(format, &s, w);
                        for (int j = 0; j < weights / 16; j++) {
                            vec u[PARTS];
                            unpack(format, u, w, &s, j);
                            for (int l = 0; l < PARTS; l++)
                                vec_store(panel + r * CHUNK + k + 16 * j + LANES * l, u[l]);
                        }
                    }
                for (int64_t t = t0; t < t_end; t += TILE_TOKENS)
                    for (int64_t r = 0; r < rows; r += 4)
                        any_tile(t_end - t < TILE_TOKENS ? t_end - t : TILE_TOKENS, a, panel + r * CHUNK, c,
                                 n, r0 + r, rows - r, t);
            }
        }
    }
}

/* One copy of both loops for each format: `format` is a constant in each, so nothing is left to ask. */
TARGET void VEC(linear)(const linear_args *a, int64_t begin, int64_t end) {
#define CASE(FORMAT)                                                                                         \
    case FORMAT: a->T == 1 ? one_token(FORMAT, a, begin, end) : many_tokens(FORMAT, a, begin, end); break;
    switch (a->format) { EACH_FORMAT(CASE) }
#undef CASE
}
#endif

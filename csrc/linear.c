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

static void unpack_scalar(int format, float w[QK], const uint8_t *p) {
    for (int i = 0; i < QK; i++) {
        int nibble_at = i % 16, shift = i < 16 ? 0 : 4;
        switch (format) {
        case F32: w[i] = load_f32(p + 4 * i); break;
        case F16: w[i] = half_to_float(load_u16(p + 2 * i)); break;
        case BF16: w[i] = float_of_bits((uint32_t)load_u16(p + 2 * i) << 16); break;
        case Q8_0: w[i] = half_to_float(load_u16(p)) * (float)(int8_t)p[2 + i]; break;
        case Q4_0: w[i] = half_to_float(load_u16(p)) * (float)((p[2 + nibble_at] >> shift & 15) - 8); break;
        case Q4_1:
            w[i] = half_to_float(load_u16(p)) * (float)(p[4 + nibble_at] >> shift & 15) +
                   half_to_float(load_u16(p + 2));
            break;
        }
    }
}

void linear_scalar(const linear_args *a, int64_t begin, int64_t end) {
    const int64_t bytes = block_bytes(a->format), blocks = a->IN / QK;
    for (int64_t r = begin; r < end; r++) {
        for (int64_t t = 0; t < a->T; t++) a->y[t * a->OUT + r] = 0;
        for (int64_t b = 0; b < blocks; b++) {
            float w[QK];
            unpack_scalar(a->format, w, a->w + (r * blocks + b) * bytes);
            for (int64_t t = 0; t < a->T; t++) {
                const float *x = a->x + t * a->IN + b * QK;
                float sum = a->y[t * a->OUT + r];
                for (int i = 0; i < QK; i++) sum += w[i] * x[i];
                a->y[t * a->OUT + r] = sum;
            }
        }
    }
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

enum { CHUNK = 64 * LANES, PANEL_ROWS = 16, TOKEN_BLOCK = 192, PARTS = QK / LANES };

WORD void unpack(const int format, vec w[PARTS], const uint8_t *p) {
    if (format == F32)
        for (int i = 0; i < PARTS; i++) w[i] = vec_load(p + 4 * LANES * i);
    if (format == F16)
        for (int i = 0; i < PARTS; i++) w[i] = vec_from_f16(p + 2 * LANES * i);
    if (format == BF16)
        for (int i = 0; i < PARTS; i++) w[i] = vec_from_bf16(p + 2 * LANES * i);
    if (format == Q8_0) {
        const vec d = vec_all_f16(p);
        for (int i = 0; i < PARTS; i++) w[i] = vec_mul(d, vec_from_i8(p + 2 + LANES * i));
    }
    if (format == Q4_0 || format == Q4_1) {
        /* d * q + m, where Q4_0 has m = -8 d: both products are exact, so one FMA rounds as NumPy does. */
        const vec d = vec_all_f16(p), m = format == Q4_0 ? vec_mul(d, vec_all(-8)) : vec_all_f16(p + 2);
        const bytes16 pairs = load_bytes16(p + (format == Q4_0 ? 2 : 4));
        for (int i = 0; i < PARTS / 2; i++) {
            w[i] = vec_fma(vec_from_bytes16(low_nibbles(pairs), LANES * i), d, m);
            w[PARTS / 2 + i] = vec_fma(vec_from_bytes16(high_nibbles(pairs), LANES * i), d, m);
        }
    }
}

WORD void one_token(const int format, const linear_args *a, int64_t begin, int64_t end) {
    const int64_t bytes = block_bytes(format), blocks = a->IN / QK, quarter = (end - begin + 3) / 4;
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
            for (int64_t k = c; k < c_end; k += QK)
                for (int i = 0; i < 4; i++) {
                    vec u[PARTS];
                    unpack(format, u, w[i] + k / QK * bytes);
                    for (int j = 0; j < PARTS; j++)
                        sum[i] = vec_fma(u[j], vec_load(a->x + k + LANES * j), sum[i]);
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
    const float *x = a->x + t * a->IN + c;
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
    const int64_t bytes = block_bytes(format), blocks = a->IN / QK;
    _Alignas(64) float panel[PANEL_ROWS * CHUNK] = {0}; /* a last tile of under 4 rows reads all 4 */
    for (int64_t t0 = 0; t0 < a->T; t0 += TOKEN_BLOCK) {
        const int64_t t_end = t0 + TOKEN_BLOCK < a->T ? t0 + TOKEN_BLOCK : a->T;
        for (int64_t c = 0; c < a->IN; c += CHUNK) {
            const int64_t n = c + CHUNK < a->IN ? CHUNK : a->IN - c;
            for (int64_t r0 = begin; r0 < end; r0 += PANEL_ROWS) {
                const int64_t rows = r0 + PANEL_ROWS < end ? PANEL_ROWS : end - r0;
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t k = 0; k < n; k += QK) {
                        vec u[PARTS];
                        unpack(format, u, a->w + ((r0 + r) * blocks + (c + k) / QK) * bytes);
                        for (int j = 0; j < PARTS; j++) vec_store(panel + r * CHUNK + k + LANES * j, u[j]);
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
    switch (a->format) {
        CASE(F32)
        CASE(F16)
        CASE(BF16)
        CASE(Q8_0)
        CASE(Q4_0)
        CASE(Q4_1)
    }
#undef CASE
}
#endif

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
 * Threads share out the rows of w. tests/test_kernels.py holds every form to NumPy, every
 * instruction set to every other, and any split of T, of the rows and of the threads to the same bits. */
#include <stddef.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "dispatch.h"
#include "kernels.h"
#include "vec.h"

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
            if (from < end) k->linear_rows(&a, from, to < end ? to : end);
        }
        return;
    }
#endif
    (void)threads;
    k->linear_rows(&a, begin, end);
}

/* ---------------------------------------------------------------- scalar: the definition in C */

static void unpack_scalar(int format, float w[QK], const uint8_t *p) {
    for (int i = 0; i < QK; i++) {
        int nibble_at = i % 16, shift = i < 16 ? 0 : 4;
        switch (format) {
        case F32: memcpy(&w[i], p + 4 * i, 4); break;
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

void linear_rows_scalar(const linear_args *a, int64_t begin, int64_t end) {
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

/* ---------------------------------------------------------------- AVX2
 *
 * The same sum in a fixed order: IN is cut into chunks of 512; inside a chunk eight lanes each add
 * every eighth product, ascending; the lanes are summed in one tree (v8_sums); the chunks are added in
 * ascending order. One token or many, any number of threads: every output sees this order, so its bits
 * never change.
 *
 * One token (decode): each weight is used once. Unpack in registers and multiply at once; four rows
 * together, because one row's chain of additions would wait for each FMA (4 cycles) to end. The four lie
 * a quarter of the thread's share apart: memory is read fastest as a few long streams, and four short rows
 * side by side are not seen as such (SmolLM2's output matrix: 4 GB/s a thread so, 12 GB/s in quarters).
 *
 * Many tokens (prefill): each weight is used T times. Unpack 16 rows x 512 into `panel` (32 KB, it stays
 * in the first or second level of the cache) and run the tile over it:
 *
 *     tile = 4 rows x 3 tokens = 12 accumulators; a step of 8 columns loads 4 + 3 registers
 *            and does 12 FMAs: 7 loads take 3.5 cycles, 12 FMAs take 6, so the FMAs set the pace.
 *
 * Accumulators, 3 tokens and 1 row are the 16 registers there are. Tokens go in blocks of 192, whose
 * chunk of x (384 KB) stays in the second level while all panels pass by. */
#ifdef HAVE_AVX2

enum { CHUNK = 512, PANEL_ROWS = 16, TOKEN_BLOCK = 192 };

AVX2_INLINE void unpack(const int format, v8 w[4], const uint8_t *p) {
    if (format == F32)
        for (int i = 0; i < 4; i++) w[i] = v8_load((const float *)(const void *)p + 8 * i);
    if (format == F16)
        for (int i = 0; i < 4; i++) w[i] = v8_from_f16(p + 16 * i);
    if (format == BF16)
        for (int i = 0; i < 4; i++) w[i] = v8_from_bf16(p + 16 * i);
    if (format == Q8_0) {
        const v8 d = v8_all_f16(p);
        for (int i = 0; i < 4; i++) w[i] = v8_mul(d, v8_from_i8(p + 2 + 8 * i));
    }
    if (format == Q4_0 || format == Q4_1) {
        /* d * q + m, where Q4_0 has m = -8 d: both products are exact, so one FMA rounds as NumPy does. */
        const v8 d = v8_all_f16(p), m = format == Q4_0 ? v8_mul(d, v8_all(-8)) : v8_all_f16(p + 2);
        const __m256i pairs = all_16_bytes(p + (format == Q4_0 ? 2 : 4)), ones = _mm256_set1_epi8(15);
        const __m256i low = _mm256_and_si256(pairs, ones);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), ones);
        w[0] = v8_fma(v8_from_u8_of(low, 0), d, m);
        w[1] = v8_fma(v8_from_u8_of(low, 8), d, m);
        w[2] = v8_fma(v8_from_u8_of(high, 0), d, m);
        w[3] = v8_fma(v8_from_u8_of(high, 8), d, m);
    }
}

/* Write the first n of four neighbouring outputs, added to what is there unless it is the first chunk. */
AVX2_INLINE void put_rows(float *y, __m128 sums, int64_t n, int first) {
    if (n >= 4) {
        _mm_storeu_ps(y, first ? sums : _mm_add_ps(_mm_loadu_ps(y), sums));
    } else {
        float s[4];
        _mm_storeu_ps(s, sums);
        for (int64_t i = 0; i < n; i++) y[i] = first ? s[i] : y[i] + s[i];
    }
}

AVX2_INLINE void one_token(const int format, const linear_args *a, int64_t begin, int64_t end) {
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
            v8 sum[4] = {v8_zero(), v8_zero(), v8_zero(), v8_zero()};
            for (int64_t k = c; k < c_end; k += QK)
                for (int i = 0; i < 4; i++) {
                    v8 u[4];
                    unpack(format, u, w[i] + k / QK * bytes);
                    for (int j = 0; j < 4; j++) sum[i] = v8_fma(u[j], v8_load(a->x + k + 8 * j), sum[i]);
                }
            y = _mm_add_ps(y, v8_sums(sum[0], sum[1], sum[2], sum[3]));
        }
        float four[4];
        _mm_storeu_ps(four, y);
        for (int i = 0; i < 4; i++)
            if (r + i * quarter < end) a->y[r + i * quarter] = four[i];
    }
}

AVX2_INLINE void tile(const int tokens, const linear_args *a, const float *panel, int64_t c, int64_t n,
                      int64_t r, int64_t rows, int64_t t) {
    v8 sum[3][4];
    for (int i = 0; i < tokens; i++)
        for (int j = 0; j < 4; j++) sum[i][j] = v8_zero();
    const float *x = a->x + t * a->IN + c;
    for (int64_t k = 0; k < n; k += 8)
        for (int j = 0; j < 4; j++) {
            const v8 w = v8_load(panel + j * CHUNK + k);
            for (int i = 0; i < tokens; i++) sum[i][j] = v8_fma(w, v8_load(x + i * a->IN + k), sum[i][j]);
        }
    for (int i = 0; i < tokens; i++)
        put_rows(a->y + (t + i) * a->OUT + r, v8_sums(sum[i][0], sum[i][1], sum[i][2], sum[i][3]), rows,
                 c == 0);
}

AVX2_INLINE void many_tokens(const int format, const linear_args *a, int64_t begin, int64_t end) {
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
                        v8 u[4];
                        unpack(format, u, a->w + ((r0 + r) * blocks + (c + k) / QK) * bytes);
                        for (int j = 0; j < 4; j++) v8_store(panel + r * CHUNK + k + 8 * j, u[j]);
                    }
                for (int64_t t = t0; t < t_end; t += 3)
                    for (int64_t r = 0; r < rows; r += 4) {
                        const float *p = panel + r * CHUNK;
                        if (t_end - t >= 3) tile(3, a, p, c, n, r0 + r, rows - r, t);
                        if (t_end - t == 2) tile(2, a, p, c, n, r0 + r, rows - r, t);
                        if (t_end - t == 1) tile(1, a, p, c, n, r0 + r, rows - r, t);
                    }
            }
        }
    }
}

/* One copy of both loops for each format: `format` is a constant in each, so nothing is left to ask. */
AVX2 void linear_rows_avx2(const linear_args *a, int64_t begin, int64_t end) {
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

/* linear for one to eight tokens, as in decoding: GEMV, in vectors. Every weight is used once or a few times,
 * so the bandwidth of the memory is the limit.
 *
 * Block formats are packed, PACKED_ROWS rows side by side, and each row has its own lane:
 *
 *     for r in begin, PACKED_ROWS .. end      STREAMS groups of rows at once, far apart in memory
 *         y = 0                               for each group T registers (AVX2: 2 T), a row in each lane
 *         for pc in 0, KC .. IN
 *             for each group, and each of its blocks of 32 weights
 *                 unpack_block                8 registers, once for all tokens
 *                 for t in 0 .. T             sum = products with x[t], each x in all lanes
 *                     y[t] += sum * d * dx[t]    and again, if the block of x has second bytes
 *
 * No lanes are added, and the order of the sums is that of linear_gemm.c. So a token has the same bits in any
 * number of tokens.
 *
 * A block of Q4_0 has 288 bytes: 4 loads, 12 operations to unpack them, 8 vpdpbusd with x in memory, and 6
 * operations for the scales. These are 8 cycles of a CPU with four of them a cycle, so 36 bytes a cycle, and
 * no memory delivers as much to one core.
 *
 * Sums of whole numbers are int32, and none can overflow: 32 * 255 * 127 < 2^31.
 *
 * NF4 and FP4 take 8 operations more, to look up a byte for each code.
 *
 * FP8 takes the same way, with an FMA of floats in place of the products of bytes (`add_codes`).
 *
 * Single numbers are not packed: four rows are read at once, a quarter of the thread's share apart. The
 * products of a row are summed in lanes, in ascending order, and the lanes in one tree.
 *
 * Compiled once for each instruction set: all of it is vector forms (README.md).
 * tests/kernels/test_quantized_activations.py and tests/kernels/test_kernels.py compare it with NumPy. */
#include "dispatch.h"
#include "formats.h"
#include "unpack.h"
#include "vec.h"

/* Bytes from the weights at work to those that are prefetched. The CPU itself prefetches only within a page
 * of 4 KB. */
enum { PREFETCH_AHEAD = 2048 };

/* A few long streams are the fastest way to read memory. */
enum { STREAMS = 4 };

/* ---------------------------------------------------------------- floats: F32, F16, BF16 */

/* The sums of up to FLOAT_TOKENS tokens, four for each, stay in registers. More tokens are multiplied in two
 * halves: FLOAT_COLUMNS of them, a part of L1, by FOURS times four rows. */
enum { FLOAT_TOKENS = LANES == 16 ? 6 : 4, FLOAT_COLUMNS = 512, FOURS = 4 };

/* Pointers to row r and the three others. A row behind the end is replaced by the last one. */
VEC_INLINE void row_pointers(const int format, const uint8_t *w[4], const linear_args *a, int64_t r,
                             int64_t quarter, int64_t end) {
    const int64_t row_bytes = a->w.IN / block_weights(format) * block_bytes(format);
    for (int i = 0; i < 4; i++) {
        const int64_t row = r + i * quarter;
        w[i] = (const uint8_t *)a->w.data + (row < end ? row : end - 1) * row_bytes;
    }
}

VEC_INLINE vec floats_of(const int format, const uint8_t *p) {
    switch (format) {
    case F32: return vec_load(p);
    case F16: return vec_from_f16(p);
    case BF16: return vec_from_bf16(p);
    }
    return vec_zero(); /* not reached: the others are blocks */
}

/* sum[t][i] += w[i] @ x[t], in lanes: n columns of four rows and of up to FLOAT_TOKENS tokens. */
VEC_INLINE void add_floats(const int format, const int tokens, const int prefetch, vec (*sum)[4],
                           const uint8_t *const w[4], const float *x, int64_t IN, int64_t n) {
    const int64_t bytes = block_bytes(format) / QK;
    vec s[FLOAT_TOKENS][4];
    for (int t = 0; t < tokens; t++)
        for (int i = 0; i < 4; i++) s[t][i] = sum[t][i];
    for (int64_t b = 0; b < n; b += QK) {
        for (int i = 0; i < (prefetch ? 4 : 0); i++)
            prefetch_to_l1(w[i] + b * bytes + PREFETCH_AHEAD, QK * bytes);
        for (int64_t k = b; k < b + QK; k += LANES)
            for (int i = 0; i < 4; i++) {
                const vec floats = floats_of(format, w[i] + k * bytes);
                for (int t = 0; t < tokens; t++) s[t][i] = vec_fma(floats, vec_load(x + t * IN + k), s[t][i]);
            }
    }
    for (int t = 0; t < tokens; t++)
        for (int i = 0; i < 4; i++) sum[t][i] = s[t][i];
}

/* Rows r .. r + fours - 1 of each quarter. */
VEC_INLINE void gemv_floats_rows(const int format, const int T, const linear_args *a, int64_t r,
                                 int64_t fours, int64_t quarter, int64_t end) {
    const int64_t IN = a->w.IN, columns = T > FLOAT_TOKENS ? FLOAT_COLUMNS : IN;
    const int half = T > FLOAT_TOKENS ? (T + 1) / 2 : T;
    vec sum[FOURS][GEMV_TOKENS][4];
    for (int64_t j = 0; j < fours; j++)
        for (int t = 0; t < T; t++)
            for (int i = 0; i < 4; i++) sum[j][t][i] = vec_zero();
    for (int64_t b = 0; b < IN; b += columns)
        for (int64_t j = 0; j < fours; j++) {
            const int64_t n = IN - b < columns ? IN - b : columns;
            const float *x = (const float *)a->x + b;
            const uint8_t *w[4];
            row_pointers(format, w, a, r + j, quarter, end);
            for (int i = 0; i < 4; i++) w[i] += b * (block_bytes(format) / QK);
            add_floats(format, half, 1, sum[j], w, x, IN, n);
            if (half < T) add_floats(format, T - half, 0, sum[j] + half, w, x + half * IN, IN, n);
        }
    for (int64_t j = 0; j < fours; j++)
        for (int t = 0; t < T; t++) {
            float four[4];
            vec_store_sums(four, sum[j][t][0], sum[j][t][1], sum[j][t][2], sum[j][t][3]);
            for (int i = 0; i < 4; i++)
                if (r + j + i * quarter < end) a->y[t * a->w.OUT + r + j + i * quarter] = four[i];
        }
}

/* Each number of tokens is a constant to its loop, so that its sums are registers. */
VEC_INLINE void gemv_floats(const int format, const linear_args *a, int64_t begin, int64_t end) {
    const int64_t quarter = (end - begin + 3) / 4, step = a->T > FLOAT_TOKENS ? FOURS : 1;
    for (int64_t i = 0; i < quarter; i += step) {
        const int64_t fours = quarter - i < step ? quarter - i : step;
        switch (a->T) {
#define CASE(T)                                                                                              \
    case T: gemv_floats_rows(format, T, a, begin + i, fours, quarter, end); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
        }
    }
}

/* ---------------------------------------------------------------- packed rows: bytes, and codes of floats */

/* y[t] += the products of a block of weights, q with the scales d and minima m, with the block x. */
VEC_INLINE void add_block(const int format, const int T, vec *y, const ints q[8], const vec *d, vec m,
                          const int32_t *x) {
    const int scales = QK / scale_weights(format), fours = scale_weights(format) / 4;
    for (int t = 0; t < T; t++) {
        for (int i = 0; i < scales; i++) {
            const ints start = ints_all(x_start(x, T, i)[t]);
            const ints sum = byte_dots(format, start, q + i * fours, x + i * fours * T + t, T, fours);
            y[t] = vec_fma(vec_from_ints(sum), vec_mul(d[i], vec_all(x_dx(x, T)[t])), y[t]);
        }
        if (has_minima(format)) y[t] = vec_fma(m, vec_all(x_sums(x, T)[t]), y[t]);
    }
}

/* What a step of KC weights has in hand: packed rows, LANES of them from `column` on, and the tokens. In a K
 * format d and m are the scales of its sub-blocks. */
typedef struct {
    const uint8_t *weights;
    int64_t column;
    const float *x[GEMV_TOKENS]; /* where the weights are codes of floats */
    const int32_t *first;
    second_bytes second;
    float d[KC / 16 * LANES], m[KC / QK * LANES];
} gemv_step;

VEC_INLINE void unpack_and_add(const int format, const int T, vec *y, const gemv_step *s, const int b) {
    const nl_format f = format_of(format);
    const int scales = QK / scale_weights(format), in_block = blocks_of_32(format);
    const int64_t bytes = PACKED_ROWS * f.bytes;
    const uint8_t *p = s->weights + b / in_block * bytes;
    ints q[8];
    vec d[2], m = vec_zero();
    if (s->column == 0) prefetch_to_l1(s->weights + b * bytes / in_block + PREFETCH_AHEAD, bytes / in_block);
    unpack_block(format, q, p, b % in_block, s->column);
    for (int i = 0; i < scales; i++)
        d[i] = is_k(format) ? vec_load(s->d + (b * scales + i) * LANES) : scale_of_rows(format, p, s->column);
    if (has_minima(format)) m = is_k(format) ? vec_load(s->m + b * LANES) : m_of_rows(format, p, s->column);
    const int32_t *x = s->first + b * x_block_size(T), *second = second_block(&s->second, b, T);
    for (; x; x = second, second = NULL) add_block(format, T, y, q, d, m, x);
}

/* FP8, codes of floats: y[t] += d * (the products of each block), which are summed in four registers. */
VEC_INLINE void add_codes(const int format, const int T, vec *y, const gemv_step *s, int64_t kc) {
    enum { SUMS = 4 };
    const int codes = codes_in_unit(format), weights = (int)block_weights(format);
    const int64_t bytes = PACKED_ROWS * block_bytes(format);
    const uint8_t *p = s->weights;
    for (int64_t b = 0; b < kc; b += weights, p += bytes) {
        vec sum[GEMV_TOKENS][SUMS];
        for (int t = 0; t < T; t++)
            for (int i = 0; i < SUMS; i++) sum[t][i] = vec_zero();
        if (s->column == 0) prefetch_to_l1(p + PREFETCH_AHEAD, bytes);
#pragma GCC unroll 1
        for (int k = 0; k < weights; k += codes) {
            const ints unit = unit_of_rows(p, format_of(format).quants, k / codes, s->column);
            vec w[8];
#pragma GCC unroll 8 /* every shift gets its constant */
            for (int i = 0; i < codes; i++) w[i] = float_of_code(format, unit, i);
            for (int t = 0; t < T; t++)
                for (int i = 0; i < codes; i++)
                    sum[t][i % SUMS] = vec_fma(w[i], vec_all(s->x[t][b + k + i]), sum[t][i % SUMS]);
        }
        const vec d = d_of_rows(format, p, s->column);
        for (int t = 0; t < T; t++) {
            const vec all = vec_add(vec_add(sum[t][0], sum[t][1]), vec_add(sum[t][2], sum[t][3]));
            y[t] = vec_fma(times_of_code(format, all), d, y[t]);
        }
    }
}

VEC_INLINE void gemv_add_step(const int format, const int T, vec *y, gemv_step *s, int64_t blocks) {
    if (!in_bytes(format)) {
        add_codes(format, T, y, s, blocks * QK);
        return;
    }
    if (is_k(format)) unpack_scales(format, 0, s->d, s->m, LANES, s->weights, blocks, s->column);
    if (is_k(format) && T == 1) {
#pragma GCC unroll 8 /* every shift gets its constant */
        for (int b = 0; b < KC / QK; b++) unpack_and_add(format, T, y, s, b);
    } else {
#pragma GCC unroll 1
        for (int b = 0; b < blocks; b++) unpack_and_add(format, T, y, s, b);
    }
}

/* STREAMS groups of PACKED_ROWS rows at once: row r and the others, `apart` rows apart, as far as they are
 * below `end`. */
VEC_INLINE void gemv_packed_rows(const int format, const int T, const linear_args *a, int64_t r,
                                 int64_t apart, int64_t end) {
    enum { REGISTERS = PACKED_ROWS / LANES };
    const int64_t IN = a->w.IN, row_bytes = IN / block_weights(format) * block_bytes(format);
    const uint8_t *w[STREAMS];
    vec y[STREAMS][REGISTERS][GEMV_TOKENS];
    gemv_step step = {.first = a->x};
    if (in_bytes(format))
        step.second = second_bytes_of(a->x, T, 1, IN, 0);
    else /* tokens behind the last one are the last one; their sums are not used */
        for (int t = 0; t < T; t++) step.x[t] = (const float *)a->x + (t < a->T ? t : a->T - 1) * IN;
    int streams = 0;
    for (; streams < STREAMS && r + streams * apart < end; streams++) {
        w[streams] = (const uint8_t *)a->w.data + (r + streams * apart) * row_bytes;
        for (int h = 0; h < REGISTERS; h++)
            for (int t = 0; t < T; t++) y[streams][h][t] = vec_zero();
    }
    for (int64_t pc = 0; pc < IN; pc += KC) {
#pragma GCC unroll 1
        for (int i = 0; i < streams * REGISTERS; i++) {
            const int stream = i / REGISTERS, h = i % REGISTERS;
            step.weights = w[stream], step.column = h * LANES;
            gemv_add_step(format, T, y[stream][h], &step, (pc + KC < IN ? KC : IN - pc) / QK);
            if (h == REGISTERS - 1)
                w[stream] += PACKED_ROWS * KC / block_weights(format) * block_bytes(format);
        }
        if (in_bytes(format))
            step.first += KC / QK * x_block_size(T), step.second.place += KC / QK;
        else
            for (int t = 0; t < T; t++) step.x[t] += KC;
    }
    for (int i = 0; i < streams; i++) {
        const int64_t row = r + i * apart, rows = end - row < PACKED_ROWS ? end - row : PACKED_ROWS;
        for (int t = 0; t < T && t < a->T; t++) {
            float all[PACKED_ROWS];
            for (int h = 0; h < REGISTERS; h++) vec_store(all + h * LANES, y[i][h][t]);
            memcpy(a->y + t * a->w.OUT + row, all, (size_t)rows * sizeof(float));
        }
    }
}

/* The token groups of dispatch.h. */
#define EACH_GEMV_T(CASE) CASE(1) CASE(2) CASE(4) CASE(8)
VEC_INLINE void gemv_packed(const int format, const linear_args *a, int64_t begin, int64_t end) {
    const int64_t groups = (end - begin + PACKED_ROWS - 1) / PACKED_ROWS;
    const int64_t apart = (groups + STREAMS - 1) / STREAMS * PACKED_ROWS;
    for (int64_t r = begin; r < begin + apart; r += PACKED_ROWS) switch (group_tokens(a->T)) {
#define CASE(T)                                                                                              \
    case T: gemv_packed_rows(format, T, a, r, apart, end); break;
            EACH_GEMV_T(CASE)
#undef CASE
        }
}

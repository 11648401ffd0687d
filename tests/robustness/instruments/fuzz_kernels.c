/* libFuzzer calls each C function of csrc/kernels.h through this file. fuzz.py compiles it with the sources,
 * under AddressSanitizer and UndefinedBehaviorSanitizer, once for each function: -DTARGET=fuzz_linear.
 *
 *     input bytes  --->  instruction set, format, sizes, kind of numbers  --->  arrays of exactly that size
 *
 * The sanitizers find each access beside an array. A result is compared with the plain loop in float64,
 * within the rounding of its sums. If an operand is an infinity or a NaN, the result must be one too. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "formats.h"
#include "kernels.h"

#define U 0x1p-24 /* half a unit in the last place of a float32 */
/* Beyond these a sum in float32 may overflow on its way: a block's dot product is up to 10^6 times x. */
#define HUGE_SUM 1e37
#define HUGE_X 1e31

static void check(int holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "%s: %s\n", nl_isa(), what);
    abort();
}

static void check_near(double found, double expected, double bound, const char *what) {
    if (!(fabs(found - expected) <= bound))
        fprintf(stderr, "%.9g for %.9g +- %.2g\n", found, expected, bound);
    check(fabs(found - expected) <= bound, what);
}

/* ---------------------------------------------------------------- what an input means
 *
 * Its bytes, and when those are used up others that follow from them. */

static const uint8_t *at, *behind;
static uint64_t state;

static uint8_t next_byte(void) {
    const uint8_t given = at < behind ? *at++ : 0;
    state = (state + given + 1) * 6364136223846793005u + 1442695040888963407u;
    return at < behind ? given : (uint8_t)(state >> 56);
}

static int64_t number(int64_t from, int64_t to) {
    const int64_t low = next_byte();
    return from + (low | next_byte() << 8) % (to - from + 1);
}

static void choose_isa(void) {
    int n = 0;
    while (nl_isa_name(n)) n++;
    nl_use_isa(nl_isa_name((int)number(0, n - 1)));
}

enum { REAL, WHOLE, ANY_BITS, KINDS };

static float any_float(int kind) {
    uint32_t bits = 0;
    for (int i = 0; i < 4; i++) bits = bits << 8 | next_byte();
    if (kind == REAL) return (float)(int32_t)bits * 0x1p-31f;
    if (kind == WHOLE) return (float)(int)(bits % 17) - 8;
    return float_of_bits(bits);
}

/* As many bytes as asked for and not one more: so the sanitizer sees the first that is too many. */
static void *room(int64_t bytes) {
    void *p = malloc((size_t)bytes);
    memset(p, 0xff, (size_t)bytes); /* NaN in every float format */
    return p;
}

static float *floats(int64_t n, int kind) {
    float *x = room(4 * n);
    for (int64_t i = 0; i < n; i++) x[i] = any_float(kind);
    return x;
}

static const int FORMATS[] = {
#define ROW(NAME, ...) NAME,
    EACH_FORMAT(ROW)
#undef ROW
};
enum { N_FORMATS = sizeof FORMATS / sizeof *FORMATS };

static int64_t row_bytes(int format, int64_t IN) { return IN / block_weights(format) * block_bytes(format); }

/* n weights as stored: any bytes, whose scales, unless any bits are asked for, are those of small numbers. */
static uint8_t *stored(int format, int64_t n, int kind) {
    const int64_t bytes = block_bytes(format), blocks = n / block_weights(format);
    uint8_t *w = room(blocks * bytes);
    for (int64_t i = 0; i < blocks * bytes; i++) w[i] = next_byte();
    for (int64_t b = 0; b < blocks && format_of(format).d32 != NONE; b++) {
        float d = kind == ANY_BITS ? load_f32(w + b * bytes) : any_float(REAL) * 0x1p-7f;
        if (isfinite(d) && fabsf(d) > 0x1p60f)
            d *= 0x1p-60f; /* else a weight overflows, and its sum may not */
        memcpy(w + b * bytes, &d, 4);
    }
    if (kind == ANY_BITS || format_of(format).d32 != NONE) return w;
    for (int64_t b = 0; b < blocks; b++) {
        uint8_t *p = w + b * bytes;
        if (is_single(format)) {
            for (int i = 0; i < QK; i++) {
                const float f = any_float(kind) / 16;
                const uint16_t half = format == F16 ? float_to_half(f) : (uint16_t)(bits_of_float(f) >> 16);
                if (format == F32)
                    memcpy(p + 4 * i, &f, 4);
                else
                    memcpy(p + 2 * i, &half, 2);
            }
            continue;
        }
        for (int i = 0; i <= has_minima(format); i++) {
            const float f = any_float(REAL) * (is_k(format) ? 0x1p-15f : 0x1p-7f);
            const uint16_t half = float_to_half(format == Q4_Z && i == 1 ? (float)(next_byte() % 32) : f);
            memcpy(p + (format == Q6_K ? 208 : 2 * i), &half, 2);
        }
    }
    return w;
}

/* The same rows as the kernels take them. */
static const void *packed(const uint8_t *w, int format, int64_t OUT, int64_t IN) {
    if (!is_packed(format)) return w;
    const int64_t rows = (OUT + NL_PACKED_ROWS - 1) / NL_PACKED_ROWS * NL_PACKED_ROWS;
    void *to = room(rows * row_bytes(format, IN));
    nl_pack(to, w, format, OUT, IN, 1);
    return to;
}

static int any_format(int64_t IN) {
    for (;;) {
        const int format = FORMATS[number(0, N_FORMATS - 1)];
        if (IN % block_weights(format) == 0) return format;
    }
}

/* ---------------------------------------------------------------- linear, exact, with quantized activations
 */

/* At most so large are the parts that a weight of this run of sixteen may be put together from. */
static double reach(int format, const uint8_t *p, int s, double largest) {
    const double d = fabs(load_f16(p)), m = fabs(load_f16(p + 2));
    switch (format) {
    case Q8_0: return d * 128;
    case INT8: return fabs(load_f32(p)) * 128;
    case LLM_INT8: return fabs(load_f32(p)) * 128 / 127;
    case NF4:
    case FP4: return fabs(load_f32(p));
    case Q4_0: return d * 24;
    case Q4_1: return d * 15 + m;
    case Q4_Z: return d * (15 + m);
    case Q5_0: return d * 48;
    case Q5_1: return d * 31 + m;
    case Q4_K: return d * k_scale(p + 4, s / 2) * 15 + m * k_minimum(p + 4, s / 2);
    case Q5_K: return d * k_scale(p + 4, s / 2) * 31 + m * k_minimum(p + 4, s / 2);
    case Q6_K: return fabs(load_f16(p + 208)) * abs((int8_t)p[192 + s]) * 96;
    default: return largest;
    }
}

/* A row of w: its weights, and for each the size of its parts; -> whether all are finite. */
static int read_row(double *w, double *size, int format, const uint8_t *row, int64_t IN, int rounded) {
    const int64_t weights = block_weights(format);
    int finite = 1;
    for (int64_t b = 0; b < IN; b += weights)
        for (int s = 0; s < weights / 16; s++) {
            const uint8_t *p = row + b / weights * block_bytes(format);
            for (int i = 0; i < 16; i++) {
                w[b + 16 * s + i] = rounded ? rounded_weight(format, p, s, i) : weight(format, p, s, i);
                finite &= isfinite(w[b + 16 * s + i]);
                size[b + 16 * s + i] = reach(format, p, s, fabs(w[b + 16 * s + i]));
            }
        }
    return finite;
}

enum { FLOATS, EXACT, QUANTIZED };

static void linear_in(int way) {
    choose_isa();
    const char *isa = nl_isa();
    const int format = FORMATS[number(0, N_FORMATS - 1)], x_kind = (int)number(0, KINDS - 1);
    const int64_t weights = block_weights(format), T = number(1, number(0, 3) ? 12 : 70);
    const int64_t IN = number(1, is_k(format) ? 4 : 20) * weights;
    int64_t OUT = number(1, 80);
    if (T * OUT * IN > 1 << 15) OUT = (1 << 15) / (T * IN) + 1;
    if (way == QUANTIZED && !nl_quantizes_activations(format, T)) return;
    uint8_t *w = stored(format, OUT * IN, (int)number(0, KINDS - 1));
    const nl_matrix matrix = {packed(w, format, OUT, IN), format, OUT, IN};
    const int bits = number(0, 1) ? 8 : 15;
    float *x = floats(T * IN, x_kind), *y = room(4 * T * OUT);
    const int64_t cut = number(0, OUT / NL_PACKED_ROWS) * NL_PACKED_ROWS;
    float *rounded = x; /* what x is rounded to */
    void *activations = NULL;
    if (way == QUANTIZED) {
        activations = room(nl_activations_bytes(T, IN));
        rounded = room(nl_activations_bytes(T, IN));
        nl_quantize_activations(activations, x, format, bits, T, IN, 1);
        nl_use_isa("scalar"); /* whose quantized activations are floats */
        nl_quantize_activations(rounded, x, format, bits, T, IN, 1);
        nl_use_isa(isa);
    }
    for (int part = 0; part < 2; part++) {
        const int64_t begin = part ? cut : 0, end = part ? OUT : cut;
        if (begin == end) continue;
        if (way == QUANTIZED)
            nl_linear_quantized(y, activations, T, &matrix, begin, end, 1);
        else
            (way == EXACT ? nl_linear_exact : nl_linear)(y, x, T, &matrix, begin, end, 1);
    }
    double *row = room(8 * IN), *size = room(8 * IN);
    const int rounds_w = way == QUANTIZED && !in_bytes(format),
              x_in_bytes = way == QUANTIZED && in_bytes(format);
    for (int64_t r = 0; r < OUT; r++) {
        const int good_row = read_row(row, size, format, w + r * row_bytes(format, IN), IN, way == QUANTIZED);
        for (int64_t t = 0; t < T; t++) {
            double sum = 0, sizes = 0, coarse = 0, largest = 0;
            int finite = good_row, overflows = 0; /* in the scalar's floats only */
            for (int64_t b = 0; b < IN; b += weights) {
                double most_x = 0, most_w = 0, here = 0;
                for (int64_t k = b; k < b + weights; k++) {
                    const double a = rounded[t * IN + k];
                    finite &= isfinite(x[t * IN + k]);
                    overflows |= !isfinite(a);
                    sum += a * row[k];
                    sizes += fabs(a) * size[k];
                    here += fabs(a);
                    most_x = fmax(most_x, fabs(a)), most_w = fmax(most_w, size[k]);
                }
                /* x = 128 first + second: a small x is put together from parts of up to 64 / 16256 of the
                 * largest */
                if (x_in_bytes) sizes += 0.01 * most_x * most_w * (double)weights;
                largest = fmax(largest, most_x);
                if (rounds_w) coarse += here * (most_w / (2 * 8191) + 1e-30);
            }
            const double found = y[t * OUT + r];
            if (!finite) {
                check(!isfinite(found), "what is not finite was lost");
            } else if (!overflows && sizes + 1e4 * coarse < HUGE_SUM && largest < HUGE_X) {
                const double tiny =
                    (double)IN * (way == QUANTIZED ? 1e-36 : 1e-44); /* products below 2^-126 */
                const double bound = 3 * (double)(IN + 16) * U * sizes + 1.01 * coarse + tiny;
                check_near(found, sum, bound, "a product is wrong");
            }
        }
    }
    if (rounded != x) free(rounded);
    if (matrix.data != w) free((void *)(uintptr_t)matrix.data);
    free(w), free(x), free(y), free(activations), free(row), free(size);
}

void fuzz_linear(void) { linear_in(FLOATS); }
void fuzz_linear_exact(void) { linear_in(EXACT); }
void fuzz_linear_quantized(void) { linear_in(QUANTIZED); }

/* ---------------------------------------------------------------- attention */

static const int CACHED[] = {F32, F16, Q8_0};

/* n keys or values in the format of a cache. x becomes the numbers that are stored. */
static void *as_cached(int format, float *x, int64_t n) {
    uint8_t *to = room(bytes_of(format, n));
    if (format == F32) memcpy(to, x, (size_t)(4 * n));
    for (int64_t i = 0; format == F16 && i < n; i++) store_u16(to + 2 * i, float_to_half(x[i]));
    for (int64_t i = 0; format == Q8_0 && i < n; i += QK) quantize_q8_0(to + bytes_of(Q8_0, i), x + i);
    load_head(x, format, to, n);
    return to;
}

void fuzz_attention(void) {
    choose_isa();
    const int format = CACHED[number(0, 2)], kind = (int)number(0, KINDS - 1);
    const int64_t B = number(1, 2), T = number(1, number(0, 3) ? 5 : 20), S = T + number(0, 140);
    const int64_t window = number(0, 1) * number(1, 150);
    /* whole KV blocks before the first query's window */
    const int64_t dropped = window && S - T >= window ? number(0, 1) * number(0, 20) * 128 : 0;
    const int64_t K = number(1, 2), H = K * number(1, 3),
                  Dh = format == Q8_0 ? number(1, 3) * QK
                       : number(0, 1) ? number(1, 6) * 16
                                      : number(1, 50);
    const int64_t by_head = number(0, 1), cut = number(0, T);
    /* (B, S, K, Dh), or as a cache has it: (B, K, S, Dh) */
    const int64_t strides[3] = {S * K * Dh, by_head ? Dh : K * Dh, by_head ? S * Dh : Dh};
    float *q = floats(B * T * H * Dh, kind), *out = room(4 * B * T * H * Dh);
    float *kv[2];
    void *as_stored[2];
    for (int i = 0; i < 2; i++) {
        kv[i] = floats(B * S * K * Dh, kind);
        as_stored[i] = as_cached(format, kv[i], B * S * K * Dh);
    }
    for (int part = 0; part < 2; part++) {
        const nl_attention_args a = {
            .out = out,
            .q = q,
            .k = as_stored[0],
            .v = as_stored[1],
            .format = format,
            .B = B,
            .T = T,
            .S = dropped + S,
            .H = H,
            .K = K,
            .Dh = Dh,
            .k_strides = {strides[0], strides[1], strides[2]},
            .v_strides = {strides[0], strides[1], strides[2]},
            .begin = part ? cut : 0,
            .end = part ? T : cut,
            .window = window,
            .dropped = dropped,
        };
        check(nl_attention(&a, 1) == 0, "no memory");
    }
    double *scores = room(8 * S), *sum = room(8 * Dh), *largest = room(8 * Dh);
    for (int64_t row = 0; row < B * T * H && kind != ANY_BITS; row++) {
        const int64_t b = row / (T * H), t = row / H % T, h = row % H, seen = S - T + t + 1;
        const int64_t seen_from = window && seen > window ? seen - window : 0;
        const int64_t first = b * strides[0] + h / (H / K) * strides[2];
        double most = -INFINITY, spread = 0, all = 0;
        for (int64_t j = seen_from; j < seen; j++) {
            double dot = 0, size_of_dot = 0;
            for (int64_t d = 0; d < Dh; d++) {
                const double product = (double)q[row * Dh + d] * kv[0][first + j * strides[1] + d];
                dot += product, size_of_dot += fabs(product);
            }
            scores[j] = dot / sqrt((double)Dh);
            most = fmax(most, scores[j]), spread = fmax(spread, size_of_dot / sqrt((double)Dh));
        }
        for (int64_t d = 0; d < Dh; d++) sum[d] = largest[d] = 0;
        for (int64_t j = seen_from; j < seen; j++) {
            const double p = exp(scores[j] - most);
            all += p;
            for (int64_t d = 0; d < Dh; d++) {
                const double v = kv[1][first + j * strides[1] + d];
                sum[d] += p * v, largest[d] = fmax(largest[d], fabs(v));
            }
        }
        /* a score errs by delta, an exp by 2 delta and its own rounding, a sum by one rounding a term */
        const double delta = (double)(Dh + 3) * U * spread;
        const double bound = 2 * (2 * delta + (4 + 2 * spread) * U) + 2 * (double)(seen + 8) * U;
        for (int64_t d = 0; d < Dh; d++) {
            const double found = out[row * Dh + d];
            check_near(found, sum[d] / all, bound * largest[d] + 1e-40, "attention is wrong");
        }
    }
    for (int i = 0; i < 2; i++) free(as_stored[i]), free(kv[i]);
    free(q), free(out), free(scores), free(sum), free(largest);
}

/* ---------------------------------------------------------------- the gradients of linear */

/* sum of n products a[i * by_a] b[i * by_b], within the rounding of the sum in any order, plus `old` */
static void check_sum(float found, const float *a, int64_t by_a, const double *b, const double *size,
                      int64_t by_b, int64_t n, double old, const char *what) {
    double sum = old, sizes = fabs(old), largest = 0;
    int finite = isfinite(old);
    for (int64_t i = 0; i < n; i++) {
        sum += (double)a[i * by_a] * b[i * by_b];
        sizes += fabs((double)a[i * by_a]) * size[i * by_b];
        largest = fmax(largest, fabs((double)a[i * by_a]));
        finite &= isfinite(a[i * by_a]) && isfinite(b[i * by_b]);
    }
    if (!finite)
        check(!isfinite(found), "what is not finite was lost");
    else if (sizes < HUGE_SUM && largest < HUGE_X)
        check_near(found, sum, 3 * (double)(n + 16) * U * sizes + (double)n * 1e-44, what);
}

void fuzz_linear_dx(void) {
    choose_isa();
    const int format = FORMATS[number(0, N_FORMATS - 1)], kind = (int)number(0, KINDS - 1);
    const int64_t weights = block_weights(format), T = number(1, number(0, 3) ? 12 : 260);
    const int64_t IN = number(1, is_k(format) ? 3 : 20) * weights;
    const int64_t N = IN - (is_single(format) ? number(0, weights - 1) : 0); /* blocks are never padded */
    int64_t OUT = number(1, 300);
    if (T * OUT * IN > 1 << 16) OUT = (1 << 16) / (T * IN) + 1;
    uint8_t *rows = stored(format, OUT * IN, (int)number(0, KINDS - 1));
    const nl_matrix w = {packed(rows, format, OUT, IN), format, OUT, IN};
    float *dy = floats(T * OUT, kind), *x = floats(T * IN, kind), *dx = room(4 * T * N);
    float *y = room(4 * T * OUT), *exact = room(4 * T * OUT);
    const int64_t cut = number(0, OUT / NL_GRADIENT_ROWS) * NL_GRADIENT_ROWS;
    if (cut) check(nl_linear_dx(dx, dy, T, &w, N, 0, cut, 1) == 0, "dx was refused");
    if (cut < OUT) check(nl_linear_dx(dx, dy, T, &w, N, cut, OUT, 1) == 0, "dx was refused");
    double *wide = room(8 * OUT * IN), *size = room(8 * OUT * IN);
    for (int64_t r = 0; r < OUT; r++)
        read_row(wide + r * IN, size + r * IN, format, rows + r * row_bytes(format, IN), IN, 0);
    for (int64_t t = 0; t < T; t++)
        for (int64_t k = 0; k < N; k++)
            check_sum(dx[t * N + k], dy + t * OUT, 1, wide + k, size + k, IN, OUT, 0, "dx is wrong");
    check(nl_linear_y(y, x, T, &w, 0, OUT, 1) == 0, "y was refused");
    check(nl_linear_exact(exact, x, T, &w, 0, OUT, 1) == 0, "y was refused");
    for (int64_t i = 0; i < T * OUT; i++)
        check(y[i] == exact[i] || (isnan(y[i]) && isnan(exact[i])), "y has other bits");
    if (w.data != rows) free((void *)(uintptr_t)w.data);
    free(rows), free(dy), free(x), free(dx), free(y), free(exact), free(wide), free(size);
}

void fuzz_linear_dw(void) {
    choose_isa();
    const int kind = (int)number(0, KINDS - 1), add = (int)number(0, 1);
    const int64_t T = number(1, number(0, 3) ? 12 : 600), IN = number(1, 140);
    int64_t OUT = number(1, 140);
    if (T * OUT * IN > 1 << 16) OUT = (1 << 16) / (T * IN) + 1;
    float *dy = floats(T * OUT, kind), *x = floats(T * IN, kind), *dw = floats(OUT * IN, kind);
    float *old = memcpy(room(4 * OUT * IN), dw, (size_t)(4 * OUT * IN));
    const int64_t cut = number(0, OUT);
    for (int part = 0; part < 2; part++)
        check(nl_linear_dw(dw, dy, x, T, OUT, IN, part ? cut : 0, part ? OUT : cut, add, 1) == 0,
              "dw was refused");
    double *wide = room(8 * T * IN), *size = room(8 * T * IN);
    for (int64_t i = 0; i < T * IN; i++) wide[i] = x[i], size[i] = fabs(wide[i]);
    for (int64_t o = 0; o < OUT; o++)
        for (int64_t k = 0; k < IN; k++)
            check_sum(dw[o * IN + k], dy + o, OUT, wide + k, size + k, IN, T, add ? old[o * IN + k] : 0,
                      "dw is wrong");
    free(dy), free(x), free(dw), free(old), free(wide), free(size);
}

/* ---------------------------------------------------------------- the rest of training
 *
 * The oracle is the scalar form. The numbers of both are near if all that is read is small. */

enum { MAX_OUTPUTS = 4 };
typedef struct {
    float *output[MAX_OUTPUTS];
    int64_t n[MAX_OUTPUTS];
} outputs;

static float *output_of(outputs *o, int i, const float *from, int64_t n) {
    o->n[i] = n;
    o->output[i] = room(4 * n);
    return from ? memcpy(o->output[i], from, (size_t)(4 * n)) : o->output[i];
}

static void check_same(outputs *found, outputs *expected, int finite, double bound, const char *what) {
    double largest = 0; /* of all: a gradient may cancel to 0 */
    for (int i = 0; i < MAX_OUTPUTS; i++)
        for (int64_t j = 0; j < expected->n[i]; j++) largest = fmax(largest, fabs(expected->output[i][j]));
    for (int i = 0; i < MAX_OUTPUTS; i++) {
        for (int64_t j = 0; finite && j < expected->n[i]; j++)
            check_near(found->output[i][j], expected->output[i][j], bound * (largest + 1e-30), what);
        free(found->output[i]), free(expected->output[i]);
    }
}

void fuzz_attention_backward(void) {
    choose_isa();
    const char *isa = nl_isa();
    const int kind = number(0, 1) ? REAL : ANY_BITS;
    const int64_t B = number(1, 2), T = number(1, number(0, 3) ? 12 : 220), K = number(1, 2);
    const int64_t H = K * number(1, 3), Dh = number(0, 1) ? number(1, 6) * 16 : number(1, 50);
    const int64_t nq = B * T * H * Dh, nk = B * T * K * Dh, cut = number(0, (T - 1) / NL_KEYS) * NL_KEYS;
    float *q = floats(nq, kind), *k = floats(nk, kind), *v = floats(nk, kind), *dout = floats(nq, kind);
    outputs both[2] = {0};
    for (int scalar = 0; scalar < 2; scalar++) {
        if (scalar) nl_use_isa("scalar");
        float *out = room(4 * nq), *lse = room(4 * B * H * T);
        const nl_attention_args forward = {
            .out = out,
            .q = q,
            .k = k,
            .v = v,
            .format = F32,
            .B = B,
            .T = T,
            .S = T,
            .H = H,
            .K = K,
            .Dh = Dh,
            .k_strides = {T * K * Dh, K * Dh, Dh},
            .v_strides = {T * K * Dh, K * Dh, Dh},
            .end = T,
            .lse = lse,
        };
        check(nl_attention(&forward, 1) == 0, "no memory");
        outputs *o = &both[scalar];
        nl_attention_backward_args a = {
            .dq = output_of(o, 0, NULL, nq),
            .dk = output_of(o, 1, NULL, nk),
            .dv = output_of(o, 2, NULL, nk),
            .dout = dout,
            .q = q,
            .k = k,
            .v = v,
            .out = out,
            .lse = lse,
            .B = B,
            .T = T,
            .H = H,
            .K = K,
            .Dh = Dh,
        };
        for (int part = cut ? 0 : 1; part < 2; part++) {
            a.begin = part ? cut : 0, a.end = part ? T : cut;
            check(nl_attention_backward(&a, 1) == 0, "no memory");
        }
        free(out), free(lse);
    }
    nl_use_isa(isa);
    check_same(&both[0], &both[1], kind == REAL, 1e-4, "a gradient of attention is wrong");
    free(q), free(k), free(v), free(dout);
}

enum { NORM, ROTATE, SWIGLU, CROSS_ENTROPY, ADAMW, SQUARES, LORA, OPERATIONS };

void fuzz_training(void) {
    choose_isa();
    const char *isa = nl_isa();
    const int operation = (int)number(0, OPERATIONS - 1), kind = number(0, 1) ? REAL : ANY_BITS;
    const int64_t rows = number(1, 20), wide = number(1, 300);
    const int64_t columns = operation == NORM     ? (wide + 31) / 32 * 32
                            : operation == ROTATE ? (wide + 1) / 2 * 2 % NL_MAX_DH + 2
                                                  : wide;
    const int64_t n = rows * columns, heads = number(1, 3), rank = number(1, rows);
    float *a = floats(n * heads, kind), *b = floats(n, kind), *c = floats(n, kind), *d = floats(n, kind);
    int64_t *targets = room(8 * rows);
    for (int64_t i = 0; i < rows; i++) targets[i] = number(0, columns - 1);
    for (int64_t i = 0; kind == REAL && i < n; i++) d[i] = fabsf(d[i]); /* a mean of squares */
    const nl_adamw_step step = {.9f, .1f, .99f, .01f, .999f, 1e-2f, 1.5f, 1e-8f};
    outputs both[2] = {0};
    for (int scalar = 0; scalar < 2; scalar++) {
        if (scalar) nl_use_isa("scalar");
        outputs *o = &both[scalar];
        double sum = 0;
        switch (operation) {
        case NORM:
            nl_rms_norm(output_of(o, 0, NULL, n), a, b, 1e-5f, rows, columns, 1);
            nl_rms_norm_backward(output_of(o, 1, NULL, n), output_of(o, 2, NULL, columns), c, a, b, 1e-5f,
                                 rows, columns, 1);
            break;
        case ROTATE: nl_rotate(output_of(o, 0, NULL, n * heads), a, b, rows, heads, columns, 1); break;
        case SWIGLU:
            nl_swiglu(output_of(o, 0, NULL, n), a, b, n, 1);
            nl_swiglu_backward(output_of(o, 1, NULL, n), output_of(o, 2, NULL, n), c, a, b, n, 1);
            break;
        case CROSS_ENTROPY:
            nl_cross_entropy(output_of(o, 0, a, n), output_of(o, 1, NULL, rows), targets, b, rows, columns,
                             1);
            break;
        case ADAMW:
            nl_adamw(output_of(o, 0, a, n), b, output_of(o, 1, c, n), output_of(o, 2, d, n), &step, n, 1);
            break;
        case SQUARES:
            check(nl_squares(&sum, a, n, 1) == 0, "no memory");
            *output_of(o, 0, NULL, 1) = (float)sum;
            break;
        case LORA: {
            const nl_lora_part part = {b, c, .5f, rank, columns, columns};
            const nl_lora_gradients g = {output_of(o, 0, d, n), output_of(o, 1, b, rank * columns),
                                         output_of(o, 2, c, rank * columns), d, a};
            check(nl_lora_backward(&g, &part, rows, 1) == 0, "no memory");
            check(nl_add_lora(output_of(o, 3, d, n), a, &part, rows, 1) == 0, "no memory");
        }
        }
    }
    nl_use_isa(isa);
    check_same(&both[0], &both[1], kind == REAL, 1e-4, "a kernel of training is wrong");
    free(a), free(b), free(c), free(d), free(targets);
}

/* ---------------------------------------------------------------- a whole layer */

typedef struct {
    float *y;
    void *keys[3], *values[3], *scratch;
} layer_room;

static int64_t *any_order(int64_t n) {
    if (number(0, 1)) return NULL;
    int64_t *order = room(8 * n);
    for (int64_t i = 0; i < n; i++) order[i] = i;
    for (int64_t i = n - 1; i > 0; i--) {
        const int64_t j = number(0, i), other = order[j];
        order[j] = order[i], order[i] = other;
    }
    return order;
}

void fuzz_layer(void) {
    enum { MAX_B = 3 };
    choose_isa();
    const char *isa = nl_isa();
    const int kind = (int)number(0, 1) ? REAL : ANY_BITS, cached = CACHED[number(0, 2)];
    const int64_t B = number(1, MAX_B), T = number(1, number(0, 3) ? 3 : 8), tokens = B * T;
    nl_layer_weights w = {.D = number(0, 3) ? number(1, 4) * 32 : 256, .K = number(1, 2), .eps = 1e-5f};
    w.F = number(0, 3) ? number(1, 4) * 32 : 256, w.H = w.K * number(1, 3),
    w.activation_bits = (int[]){8, 15, 32}[number(0, 2)];
    w.Dh = cached == Q8_0 ? QK * number(1, 3) : 2 * number(1, 40);
    while (w.H * w.Dh % 32) w.Dh += 2;
    const int64_t q = w.H * w.Dh, kv = w.K * w.Dh;
    const int64_t shape[7][2] = {{q, w.D},   {kv, w.D},  {kv, w.D}, {w.D, q},
                                 {w.F, w.D}, {w.F, w.D}, {w.D, w.F}};
    const int same = (int)number(0, 1) ? F32 : Q8_0, mixed = (int)number(0, 1);
    for (int i = 0; i < 7; i++) {
        const int format = mixed ? any_format(shape[i][1]) : same;
        const int64_t OUT = shape[i][0], IN = shape[i][1];
        uint8_t *rows = stored(format, OUT * IN, kind);
        w.weight[i] = (nl_matrix){packed(rows, format, OUT, IN), format, OUT, IN};
        if (w.weight[i].data != rows) free(rows);
    }
    float *lora[7][2];
    for (int i = 0; i < 7; i++) {
        const int64_t OUT = shape[i][0], IN = shape[i][1], r = number(0, 1) * number(1, 20);
        lora[i][0] = floats(r * IN, kind), lora[i][1] = floats(r * OUT, kind);
        for (int64_t j = 0; j < (kind == REAL ? r * OUT : 0); j++) lora[i][1][j] /= (float)IN;
        w.lora[i] = (nl_lora){lora[i][0], lora[i][1], r};
        w.rank = r > w.rank ? r : w.rank;
    }
    float *x = floats(tokens * w.D, kind), *norms[2];
    for (int i = 0; i < 2; i++) {
        norms[i] = floats(w.D, kind);
        for (int64_t d = 0; d < (kind == REAL ? w.D : 0); d++) norms[i][d] = 1 + norms[i][d] / 2;
    }
    w.attention_norm = norms[0], w.ffn_norm = norms[1];
    int64_t *orders[2] = {any_order(q), any_order(kv)}, start[MAX_B], head[MAX_B];
    w.q_order = orders[0], w.k_order = orders[1];
    int64_t *columns[7]; /* wq, wk and wv have one order, and so have w_gate and w_up */
    for (int i = 0; i < 7; i++) {
        const int alone = i == 0 || i == 3 || i == 4 || i == 6;
        columns[i] = alone ? any_order(shape[i][1]) : NULL;
        w.columns[i] = alone ? columns[i] : w.columns[i - 1];
    }
    const int64_t each_its_own = number(0, 1), angles = T * w.Dh, window = number(0, 1) * number(1, 20);
    float *freqs = floats((each_its_own ? B : 1) * angles, kind);
    for (int64_t b = 0; b < B; b++) {
        start[b] = number(0, 20);
        head[b] = (start[b] + T) * w.Dh;
    }
    /* At once; in the steps and parts that keep a call short; and, as the oracle, by the scalar forms. */
    layer_room made[3];
    const int64_t parts = number(1, 3);
    uint8_t *old[2][MAX_B];
    for (int64_t b = 0; b < B; b++)
        for (int i = 0; i < 2; i++) {
            float *numbers = floats(w.K * head[b], kind);
            old[i][b] = as_cached(cached, numbers, w.K * head[b]);
            free(numbers);
        }
    int status[3];
    for (int run = 0; run < 3; run++) {
        layer_room *m = &made[run];
        m->y = room(4 * tokens * w.D), m->scratch = room(nl_layers_bytes(&w, NULL, tokens));
        for (int64_t b = 0; b < B; b++) {
            const int64_t bytes = bytes_of(cached, w.K * head[b]);
            m->keys[b] = memcpy(room(bytes), old[0][b], (size_t)bytes);
            m->values[b] = memcpy(room(bytes), old[1][b], (size_t)bytes);
        }
        if (run == 2) nl_use_isa("scalar");
        status[run] = 0;
        const int64_t one_layer[MAX_B] = {0}, dropped[MAX_B] = {0};
        const nl_layer_weights *const weights[] = {&w};
        const nl_layers_args a = {
            .y = m->y,
            .x = x,
            .weights = weights,
            .cache = {m->keys, m->values, cached, w.Dh, head, one_layer, start, dropped, window},
            .freqs_cis = freqs,
            .freqs_cis_stride = each_its_own ? angles : 0,
            .B = B,
            .T = T,
            .scratch = m->scratch,
        };
        for (int step = 0; step < (run == 1 ? NL_STEPS : 1); step++)
            for (int64_t part = 0; part < (run == 1 ? parts : 1) && !status[run]; part++)
                status[run] = nl_layers(&a, run == 1 ? step : 0, run == 1 ? step + 1 : NL_STEPS, part,
                                        run == 1 ? parts : 1, 1);
    }
    nl_use_isa(isa);
    check(status[0] == status[1], "in parts another status");
    if (kind == REAL) {
        check(status[0] == 0 && status[2] == 0, "a layer was refused");
        double largest = 0, error = 0;
        for (int64_t i = 0; i < tokens * w.D; i++) {
            largest = fmax(largest, fabs(made[2].y[i]));
            error = fmax(error, fabs((double)made[0].y[i] - made[2].y[i]));
            check(isfinite(made[0].y[i]), "a layer is not finite");
        }
        check(memcmp(made[0].y, made[1].y, (size_t)(4 * tokens * w.D)) == 0, "in parts other bits");
        /* a number that lies between two steps, of the cache or of the activations, may go either way */
        const double bound = w.activation_bits == 8 || cached == Q8_0   ? 6e-2
                             : w.activation_bits == 32 && cached == F32 ? 1e-4
                                                                        : 1e-2;
        check(error <= bound * largest, "a layer is wrong");
    }
    for (int run = 0; run < 3; run++) {
        for (int64_t b = 0; b < B; b++) free(made[run].keys[b]), free(made[run].values[b]);
        free(made[run].y), free(made[run].scratch);
    }
    for (int i = 0; i < 7; i++) {
        free((void *)(uintptr_t)w.weight[i].data), free(lora[i][0]), free(lora[i][1]);
        free(columns[i]);
    }
    for (int64_t b = 0; b < B; b++) free(old[0][b]), free(old[1][b]);
    free(x), free(norms[0]), free(norms[1]), free(orders[0]), free(orders[1]), free(freqs);
}

/* ---------------------------------------------------------------- convert */

static const int WRITTEN[] = {F32, F16, BF16, Q8_0, Q4_0};

void fuzz_convert(void) {
    const int from = FORMATS[number(0, N_FORMATS - 1)], to = WRITTEN[number(0, 4)];
    const int64_t rows = number(1, 5), whole = is_single(from) && is_single(to) ? 1 : block_weights(from);
    const int64_t unit = is_single(from) && !is_single(to) ? QK : whole,
                  IN = number(1, 600 / unit + 1) * unit;
    const int64_t padded = (IN + QK - 1) / QK * QK; /* single numbers in any number: rows of these bytes */
    const int64_t from_row = row_bytes(from, padded) * IN / padded,
                  to_row = row_bytes(to, padded) * IN / padded;
    uint8_t *some = stored(from, rows * padded, (int)number(0, KINDS - 1));
    uint8_t *src = memcpy(room(rows * from_row), some, (size_t)(rows * from_row)), *dst = room(rows * to_row);
    const int64_t bad = nl_convert(dst, to, src, from, rows, IN, 1);
    int64_t expected = 0;
    const int64_t in_block = is_single(from) ? 1 : block_weights(from),
                  bytes = block_bytes(from) / (is_single(from) ? QK : 1);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < IN; k++) {
            const uint8_t *p = src + r * from_row + k / in_block * bytes, *packed = dst + r * to_row;
            const float w = weight(from, p, (int)(k % in_block / 16), (int)(k % in_block % 16));
            if (!is_single(to)) {
                if (!(fabsf(w) <= 65504) && !expected) expected = r + 1;
                if (expected || (bad && r + 1 >= bad)) continue;
                const uint8_t *block = packed + k / QK * block_bytes(to);
                const double d = fabs(load_f16(block)),
                             f = weight(to, block, (int)(k % QK / 16), (int)(k % 16));
                /* half a step, and 127 times what rounding d to float16 makes; Q4_0 clips the far end */
                const double bound = (to == Q8_0 ? 0.563 : 1.005) * d + 127 * 0x1p-25;
                check_near(f, w, bound, "a block is packed wrongly");
                continue;
            }
            const float f = weight(to, packed + k * (to == F32 ? 4 : 2), 0, 0);
            const double u = to == F32 ? 0 : to == F16 ? 0x1p-11 : 0x1p-8;
            const double least = to == F32 ? 0 : to == F16 ? 0x1p-25 : 0x1p-134;
            if (isnan(w))
                check(isnan(f), "a NaN was lost");
            else if (!isinf(f) || to == F32)
                check_near(f == w ? 0 : (double)f - w, 0, fmax(u * fabs((double)w), least),
                           "a number is wrong");
            else
                check(fabsf(w) >= (to == F16 ? 65520 : 0x1.ffp127f), "infinite too soon");
        }
    check(bad == expected, "the wrong row is refused");
    free(some), free(src), free(dst);
}

/* ---------------------------------------------------------------- exp */

void fuzz_exp(void) {
    choose_isa();
    const int64_t n = number(0, 70);
    float *x = floats(n, (int)number(0, KINDS - 1)), *y = room(4 * n);
    nl_exp(y, x, n);
    for (int64_t i = 0; i < n; i++) {
        if (isnan(x[i])) check(isnan(y[i]), "exp lost a NaN");
        if (x[i] < -87) check(y[i] == 0, "exp below -87 is not 0");
        if (!(x[i] >= -87 && x[i] <= 88)) continue; /* beyond 88 nothing is promised */
        const double expected = exp(x[i]), unit = ldexp(1, ilogb(expected) - 23);
        check_near(y[i], expected, 2 * unit, "exp is wrong");
    }
    free(x), free(y);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    at = data, behind = data + size, state = size;
    TARGET();
    return 0;
}

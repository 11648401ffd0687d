/* Every kernel with every instruction set of this machine, on the same numbers everywhere: one hash a line.
 *
 *     avx2 attention F16 5d7e0c6c1ff4a8c9
 *
 * The scalar lines are those of golden.txt with every compiler, system and processor, and the lines of one
 * instruction set are alike wherever it runs. test_same_bits.py builds and compares. */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

enum { OUT = 48, IN = 512, T_MOST = 40, V = 1003 };
enum { H = 4, K = 2, Dh = 64, S = 2100 }; /* three spans of attention */

static uint32_t state;
static uint32_t next(void) {
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}
/* From -1 to 1, with 15 bits. */
static float number(void) { return (float)((int)(next() & 0xffff) - 0x8000) / 32768; }

static float *numbers(int64_t n, float scale) {
    float *x = calloc((size_t)n, sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = scale * number();
    return x;
}

static uint64_t hash;
static void add(const void *data, int64_t nbytes) { /* FNV-1a */
    for (int64_t i = 0; i < nbytes; i++) hash = (hash ^ ((const uint8_t *)data)[i]) * 1099511628211u;
}
static void add_floats(const float *x, int64_t n) { add(x, n * (int64_t)sizeof *x); }

static void begin(void) { hash = 14695981039346656037u, state = 1; }
static void line(const char *kernel, const char *format) {
    printf("%s %s%s%s %016" PRIx64 "\n", nl_isa(), kernel, *format ? " " : "", format, hash);
}

/* A matrix (OUT, IN) of that format, as the kernels take it. */
static nl_matrix matrix(const nl_format *f) {
    const int64_t blocks = OUT * IN / f->weights;
    const int is_fp8 = !strcmp(f->name, "FP8"); /* without NaN */
    uint8_t *stored = malloc((size_t)(OUT * IN * 4)), *packed = malloc((size_t)(OUT * IN * 4));
    float *x = numbers(OUT * IN, 0.5f);
    if (nl_convert(stored, f->code, x, nl_format_at(0)->code, OUT, IN, 1) != 0)
        for (int64_t b = 0; b < blocks; b++) { /* any bytes, but scales that are neither large nor small */
            uint8_t *block = stored + b * f->bytes;
            for (int i = 0; i < f->bytes; i++) block[i] = (uint8_t)(next() & (is_fp8 ? 0xbf : 0xff));
            const uint16_t half = (uint16_t)(0x2000 + (next() & 0x3ff));
            const float d32 = (float)(1 + next() % 64) / 4096;
            if (f->d >= 0) memcpy(block + f->d, &half, sizeof half);
            if (f->m >= 0) memcpy(block + f->m, &half, sizeof half);
            if (f->d32 >= 0) memcpy(block + f->d32, &d32, sizeof d32);
        }
    const int is_packed = nl_pack(packed, stored, f->code, OUT, IN, 1) == 0;
    free(is_packed ? stored : packed);
    free(x);
    return (nl_matrix){is_packed ? packed : stored, f->code, OUT, IN};
}

static void linear(const nl_format *f) {
    static float y[T_MOST * OUT];
    begin();
    const nl_matrix w = matrix(f);
    float *x = numbers(T_MOST * IN, 3);
    void *activations = malloc((size_t)nl_activations_bytes(T_MOST, IN));
    const int tokens[] = {1, 3, 8, 9, T_MOST};
    for (int i = 0; i < 5; i++) {
        nl_linear(y, x, tokens[i], &w, 0, OUT, 1);
        add_floats(y, tokens[i] * OUT);
        nl_linear_exact(y, x, tokens[i], &w, 0, OUT, 1);
        add_floats(y, tokens[i] * OUT);
        for (int bits = 8; bits <= 15 && nl_quantizes_activations(f->code, tokens[i]); bits += 7) {
            nl_quantize_activations(activations, x, f->code, bits, tokens[i], IN, 1);
            nl_linear_quantized(y, activations, tokens[i], &w, 0, OUT, 1);
            add_floats(y, tokens[i] * OUT);
        }
    }
    line("linear", f->name);
    free(activations), free(x), free((void *)w.data);
}

/* The last T of S positions, in dense arrays. */
static nl_attention_args arguments(float *out, const float *q, const void *k, const void *v,
                                   const nl_format *f, int64_t T, int64_t of, float *lse) {
    const int64_t row = K * Dh;
    return (nl_attention_args){
        out, q, k, v, f->code, 1, T, of, H, K, Dh, {of * row, row, Dh}, {of * row, row, Dh}, 0, T, lse, 0, 0};
}

static void attention(const nl_format *f) {
    static float out[20 * H * Dh], lse[H * 20];
    begin();
    float *q = numbers(20 * H * Dh, 4), *kv = numbers(2 * S * K * Dh, 1);
    uint8_t *cached = malloc((size_t)(2 * S * K * Dh * 4));
    nl_convert(cached, f->code, kv, nl_format_at(0)->code, 2 * S * K, Dh, 1);
    const int64_t row = K * Dh, half = S * row / f->weights * f->bytes;
    for (int64_t T = 1; T <= 20; T += 19) {
        const nl_attention_args a = arguments(out, q, cached, cached + half, f, T, S, lse);
        nl_attention(&a, 1);
        add_floats(out, T * H * Dh), add_floats(lse, H * T);
    }
    line("attention", f->name);
    free(q), free(kv), free(cached);
}

static void attention_backward(void) {
    enum { T = 200 };
    begin();
    float *q = numbers(T * H * Dh, 3), *k = numbers(T * K * Dh, 1), *v = numbers(T * K * Dh, 1);
    float *dout = numbers(T * H * Dh, 1), *out = numbers(T * H * Dh, 0), *lse = numbers(H * T, 0);
    float *dq = numbers(T * H * Dh, 0), *dk = numbers(T * K * Dh, 0), *dv = numbers(T * K * Dh, 0);
    const int64_t row = K * Dh;
    const nl_attention_args a = arguments(out, q, k, v, nl_format_at(0), T, T, lse);
    nl_attention(&a, 1);
    const nl_attention_backward_args b = {dq, dk, dv, dout, q, k, v, out, lse, 1, T, H, K, Dh, 0, T};
    nl_attention_backward(&b, 1);
    add_floats(dq, T * H * Dh), add_floats(dk, T * row), add_floats(dv, T * row);
    line("attention_backward", "");
    free(q), free(k), free(v), free(dout), free(out), free(lse), free(dq), free(dk), free(dv);
}

static void linear_backward(void) {
    begin();
    float *w = numbers(OUT * IN, 0.5f), *x = numbers(T_MOST * IN, 3), *dy = numbers(T_MOST * OUT, 1);
    float *dx = numbers(T_MOST * IN, 0), *dw = numbers(OUT * IN, 0), *y = numbers(T_MOST * OUT, 0);
    const nl_matrix m = {w, nl_format_at(0)->code, OUT, IN};
    nl_linear_y(y, x, T_MOST, &m, 0, OUT, 1);
    nl_linear_dx(dx, dy, T_MOST, &m, IN, 0, OUT, 1);
    nl_linear_dw(dw, dy, x, T_MOST, OUT, IN, 0, OUT, 0, 1);
    add_floats(y, T_MOST * OUT), add_floats(dx, T_MOST * IN), add_floats(dw, OUT * IN);
    line("linear_backward", "");
    free(w), free(x), free(dy), free(dx), free(dw), free(y);
}

/* Number by number: the operations of a block, and of training. */
static void elementwise(void) {
    enum { N = 4096, ROWS = 8, D = 512 };
    begin();
    float *x = numbers(N, 90), *y = numbers(N, 0);
    for (int i = 0; i < N; i++) x[i] = x[i] > 0 ? -x[i] : x[i];
    nl_exp(y, x, N), add_floats(y, N), line("exp", "");
    free(x), x = numbers(N, 120);
    float *up = numbers(N, 1);
    begin(), nl_swiglu(y, x, up, N, 1), add_floats(y, N), line("swiglu", "");

    float *dgate = numbers(N, 0), *dup = numbers(N, 0), *weight = numbers(D, 1);
    begin(), nl_swiglu_backward(dgate, dup, weight, x, x + D, D, 1);
    add_floats(dgate, D), add_floats(dup, D), line("swiglu_backward", "");
    begin(), nl_rms_norm(y, x, weight, 1e-5f, ROWS, D, 1), add_floats(y, N), line("rms_norm", "");
    begin(), memset(dup, 0, D * sizeof *dup);
    nl_rms_norm_backward(dgate, dup, y, x, weight, 1e-5f, ROWS, D, 1);
    add_floats(dgate, N), add_floats(dup, D), line("rms_norm_backward", "");
    begin(), nl_rotate(y, x, weight, D / Dh, N / D, Dh, 1), add_floats(y, N), line("rotate", "");

    begin();
    float *z = numbers(3 * V, 20), loss[3], weights[] = {1, 0.5f, 0.25f};
    const int64_t targets[] = {5, V - 1, 0};
    nl_cross_entropy(z, loss, targets, weights, 3, V, 1);
    add_floats(loss, 3), add_floats(z, 3 * V), line("cross_entropy", "");
    const nl_adamw_step step = {0.9f, 0.1f, 0.95f, 0.05f, 0.999f, 1e-3f, 1.5f, 1e-8f};
    begin(), memset(dup, 0, D * sizeof *dup);
    nl_adamw(y, up, dgate, dup, &step, D, 1), add_floats(y, D), add_floats(dup, D), line("adamw", "");
    double sum;
    begin(), nl_squares(&sum, x, N, 1), add(&sum, sizeof sum), line("squares", "");
    free(x), free(y), free(up), free(dgate), free(dup), free(weight), free(z);
}

int main(void) {
    const nl_format *f;
    for (int isa = 0; nl_isa_name(isa); isa++) {
        nl_use_isa(nl_isa_name(isa));
        for (int i = 0; (f = nl_format_at(i)); i++) linear(f);
        for (int i = 0; (f = nl_format_at(i)); i++)
            if (!strcmp(f->name, "F32") || !strcmp(f->name, "F16") || !strcmp(f->name, "Q8_0")) attention(f);
        attention_backward();
        linear_backward();
        elementwise();
    }
    return 0;
}

/* layer: a whole TransformerBlock in one call, so that nothing between the kernels costs anything.
 *
 *          x (T, D)
 *          |-------- norm -- q k v -- rope -- cache -- attention -- wo
 *          h = x  +  ------------------------------------------------'
 *          |-------- norm -- gate up -- swiglu -- down
 *          y = h  +  --------------------------------'
 *
 * A token of a small model is 30 layers of 100 us, and each function called from Python costs some of them;
 * and with many tokens NumPy's exp alone would take a quarter of the time. The products are those of
 * linear.c and attention.c. What lies between them is here, a few numbers for each row of a matrix:
 * it need not be clever, only shared by the threads.
 *
 * All threads walk the same steps, each doing its share, and wait for each other between two of them. A share
 * is rows of a weight, tokens or heads: so no number is touched by two threads in one step. That x is rounded
 * once for q, k and v, and once for gate and up, is a step of its own.
 *
 * Compiled once as it stands: the loop over threads and the scalar forms. Compiled once more for each
 * instruction set: the part under VECTOR_FORMS (README.md). tests/test_layer.py holds every form to the layer
 * of model.py. */
#include "dispatch.h"
#include "formats.h"
#include "vec.h"

#ifndef VECTOR_FORMS
#ifdef _OPENMP
#include <omp.h>
#endif

/* The places of a layer's weights; and its steps. */
enum { WQ, WK, WV, WO, W_GATE, W_UP, W_DOWN };
enum { NORM_X, QKV, ROPE, ATTEND, ROUND_SEEN, ADD_SEEN, NORM_H, WIDEN, ROUND_WIDE, ADD_WIDE, STEPS };
enum { MAX_DH = 256, LINE = 64 };

typedef struct {
    const nl_layer_weights *w;
    const kernels *kernel;
    const float *x, *freqs_cis;
    void *const *keys, *const *values;
    const int64_t *head, *start;
    int64_t angles, position, B, T, tokens; /* tokens = B * T: only in heads it counts whose they are */
    int cache_format;
    float *normed, *q_rows, *k_rows, *v_rows, *q, *seen, *h, *gate, *up, *y;
    uint8_t *fixed, *fixed_wide;
    int *beyond; /* set when float16 cannot hold a key or value */
} pass;

typedef struct {
    int64_t from, to;
} share;

/* What worker i of n does of `all`, in whole units. */
static share share_of(int64_t all, int64_t unit, int64_t i, int64_t n) {
    const int64_t size = ((all + n - 1) / n + unit - 1) / unit * unit;
    const int64_t from = i * size < all ? i * size : all;
    return (share){from, all - from < size ? all : from + size};
}

/* Room behind *end, from a cache line on. */
static void *room(uint8_t **end, int64_t bytes) {
    uint8_t *begin = *end;
    *end += (bytes + LINE - 1) / LINE * LINE;
    return begin;
}

/* Gives each intermediate result its room; -> where the last one ends. */
static uint8_t *lay_out(pass *p, uint8_t *scratch) {
    const nl_layer_weights *w = p->w;
    const int64_t T = p->tokens * (int64_t)sizeof(float);
    uint8_t *end = scratch + (LINE - (uintptr_t)scratch % LINE) % LINE;
    p->normed = room(&end, T * w->D);
    p->q_rows = room(&end, T * w->H * w->Dh);
    p->k_rows = room(&end, T * w->K * w->Dh);
    p->v_rows = room(&end, T * w->K * w->Dh);
    p->q = room(&end, T * w->H * w->Dh);
    p->seen = room(&end, T * w->H * w->Dh);
    p->h = room(&end, T * w->D);
    p->gate = room(&end, T * w->F);
    p->up = room(&end, T * w->F);
    p->fixed = room(&end, 3 * nl_activations_bytes(p->tokens, w->D));
    p->fixed_wide = room(&end, nl_activations_bytes(p->tokens, w->F > w->H * w->Dh ? w->F : w->H * w->Dh));
    return end;
}

int64_t nl_layer_bytes(const nl_layer_weights *w, int64_t tokens) {
    pass p = {.w = w, .tokens = tokens};
    uint8_t base[1];
    return lay_out(&p, base) - base + LINE;
}

/* Whether that weight wants x in fixed point. */
static int is_fixed(const pass *p, int weight) {
    return !p->w->exact && nl_quantizes_activations(p->w->format[weight], p->tokens);
}

/* The weights that are multiplied with the same x: q, k and v; gate and up. Of each the first. */
static const int first_of[] = {WQ, WQ, WQ, WO, W_GATE, W_GATE, W_DOWN};

/* The first of them in the same format: those share x in fixed point. */
static int first_like(const pass *p, int weight) {
    int first = first_of[weight];
    while (p->w->format[first] != p->w->format[weight]) first++;
    return first;
}

static uint8_t *fixed_for(const pass *p, int weight) {
    if (weight == WO || weight == W_DOWN) return p->fixed_wide;
    return p->fixed + (first_like(p, weight) - first_of[weight]) * nl_activations_bytes(p->tokens, p->w->D);
}

/* x in fixed point, tokens `s` of it, for the weights first .. last. */
static void round_tokens(const pass *p, share s, const float *x, int64_t IN, int first, int last) {
    const int64_t some = group_tokens(p->tokens);
    for (int i = first; i <= last; i++)
        if (is_fixed(p, i) && first_like(p, i) == i)
            for (int64_t t = s.from; t < s.to; t += some)
                p->kernel->quantize_activations(fixed_for(p, i), x, p->w->format[i], p->tokens, IN, t / some);
}

static void norm_tokens(const pass *p, share s, const float *x, const float *weight, int first, int last) {
    const int64_t D = p->w->D;
    for (int64_t t = s.from; t < s.to; t++)
        p->kernel->norm(p->normed + t * D, x + t * D, weight, p->w->eps, D);
    round_tokens(p, s, p->normed, D, first, last);
}

/* y[:, s] = (x @ weight.T)[:, s] */
static void multiply(const pass *p, share s, float *y, const float *x, int weight, int64_t OUT, int64_t IN) {
    const int fixed = is_fixed(p, weight), format = p->w->format[weight];
    const linear_args a = {.y = y,
                           .x = fixed ? (const void *)fixed_for(p, weight) : x,
                           .T = p->tokens,
                           .w = {p->w->weight[weight], format, OUT, IN}};
    linear_rows *const floats = p->w->exact ? p->kernel->linear_exact : p->kernel->linear;
    if (s.from < s.to) (fixed ? p->kernel->linear_quantized : floats)(&a, s.from, s.to);
}

static void add(const pass *p, share s, float *y, const float *x) {
    for (int64_t t = 0; t < p->tokens; t++)
        for (int64_t d = s.from; d < s.to; d++) y[t * p->w->D + d] += x[t * p->w->D + d];
}

/* Heads of q, then of k, then of v: turned, but for v, and put where attention reads them. */
static void store_heads(const pass *p, share s) {
    const nl_layer_weights *w = p->w;
    const int64_t H = w->H, K = w->K, Dh = w->Dh, size = p->cache_format == F16 ? 2 : 4;
    for (int64_t i = s.from; i < s.to; i++) {
        const int64_t token = i / (H + 2 * K), head = i % (H + 2 * K), b = token / p->T, t = token % p->T;
        const int is_q = head < H, is_v = head >= H + K;
        const int64_t h = is_q ? head : is_v ? head - H - K : head - H;
        const float *row =
            is_q ? p->q_rows + token * H * Dh : (is_v ? p->v_rows : p->k_rows) + token * K * Dh;
        const int64_t *order = is_q ? w->q_order : is_v ? NULL : w->k_order;
        uint8_t *to = (uint8_t *)(is_v ? p->values[b] : p->keys[b]) +
                      ((p->start[b] + t) * p->position + h * p->head[b]) * size;
        if (is_q) to = (uint8_t *)(p->q + (token * H + h) * Dh);
        float in_order[MAX_DH];
        if (order)
            for (int64_t d = 0; d < Dh; d++) in_order[d] = row[order[h * Dh + d]];
        p->kernel->store_head(to, is_q ? F32 : p->cache_format, order ? in_order : row + h * Dh,
                              is_v ? NULL : p->freqs_cis + b * p->angles + t * Dh, Dh);
        int beyond = 0;
        for (int64_t d = 0; d < (!is_q && p->cache_format == F16 ? Dh : 0); d++)
            beyond |= (load_u16(to + 2 * d) & 0x7fff) == 0x7c00;
        if (beyond) {
#pragma omp atomic write
            *p->beyond = 1;
        }
    }
}

/* The share of worker i of n in a step. */
static void do_step(const pass *p, int step, int64_t i, int64_t n) {
    const nl_layer_weights *w = p->w;
    const int64_t D = w->D, H_Dh = w->H * w->Dh, K_Dh = w->K * w->Dh, F = w->F;
    const share tokens = share_of(p->tokens, group_tokens(p->tokens), i, n), of_D = share_of(D, QK, i, n),
                of_q = share_of(H_Dh, QK, i, n), of_kv = share_of(K_Dh, QK, i, n),
                of_F = share_of(F, QK, i, n);
    switch (step) {
    case NORM_X: norm_tokens(p, tokens, p->x, w->attention_norm, WQ, WV); break;
    case QKV:
        multiply(p, of_q, p->q_rows, p->normed, WQ, H_Dh, D);
        multiply(p, of_kv, p->k_rows, p->normed, WK, K_Dh, D);
        multiply(p, of_kv, p->v_rows, p->normed, WV, K_Dh, D);
        break;
    case ROPE: store_heads(p, share_of(p->tokens * (w->H + 2 * w->K), 1, i, n)); break;
    case ROUND_SEEN: round_tokens(p, tokens, p->seen, H_Dh, WO, WO); break;
    case ADD_SEEN:
        multiply(p, of_D, p->h, p->seen, WO, D, H_Dh);
        add(p, of_D, p->h, p->x);
        break;
    case NORM_H: norm_tokens(p, tokens, p->h, w->ffn_norm, W_GATE, W_UP); break;
    case WIDEN:
        multiply(p, of_F, p->gate, p->normed, W_GATE, F, D);
        multiply(p, of_F, p->up, p->normed, W_UP, F, D);
        for (int64_t t = 0; t < p->tokens; t++)
            p->kernel->swiglu(p->gate + t * F + of_F.from, p->up + t * F + of_F.from, of_F.to - of_F.from);
        break;
    case ROUND_WIDE: round_tokens(p, tokens, p->gate, F, W_DOWN, W_DOWN); break;
    case ADD_WIDE:
        multiply(p, of_D, p->y, p->gate, W_DOWN, D, F);
        add(p, of_D, p->y, p->h);
        break;
    }
}

static void do_steps(const pass *p, int first, int last, int64_t part, int64_t parts, int threads) {
    if (first >= last) return;
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t i = 0, n = 1;
#ifdef _OPENMP
        i = omp_get_thread_num(), n = omp_get_num_threads();
#endif
        for (int step = first; step < last; step++) {
            do_step(p, step, part * n + i, parts * n);
            if (step + 1 < last) {
#pragma omp barrier
            }
        }
    }
}

int nl_layer(float *y, const float *x, const nl_layer_weights *w, const float *freqs_cis, int64_t angles,
             void *const *keys, void *const *values, int cache_format, int64_t position, const int64_t *head,
             int64_t B, int64_t T, const int64_t *start, void *scratch, int first, int last, int64_t part,
             int64_t parts, int threads) {
    int status = 0;
    for (int i = WQ; i <= W_DOWN; i++)
        if (!is_known(w->format[i])) return NL_UNKNOWN_FORMAT;
    pass p = {.w = w, .kernel = chosen_kernels(), .x = x, .y = y, .freqs_cis = freqs_cis, .angles = angles};
    p.keys = keys, p.values = values, p.cache_format = cache_format, p.position = position, p.head = head;
    p.B = B, p.T = T, p.tokens = B * T, p.start = start, p.beyond = &status;
    lay_out(&p, scratch);
    do_steps(&p, first, last < ATTEND ? last : ATTEND, part, parts, threads);
    for (int64_t b = 0; b < (first <= ATTEND && ATTEND < last ? B : 0) && status == 0; b++) {
        const int64_t strides[3] = {0, position, head[b]}, at = b * T * w->H * w->Dh;
        status =
            nl_attention(p.seen + at, p.q + at, keys[b], values[b], cache_format, 1, T, start[b] + T, w->H,
                         w->K, w->Dh, strides, strides, T * part / parts, T * (part + 1) / parts, threads);
    }
    if (status == 0) do_steps(&p, first > ATTEND ? first : ATTEND + 1, last, part, parts, threads);
    return status;
}

/* ---------------------------------------------------------------- scalar: the definition in C */

/* y = x / sqrt(mean(x^2) + eps) * weight */
void norm_scalar(float *y, const float *x, const float *weight, float eps, int64_t D) {
    float squares = 0;
    for (int64_t d = 0; d < D; d++) squares += x[d] * x[d];
    const float root = sqrtf(squares / (float)D + eps);
    for (int64_t d = 0; d < D; d++) y[d] = x[d] / root * weight[d];
}

/* gate = gate / (1 + exp(-gate)) * up; in float64, for exp(89) is no float32. */
void swiglu_scalar(float *gate, const float *up, int64_t n) {
    for (int64_t i = 0; i < n; i++) gate[i] = (float)(gate[i] / (1 + exp(-(double)gate[i]))) * up[i];
}

/* Each pair (a, b), read as a + bi, times its c + di; without angles as it is. Stored as F32 or F16. */
void store_head_scalar(uint8_t *to, int format, const float *x, const float *angles, int64_t Dh) {
    for (int64_t i = 0; i < Dh; i += 2) {
        float a = x[i], b = x[i + 1];
        if (angles) {
            const float c = angles[i], d = angles[i + 1], real = a * c - b * d;
            b = a * d + b * c, a = real;
        }
        if (format == F16) {
            const uint16_t halves[2] = {float_to_half(a), float_to_half(b)};
            memcpy(to + 2 * i, halves, sizeof halves);
        } else {
            const float floats[2] = {a, b};
            memcpy(to + 4 * i, floats, sizeof floats);
        }
    }
}

#else
/* ---------------------------------------------------------------- vectors
 *
 * The same, LANES at a time. D and F are multiples of 32 (kernels.py sees to it), Dh need not be one of
 * LANES. */

VEC_TARGET void VEC(norm)(float *y, const float *x, const float *weight, float eps, int64_t D) {
    vec squares = vec_zero();
    for (int64_t d = 0; d < D; d += LANES) squares = vec_fma(vec_load(x + d), vec_load(x + d), squares);
    const vec root = vec_all(sqrtf(vec_sum(squares) / (float)D + eps));
    for (int64_t d = 0; d < D; d += LANES)
        vec_store(y + d, vec_mul(vec_div(vec_load(x + d), root), vec_load(weight + d)));
}

/* gate / (1 + e^-gate) * up. Below -80, where e^-gate soon is no float32 any more, 1 and e^-gate are 2^32
 * times as small until the end; from -110 on the result is 0. */
VEC_TARGET void VEC(swiglu)(float *gate, const float *up, int64_t n) {
    const vec far = vec_all(-80), lowest = vec_all(-110);
    for (int64_t i = 0; i < n; i += LANES) {
        const vec x = vec_load(gate + i), minus = vec_sub(vec_zero(), vec_max(lowest, x));
        const vec one = vec_add(vec_zero_below(x, far, vec_all(1)), vec_all(0x1p-32f));
        vec power;
        const vec p = exp_parts(vec_max(vec_all(-87), minus), &power);
        const vec share = vec_div(x, vec_add(one, vec_times_2_to(power, vec_mul(p, one))));
        vec_store(gate + i, vec_mul(vec_mul(share, vec_zero_below(x, lowest, one)), vec_load(up + i)));
    }
}

VEC_TARGET void VEC(store_head)(uint8_t *to, int format, const float *x, const float *angles, int64_t Dh) {
    int64_t i = 0;
    for (; i + LANES <= Dh; i += LANES) {
        const vec a = vec_load(x + i), b = angles ? vec_times_complex(a, vec_load(angles + i)) : a;
        if (format == F16)
            vec_store_f16(to + 2 * i, b);
        else
            vec_store((float *)(void *)(to + 4 * i), b);
    }
    if (i < Dh)
        store_head_scalar(to + (format == F16 ? 2 : 4) * i, format, x + i, angles ? angles + i : NULL,
                          Dh - i);
}
#endif

/* layer: TransformerBlocks of model.py, one after another, in one call.
 *
 *     h = x + attention(attention_norm(x))         wq wk wv, RoPE, KV cache, attention, wo
 *     y = h + feed_forward(ffn_norm(h))            w_gate w_up, SwiGLU, w_down
 *
 * Why one call: a small model computes a layer in 100 us, and a call from Python takes 30 us. For many
 * tokens, NumPy's exp alone would take a quarter of the time.
 * The matrix products are those of linear.c, and attention is that of attention.c. The rest is here. It is
 * little work beside the products, so it only needs to be shared by the threads.
 *
 * All threads walk the same steps (kernels.h) with a barrier between two steps. In one step each thread
 * computes its own range of weight rows, of tokens or of heads, so no number is written by two threads.
 *
 *     step                          computes                                   a thread's range
 *     NL_ATTENTION_NORM             normed = attention_norm(x), quantized      tokens
 *     NL_QKV                        xq, xk, xv                                 rows of wq wk wv
 *     NL_ROPE_AND_CACHE             q, keys, values                            heads of all tokens
 *     NL_ATTENTION                  attention_output                           nl_attention decides
 *     NL_QUANTIZE_ATTENTION_OUTPUT  attention_output, quantized                tokens
 *     NL_WO_ADD_RESIDUAL            h                                          rows of wo
 *     NL_FFN_NORM                   normed = ffn_norm(h), quantized            tokens
 *     NL_GATE_UP_SWIGLU             gate = swiglu(gate, up)                    rows of w_gate w_up
 *     NL_QUANTIZE_SWIGLU            gate, quantized                            tokens
 *     NL_W_DOWN_ADD_RESIDUAL        y                                          rows of w_down
 *
 * With a cut (nl_cut) this process has some rows of every weight, and other ranks have the others. A step
 * with a product writes its part of an activation into the exchange. Behind the gather the next step reads
 * all parts:
 *
 *     written by                in the exchange             read by
 *     NL_ATTENTION              attention_output            NL_QUANTIZE_ATTENTION_OUTPUT
 *     NL_WO_ADD_RESIDUAL        h                           NL_FFN_NORM
 *     NL_GATE_UP_SWIGLU         gate                        NL_QUANTIZE_SWIGLU
 *     NL_W_DOWN_ADD_RESIDUAL    y                           the next NL_ATTENTION_NORM, or the caller
 *
 * A weight may have an update by LoRA (nl_lora). The step that quantizes x computes low = x @ a.T too, and
 * the step that multiplies adds low @ b.
 *
 * Compiled once as it stands: the steps, with their loop over threads, and the scalar forms. Compiled once
 * more for each instruction set: the part under VECTOR_FORMS (README.md). tests/kernels/test_layer.py
 * compares every form with the layer of model.py. */
#include "dispatch.h"
#include "exp_log.h"
#include "formats.h"
#include "vec.h"

#ifndef VECTOR_FORMS
#ifdef _OPENMP
#include <omp.h>
#endif

/* The indices of nl_layer_weights.weight. */
enum { WQ, WK, WV, WO, W_GATE, W_UP, W_DOWN };
enum { CACHE_LINE = 64 };

/* One layer of a call: the arguments, and the activations in the scratch. tokens = B * T. Only
 * NL_ROPE_AND_CACHE and NL_ATTENTION work by sequence; every other step takes all tokens alike. */
typedef struct {
    const nl_layers_args *a;
    int64_t layer;
    const nl_layer_weights *w; /* of this layer */
    const float *x;            /* its input: of the first layer a->x, of all others a->y */
    const kernels *kernel;
    int64_t tokens;
    float *normed;           /* (tokens, D)      attention_norm(x), then ffn_norm(h) */
    float *xq, *xk, *xv;     /* (tokens, H * Dh), (tokens, K * Dh) twice: rows in stored order */
    float *q;                /* (tokens, H, Dh)  rotated */
    float *attention_output; /* (tokens, H * Dh) */
    float *h;                /* (tokens, D) */
    float *gate, *up;        /* (tokens, F) */
    float *wo_x, *w_down_x; /* what they multiply: attention_output and gate; with a cut those of all ranks */
    float *sorted;          /* up to (tokens, F): x in the order of the columns of a weight */
    float *low;             /* up to three of (tokens, rank): x @ a.T of LoRA */
    uint8_t *quantized_normed; /* up to three: one for each format of the weights that multiply it */
    uint8_t *quantized_wide;   /* attention_output, then gate */
    int *status;               /* NL_F16_OVERFLOW when float16 cannot hold a key or value */
} layer_call;

static int has_columns(const nl_layer_weights *w) {
    int found = 0;
    for (int i = WQ; i <= W_DOWN; i++) found |= w->columns[i] != NULL;
    return found;
}

/* Memory for an array behind *end. It begins on a cache line. */
static void *allocate(uint8_t **end, int64_t bytes) {
    uint8_t *begin = *end;
    *end += (bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
    return begin;
}

/* Places every activation in the scratch. Returns where the last one ends. */
static uint8_t *allocate_activations(layer_call *c, const nl_cut *cut, uint8_t *scratch) {
    const nl_layer_weights *w = c->w;
    const int64_t H_Dh = w->H * w->Dh, K_Dh = w->K * w->Dh;
    const int64_t wide = w->weight[WO].IN > w->weight[W_DOWN].IN ? w->weight[WO].IN : w->weight[W_DOWN].IN;
    const int64_t column = c->tokens * (int64_t)sizeof(float);
    uint8_t *end = scratch + (CACHE_LINE - (uintptr_t)scratch % CACHE_LINE) % CACHE_LINE;
    c->normed = allocate(&end, column * w->D);
    c->xq = allocate(&end, column * H_Dh);
    c->xk = allocate(&end, column * K_Dh);
    c->xv = allocate(&end, column * K_Dh);
    c->q = allocate(&end, column * H_Dh);
    c->attention_output = allocate(&end, column * H_Dh);
    c->h = allocate(&end, column * w->D);
    c->gate = allocate(&end, column * w->F);
    c->up = allocate(&end, column * w->F);
    c->wo_x = cut ? allocate(&end, column * wide) : c->attention_output;
    c->w_down_x = cut ? c->wo_x : c->gate;
    c->sorted = allocate(&end, has_columns(w) ? column * (w->D > wide ? w->D : wide) : 0);
    c->low = allocate(&end, 3 * column * w->rank);
    c->quantized_normed = allocate(&end, 3 * nl_activations_bytes(c->tokens, w->D));
    c->quantized_wide = allocate(&end, nl_activations_bytes(c->tokens, wide));
    return end;
}

int64_t nl_layers_bytes(const nl_layer_weights *w, const nl_cut *cut, int64_t tokens) {
    layer_call c = {.w = w, .tokens = tokens};
    uint8_t base[1];
    return allocate_activations(&c, cut, base) - base + CACHE_LINE;
}

/* ---------------------------------------------------------------- quantized activations */

/* Whether that weight is multiplied with quantized activations. */
static int takes_quantized(const layer_call *c, int weight) {
    return c->w->activation_bits < 32 && nl_quantizes_activations(c->w->weight[weight].format, c->tokens);
}

/* wq, wk and wv multiply the same activations, and so do w_gate and w_up: the first such weight of each. */
static const int FIRST_WITH_SAME_X[] = {WQ, WQ, WQ, WO, W_GATE, W_GATE, W_DOWN};

/* The first of them in the same format. Weights in one format share their quantized activations. */
static int first_in_same_format(const layer_call *c, int weight) {
    int first = FIRST_WITH_SAME_X[weight];
    while (c->w->weight[first].format != c->w->weight[weight].format) first++;
    return first;
}

static uint8_t *quantized_for(const layer_call *c, int weight) {
    if (weight == WO || weight == W_DOWN) return c->quantized_wide;
    const int place = first_in_same_format(c, weight) - FIRST_WITH_SAME_X[weight];
    return c->quantized_normed + place * nl_activations_bytes(c->tokens, c->w->D);
}

/* ---------------------------------------------------------------- LoRA: y += (x @ a.T) @ b */

/* low of a weight: (tokens, r). */
static float *low_of(const layer_call *c, int weight) {
    return c->low + (weight - FIRST_WITH_SAME_X[weight]) * c->tokens * c->w->rank;
}

/* low[tokens] = x[tokens] @ a.T for the weights first .. last */
static void project(const layer_call *c, range tokens, const float *x, int64_t IN, int first, int last) {
    for (int weight = first; weight <= last; weight++) {
        const nl_lora *lora = &c->w->lora[weight];
        float *low = low_of(c, weight) + tokens.begin * lora->r;
        c->kernel->project(low, x + tokens.begin * IN, lora->a, 1, tokens.end - tokens.begin, lora->r, IN);
    }
}

/* y[:, rows] += low @ b[:, rows] */
static void update(const layer_call *c, range rows, float *y, int weight) {
    const nl_lora *lora = &c->w->lora[weight];
    if (lora->r)
        c->kernel->update(y, low_of(c, weight), lora->b, c->tokens, lora->r, c->w->weight[weight].OUT, rows);
}

/* ---------------------------------------------------------------- a cut layer: the exchange */

/* What the ranks gather behind a step, and the weight that multiplies it; none multiplies h and y. */
typedef struct {
    int cut, weight;
} gathered;

static gathered gathered_behind(int step) {
    if (step == NL_ATTENTION) return (gathered){NL_HEADS, WO};
    if (step == NL_GATE_UP_SWIGLU) return (gathered){NL_HIDDEN, W_DOWN};
    return (gathered){NL_DIM, -1};
}

/* The format for which an activation is rounded in the exchange: as the weight that multiplies it takes it,
 * and nothing else does. F32: it is not rounded. */
static int exchanged_format(const nl_layer_weights *w, const nl_cut *cut, int64_t tokens, gathered g) {
    if (g.weight < 0 || w->activation_bits == 32) return F32;
    const int format = w->weight[g.weight].format;
    if (!nl_quantizes_activations(format, tokens)) return F32;
    int whole_blocks = w->columns[g.weight] == NULL && w->lora[g.weight].r == 0;
    for (int64_t rank = 0; rank < cut->ranks; rank++) whole_blocks &= cut->widths[g.cut][rank] % QK == 0;
    return whole_blocks ? format : F32;
}

/* The bytes of n numbers. */
static int64_t exchanged_bytes(int format, int64_t n) {
    return format == F32 ? 4 * n : n / QK * NL_ROUNDED_BYTES;
}

int64_t nl_part_bytes(const nl_layer_weights *w, const nl_cut *cut, int64_t tokens, int step, int64_t width) {
    return tokens * exchanged_bytes(exchanged_format(w, cut, tokens, gathered_behind(step)), width);
}

int64_t nl_exchange_bytes(const nl_layer_weights *w, int64_t tokens) {
    const int64_t heads = w->weight[WO].IN, hidden = w->weight[W_DOWN].IN,
                  wide = heads > hidden ? heads : hidden;
    return tokens * 4 * (wide > w->D ? wide : w->D);
}

/* The columns of this rank: of h and y. Without a cut all of them. */
static range own_columns(const layer_call *c) {
    const nl_cut *cut = c->a->cut;
    if (!cut) return (range){0, c->w->D};
    int64_t begin = 0;
    for (int64_t rank = 0; rank < cut->rank; rank++) begin += cut->widths[NL_DIM][rank];
    return (range){begin, begin + cut->widths[NL_DIM][cut->rank]};
}

/* The part of a rank. */
static uint8_t *part_of(const layer_call *c, gathered g, int64_t rank) {
    const nl_cut *cut = c->a->cut;
    const int format = exchanged_format(c->w, cut, c->tokens, g);
    int64_t before = 0;
    for (int64_t i = 0; i < rank; i++) before += cut->widths[g.cut][i];
    return (uint8_t *)cut->exchange + c->tokens * exchanged_bytes(format, before);
}

/* h or y; with a cut this rank's part of it. */
static float *own_part(const layer_call *c, float *whole) {
    return c->a->cut ? (float *)(void *)part_of(c, (gathered){NL_DIM, -1}, c->a->cut->rank) : whole;
}

/* exchange[rank][tokens, columns] = x[tokens, columns], of this rank. Columns are whole blocks. */
static void write_part(const layer_call *c, range tokens, range columns, const float *x, gathered g) {
    const nl_cut *cut = c->a->cut;
    const int64_t width = cut->widths[g.cut][cut->rank], n = columns.end - columns.begin;
    const int format = exchanged_format(c->w, cut, c->tokens, g);
    uint8_t *part = part_of(c, g, cut->rank);
    for (int64_t t = tokens.begin; n > 0 && t < tokens.end; t++) {
        uint8_t *to = part + t * exchanged_bytes(format, width) + exchanged_bytes(format, columns.begin);
        const float *from = x + t * width + columns.begin;
        if (format == F32)
            memcpy(to, from, (size_t)n * sizeof *from);
        else
            c->kernel->round_activations(to, from, format, n);
    }
}

/* x[tokens] = the parts of all ranks side by side. */
static void read_parts(const layer_call *c, range tokens, float *x, gathered g) {
    const nl_cut *cut = c->a->cut;
    const int format = exchanged_format(c->w, cut, c->tokens, g);
    int64_t total = 0, before = 0;
    for (int64_t rank = 0; rank < cut->ranks; rank++) total += cut->widths[g.cut][rank];
    for (int64_t rank = 0; rank < cut->ranks; rank++) {
        const int64_t width = cut->widths[g.cut][rank];
        const uint8_t *part = part_of(c, g, rank);
        for (int64_t t = tokens.begin; t < tokens.end; t++) {
            float *to = x + t * total + before;
            const uint8_t *from = part + t * exchanged_bytes(format, width);
            if (format == F32)
                memcpy(to, from, (size_t)width * sizeof *to);
            else
                c->kernel->restore_activations(to, from, format, width);
        }
        before += width;
    }
}

/* ---------------------------------------------------------------- the steps */

/* Projects the rows `tokens` of x for the updates of the weights first .. last, sorts them by their columns,
 * and quantizes them once for each of their formats. */
static void prepare(const layer_call *c, range tokens, const float *x, int64_t IN, int first, int last) {
    project(c, tokens, x, IN, first, last);
    const int64_t *columns = c->w->columns[first];
    for (int64_t t = tokens.begin; columns && t < tokens.end; t++)
        for (int64_t j = 0; j < IN; j++) c->sorted[t * IN + j] = x[t * IN + columns[j]];
    if (columns) x = c->sorted;
    const int64_t group = group_tokens(c->tokens);
    for (int weight = first; weight <= last; weight++)
        if (takes_quantized(c, weight) && first_in_same_format(c, weight) == weight)
            for (int64_t t = tokens.begin; t < tokens.end; t += group)
                c->kernel->quantize_activations(quantized_for(c, weight), x, c->w->weight[weight].format,
                                                c->w->activation_bits, c->tokens, IN, t / group);
}

/* normed[tokens] = rms_norm(x[tokens], norm_weight), and prepared for the weights first .. last. */
static void norm_and_prepare(const layer_call *c, range tokens, const float *x, const float *norm_weight,
                             int first, int last) {
    const int64_t D = c->w->D;
    for (int64_t t = tokens.begin; t < tokens.end; t++)
        c->kernel->norm(c->normed + t * D, x + t * D, norm_weight, c->w->eps, D);
    prepare(c, tokens, c->normed, D, first, last);
}

/* y[:, rows] = x @ weight[rows].T, and its update */
static void multiply(const layer_call *c, range rows, float *y, const float *x, int weight) {
    const int quantized = takes_quantized(c, weight);
    if (c->w->columns[weight]) x = c->sorted;
    const linear_args a = {.y = y,
                           .x = quantized ? (const void *)quantized_for(c, weight) : x,
                           .T = c->tokens,
                           .w = c->w->weight[weight]};
    linear_rows *const linear = c->w->activation_bits == 32 ? c->kernel->linear_exact : c->kernel->linear;
    if (rows.begin < rows.end) (quantized ? c->kernel->linear_quantized : linear)(&a, rows.begin, rows.end);
    update(c, rows, y, weight);
}

/* y[:, columns] += residual[:, columns]. y has the columns `own` of D. */
static void add_residual(const layer_call *c, range columns, float *y, range own, const float *residual) {
    const int64_t D = c->w->D, width = own.end - own.begin;
    for (int64_t t = 0; t < c->tokens; t++)
        for (int64_t d = columns.begin; d < columns.end; d++)
            y[t * width + d] += residual[t * D + own.begin + d];
}

static void set_f16_overflow(int *status) {
#pragma omp atomic write
    *status = NL_F16_OVERFLOW;
}

/* Whether a float16 of the head at p is infinite: a number of F16, or a scale of Q8_0. */
static int has_infinity(int format, const uint8_t *p, int64_t Dh) {
    const int64_t bytes = format == Q8_0 ? block_bytes(Q8_0) : 2;
    const int64_t n = format == F32 ? 0 : format == F16 ? Dh : Dh / QK;
    int found = 0;
    for (int64_t i = 0; i < n; i++) found |= (load_u16(p + i * bytes) & 0x7fff) == 0x7c00;
    return found;
}

static int all_finite(const float *x, int64_t n) {
    int finite = 1;
    for (int64_t i = 0; i < n; i++) finite &= isfinite(x[i]) != 0;
    return finite;
}

/* For each of these heads: its elements in the model's order, rotated unless it is a value, and stored in q
 * or in the cache. Heads are numbered token by token: H of xq, K of xk, K of xv. */
static void rope_and_cache(const layer_call *c, range heads) {
    const nl_layer_weights *w = c->w;
    const nl_kv_cache *cache = &c->a->cache;
    const int64_t H = w->H, K = w->K, Dh = w->Dh, T = c->a->T;
    for (int64_t i = heads.begin; i < heads.end; i++) {
        const int64_t token = i / (H + 2 * K), head = i % (H + 2 * K), b = token / T, t = token % T;
        const int is_q = head < H, is_v = head >= H + K;
        const int64_t h = is_q ? head : is_v ? head - H - K : head - H;
        const float *stored = is_q ? c->xq + token * H * Dh : (is_v ? c->xv : c->xk) + token * K * Dh;
        const int64_t *order = is_q ? w->q_order : is_v ? NULL : w->k_order;
        uint8_t *to = (uint8_t *)(is_q ? c->q : is_v ? cache->values[b] : cache->keys[b]);
        if (is_q)
            to += (token * H + h) * Dh * (int64_t)sizeof(float);
        else
            to += bytes_of(cache->format,
                           c->layer * cache->layer_stride[b] + h * cache->head_stride[b] +
                               (cache->start[b] - cache->dropped[b] + t) * cache->position_stride);
        const float *x = stored + h * Dh;
        float ordered[NL_MAX_DH];
        if (order) {
            for (int64_t d = 0; d < Dh; d++) ordered[d] = stored[order[h * Dh + d]];
            x = ordered;
        }
        c->kernel->store_head(to, is_q ? F32 : cache->format, x,
                              is_v ? NULL : c->a->freqs_cis + b * c->a->freqs_cis_stride + t * Dh, Dh);
        if (!is_q && has_infinity(cache->format, to, Dh) && all_finite(x, Dh)) set_f16_overflow(c->status);
    }
}

/* One worker's range of one step. Above each step stand the lines of model.py that it computes. */
static void do_step(const layer_call *c, int step, int64_t worker, int64_t workers) {
    const nl_layer_weights *w = c->w;
    const int64_t H_Dh = w->H * w->Dh, K_Dh = w->K * w->Dh, F = w->F;
    const range own = own_columns(c);
    const int cut = c->a->cut != NULL;
    const range tokens = range_of(c->tokens, group_tokens(c->tokens), worker, workers);
    const range rows_of_D = range_of(own.end - own.begin, QK, worker, workers);
    const range rows_of_F = range_of(F, QK, worker, workers);
    const range rows_of_q = range_of(H_Dh, QK, worker, workers);
    const range rows_of_kv = range_of(K_Dh, QK, worker, workers);
    switch (step) {
    case NL_ATTENTION_NORM: /* self.attention_norm(x) */
        if (cut && c->layer > 0) read_parts(c, tokens, c->a->y, gathered_behind(NL_W_DOWN_ADD_RESIDUAL));
        norm_and_prepare(c, tokens, c->x, w->attention_norm, WQ, WV);
        break;
    case NL_QKV: /* xq = self.wq(x);  xk = self.wk(x);  xv = self.wv(x) */
        multiply(c, rows_of_q, c->xq, c->normed, WQ);
        multiply(c, rows_of_kv, c->xk, c->normed, WK);
        multiply(c, rows_of_kv, c->xv, c->normed, WV);
        break;
    case NL_ROPE_AND_CACHE:
        /* xq = F.apply_rotary_emb(xq, freqs_cis);  xk = F.apply_rotary_emb(xk, freqs_cis)
         * keys, values = cache.update(self.layer, start_pos, xk, xv) */
        rope_and_cache(c, range_of(c->tokens * (w->H + 2 * w->K), 1, worker, workers));
        break;
    /* NL_ATTENTION is not here: nl_layers calls nl_attention, which has threads of its own. */
    case NL_QUANTIZE_ATTENTION_OUTPUT: /* (model.py has no such line) */
        if (cut) read_parts(c, tokens, c->wo_x, gathered_behind(NL_ATTENTION));
        prepare(c, tokens, c->wo_x, w->weight[WO].IN, WO, WO);
        break;
    case NL_WO_ADD_RESIDUAL: /* h = x + self.wo(...) */
        multiply(c, rows_of_D, own_part(c, c->h), c->wo_x, WO);
        add_residual(c, rows_of_D, own_part(c, c->h), own, c->x);
        break;
    case NL_FFN_NORM: /* self.ffn_norm(h) */
        if (cut) read_parts(c, tokens, c->h, gathered_behind(NL_WO_ADD_RESIDUAL));
        norm_and_prepare(c, tokens, c->h, w->ffn_norm, W_GATE, W_UP);
        break;
    case NL_GATE_UP_SWIGLU: /* F.swiglu(self.w_gate(x), self.w_up(x)) */
        multiply(c, rows_of_F, c->gate, c->normed, W_GATE);
        multiply(c, rows_of_F, c->up, c->normed, W_UP);
        for (int64_t t = 0; t < c->tokens; t++)
            c->kernel->swiglu(c->gate + t * F + rows_of_F.begin, c->up + t * F + rows_of_F.begin,
                              rows_of_F.end - rows_of_F.begin);
        if (cut) write_part(c, (range){0, c->tokens}, rows_of_F, c->gate, gathered_behind(step));
        break;
    case NL_QUANTIZE_SWIGLU: /* (model.py has no such line) */
        if (cut) read_parts(c, tokens, c->w_down_x, gathered_behind(NL_GATE_UP_SWIGLU));
        prepare(c, tokens, c->w_down_x, w->weight[W_DOWN].IN, W_DOWN, W_DOWN);
        break;
    case NL_W_DOWN_ADD_RESIDUAL: /* return h + self.w_down(...) */
        multiply(c, rows_of_D, own_part(c, c->a->y), c->w_down_x, W_DOWN);
        add_residual(c, rows_of_D, own_part(c, c->a->y), own, c->h);
        break;
    }
}

/* The same call at another layer. */
static layer_call at_layer(layer_call c, int64_t layer) {
    c.layer = layer, c.w = c.a->weights[layer], c.x = layer == 0 ? c.a->x : c.a->y;
    return c;
}

static void do_steps(const layer_call *c, int first, int last, int64_t part, int64_t parts, int threads) {
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t thread = 0, n = 1;
#ifdef _OPENMP
        thread = omp_get_thread_num(), n = omp_get_num_threads();
#endif
        for (int step = first; step < last; step++) {
            const layer_call here = at_layer(*c, step / NL_STEPS);
            do_step(&here, step % NL_STEPS, part * n + thread, parts * n);
            if (step + 1 < last) {
#pragma omp barrier
            }
        }
    }
}

/* self.attention(xq, keys, values): queries of the part, one sequence after the other. One thread writes the
 * result into the exchange, because that takes little time beside attention. */
static int attend(const layer_call *c, int64_t part, int64_t parts, int threads) {
    const nl_layer_weights *w = c->w;
    const nl_kv_cache *cache = &c->a->cache;
    const int64_t T = c->a->T;
    int status = 0;
    for (int64_t b = 0; b < c->a->B && status == 0; b++) {
        const int64_t first_row = b * T * w->H * w->Dh,
                      here = bytes_of(cache->format, c->layer * cache->layer_stride[b]);
        const nl_attention_args a = {
            .out = c->attention_output + first_row,
            .q = c->q + first_row,
            .k = (const uint8_t *)cache->keys[b] + here,
            .v = (const uint8_t *)cache->values[b] + here,
            .format = cache->format,
            .B = 1,
            .T = T,
            .S = cache->start[b] + T,
            .H = w->H,
            .K = w->K,
            .Dh = w->Dh,
            .k_strides = {0, cache->position_stride, cache->head_stride[b]},
            .v_strides = {0, cache->position_stride, cache->head_stride[b]},
            .begin = T * part / parts,
            .end = T * (part + 1) / parts,
            .window = cache->window,
            .dropped = cache->dropped[b],
        };
        status = nl_attention(&a, threads);
        if (c->a->cut)
            write_part(c, (range){b * T + a.begin, b * T + a.end}, (range){0, w->H * w->Dh},
                       c->attention_output, gathered_behind(NL_ATTENTION));
    }
    return status;
}

int nl_layers(const nl_layers_args *a, int first, int last, int64_t part, int64_t parts, int threads) {
    int status = 0;
    for (int layer = first / NL_STEPS; layer * NL_STEPS < last; layer++)
        for (int i = WQ; i <= W_DOWN; i++)
            if (!is_known(a->weights[layer]->weight[i].format)) return NL_UNKNOWN_FORMAT;
    if (!is_cached(a->cache.format)) return NL_UNKNOWN_FORMAT;
    layer_call c = {.a = a, .w = a->weights[0], .kernel = chosen_kernels(), .tokens = a->B * a->T};
    c.status = &status;
    allocate_activations(&c, a->cut, a->scratch);
    for (int step = first; step < last && status == 0;) {
        int attention = step / NL_STEPS * NL_STEPS + NL_ATTENTION; /* the next one */
        if (attention < step) attention += NL_STEPS;
        if (step == attention) {
            const layer_call here = at_layer(c, step / NL_STEPS);
            status = attend(&here, part, parts, threads);
            step++;
        } else {
            const int end = attention < last ? attention : last;
            do_steps(&c, step, end, part, parts, threads);
            step = end;
        }
    }
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

/* gate = gate / (1 + exp(-gate)) * up. In float64, because exp(89) is beyond float32. */
void swiglu_scalar(float *gate, const float *up, int64_t n) {
    for (int64_t i = 0; i < n; i++) gate[i] = (float)(gate[i] / (1 + exp_float64(-(double)gate[i]))) * up[i];
}

/* Each pair (a, b) is a complex number a + bi. It is multiplied by its c + di, unless freqs_cis is NULL, and
 * stored in F32, F16 or Q8_0. */
void store_head_scalar(uint8_t *to, int format, const float *x, const float *freqs_cis, int64_t Dh) {
    float rotated[NL_MAX_DH];
    for (int64_t i = 0; i < Dh; i += 2) {
        float a = x[i], b = x[i + 1];
        if (freqs_cis) {
            const float c = freqs_cis[i], d = freqs_cis[i + 1], real = a * c - b * d;
            b = a * d + b * c, a = real;
        }
        rotated[i] = a, rotated[i + 1] = b;
    }
    if (format == F32) memcpy(to, rotated, sizeof(float) * (size_t)Dh);
    for (int64_t i = 0; format == F16 && i < Dh; i++) store_u16(to + 2 * i, float_to_half(rotated[i]));
    for (int64_t i = 0; format == Q8_0 && i < Dh; i += QK) quantize_q8_0(to + bytes_of(Q8_0, i), rotated + i);
}

#else
/* ---------------------------------------------------------------- vectors: the same, LANES at a time */

VEC_TARGET void VEC(norm)(float *y, const float *x, const float *weight, float eps, int64_t D) {
    vec squares = vec_zero();
    for (int64_t d = 0; d < D; d += LANES) squares = vec_fma(vec_load(x + d), vec_load(x + d), squares);
    const vec root = vec_all(sqrtf(vec_sum(squares) / (float)D + eps));
    for (int64_t d = 0; d < D; d += LANES)
        vec_store(y + d, vec_mul(vec_div(vec_load(x + d), root), vec_load(weight + d)));
}

/* gate / (1 + e^-gate) * up = gate / (one + one * e^-gate) * one * up, with `one` so small that nothing
 * leaves float32:
 *
 *     gate           one               one * e^-gate               the factor `one` before up
 *     >= -80         1 + 2^-32 = 1     <= e^80          < 2^116    1
 *     -110 .. -80    2^-32             <= e^110 2^-32   < 2^127    2^-32
 *     < -110         2^-32             that of -110                0 */
VEC_TARGET void VEC(swiglu)(float *gate, const float *up, int64_t n) {
    const vec far = vec_all(-80), lowest = vec_all(-110);
    for (int64_t i = 0; i < n; i += LANES) {
        const vec x = vec_load(gate + i), minus_x = vec_sub(vec_zero(), vec_max(lowest, x));
        const vec one = vec_add(vec_zero_below(x, far, vec_all(1)), vec_all(0x1p-32f));
        vec power;
        const vec p = exp_parts(vec_max(vec_all(-87), minus_x), &power);
        const vec silu = vec_div(x, vec_add(one, vec_times_2_to(power, vec_mul(p, one))));
        vec_store(gate + i, vec_mul(vec_mul(silu, vec_zero_below(x, lowest, one)), vec_load(up + i)));
    }
}

VEC_TARGET void VEC(store_head)(uint8_t *to, int format, const float *x, const float *freqs_cis, int64_t Dh) {
    float rotated[NL_MAX_DH];
    int64_t i = 0;
    for (; i + LANES <= Dh; i += LANES) {
        const vec a = vec_load(x + i), b = freqs_cis ? vec_times_complex(a, vec_load(freqs_cis + i)) : a;
        if (format == F16)
            vec_store_f16(to + 2 * i, b);
        else
            vec_store(format == F32 ? (float *)(void *)(to + 4 * i) : rotated + i, b);
    }
    if (format == Q8_0) /* whole blocks, and so whole registers */
        for (int64_t block = 0; block < Dh; block += QK)
            quantize_q8_0(to + bytes_of(Q8_0, block), rotated + block);
    else if (i < Dh)
        store_head_scalar(to + bytes_of(format, i), format, x + i, freqs_cis ? freqs_cis + i : NULL, Dh - i);
}
#endif

/* Every C function that Python calls. This file is the C header and also the declaration that cffi reads, so
 * it has declarations and no directive but #pragma once. Arrays are row-major and float32 unless said
 * otherwise. The letters of the shapes are those of numpy_llama/config.py:
 *
 *   B batch   T new tokens   S all positions   H query heads   K key/value heads   Dh head_dim
 *
 * `threads` is the number of OpenMP threads; the result has the same bits for every number.
 * `begin, end` name the part of the result to compute, so that a caller can keep each call short.
 * No function writes outside its output or reads outside the shapes given. Only nl_watch keeps a pointer.
 * numpy_llama/backend/kernels.py checks all shapes before it calls. These functions check formats and nothing
 * else. */

#pragma once

/* What a function returns when it could not do its work; 0: it did. NL_NO_MEMORY: none for its scratch.
 * NL_F16_OVERFLOW: float16 cannot hold a key or value, or a scale of Q8_0. */
enum { NL_NO_MEMORY = -1, NL_UNKNOWN_FORMAT = -2, NL_F16_OVERFLOW = 1 };

/* A weight format: a block of `weights` weights takes `bytes` bytes. The other numbers are where in the block
 * a part begins; -1: it has no such part. formats.h describes the parts. */
typedef struct {
    const char *name;
    int code; /* ggml's number or our own, which is `format` everywhere below */
    int weights, bytes;
    int d, d32, m, scales, high, quants;
    int zero; /* what is subtracted from q */
} nl_format;

/* The index-th format; NULL past the last. */
const nl_format *nl_format_at(int index);

/* A matrix of weights: OUT rows of IN weights. IN is a multiple of 32, and of the format's block. Rows of
 * F32, F16 and BF16 are as stored; those of a block format are packed by nl_pack. */
typedef struct {
    const void *data;
    int format;
    int64_t OUT, IN;
} nl_matrix;

/* dst = src's rows in packed groups of NL_PACKED_ROWS; the last row is repeated to fill one.      pack.c
 *   src has `rows` rows of a block format as stored, dst (rows rounded up to whole groups) as many bytes
 * each. Returns 0 or NL_UNKNOWN_FORMAT. */
enum { NL_PACKED_ROWS = 16 };
int nl_pack(void *dst, const void *src, int format, int64_t rows, int64_t IN, int threads);

/* GEMV (linear_gemv.c) takes up to this many tokens, GEMM (linear_gemm.c) takes more. */
enum { NL_GEMV_TOKENS = 8 };
/* A panel of GEMM has at most this many rows; a call should have a multiple of it for each thread. */
enum { NL_PANEL_ROWS = 32 };
/* The largest Dh. A query block of attention.c has at most NL_QUERY_ROWS rows; a call should have whole ones.
 */
enum { NL_MAX_DH = 256, NL_QUERY_ROWS = 240 };

/* y[:, begin:end] = x @ w[begin:end].T      linear.c
 *   x (T, IN)   y (T, OUT).   begin is a multiple of NL_PACKED_ROWS.   Returns 0 or NL_UNKNOWN_FORMAT. */
int nl_linear(float *y, const float *x, int64_t T, const nl_matrix *w, int64_t begin, int64_t end,
              int threads);

/* The same as nl_linear, summed in the same order for any number of tokens. */
int nl_linear_exact(float *y, const float *x, int64_t T, const nl_matrix *w, int64_t begin, int64_t end,
                    int threads);

/* The same as nl_linear_exact for many tokens, with x packed too. The bits are the same. linear_backward.c
 *   begin is a multiple of NL_PANEL_ROWS.   Returns 0, NL_NO_MEMORY or NL_UNKNOWN_FORMAT. */
int nl_linear_y(float *y, const float *x, int64_t T, const nl_matrix *w, int64_t begin, int64_t end,
                int threads);

/* dx = dy[:, begin:end] @ w[begin:end], or += where begin > 0: some rows of w a call      linear_backward.c
 *   dy (T, OUT)   dx (T, N), N <= IN: the columns of w without padding.   begin and end are multiples of
 * NL_GRADIENT_ROWS, or end is OUT.   Returns 0, NL_NO_MEMORY or NL_UNKNOWN_FORMAT. */
enum { NL_GRADIENT_ROWS = 256 };
int nl_linear_dx(float *dx, const float *dy, int64_t T, const nl_matrix *w, int64_t N, int64_t begin,
                 int64_t end, int threads);

/* dw[begin:end] = dy[:, begin:end].T @ x, or += where `add` is 1
 *   dy (T, OUT)   x (T, IN)   dw (OUT, IN), IN any number.   Returns 0 or NL_NO_MEMORY. */
int nl_linear_dw(float *dw, const float *dy, const float *x, int64_t T, int64_t OUT, int64_t IN,
                 int64_t begin, int64_t end, int add, int threads);

/* Quantized activations: x rounded to 8 or 15 bits in blocks of 32.      quantized_activations.c
 *   bits = 8: but 15 for the blocks of a token whose numbers are the largest. F16, BF16 and FP8: 14 bits.
 *   `activations` has room for nl_activations_bytes(T, IN) bytes. Not for F32.
 *   nl_quantizes_activations: 1 where this is the faster way. It is not for F32, nor for up to NL_GEMV_TOKENS
 * tokens and a format whose weights are single numbers. */
int nl_quantizes_activations(int format, int64_t T);
int64_t nl_activations_bytes(int64_t T, int64_t IN);
int nl_quantize_activations(void *activations, const float *x, int format, int bits, int64_t T, int64_t IN,
                            int threads);

/* The same as nl_linear, with the activations that nl_quantize_activations has made for w's format. Only
 * where nl_quantizes_activations is 1. */
int nl_linear_quantized(float *y, const void *activations, int64_t T, const nl_matrix *w, int64_t begin,
                        int64_t end, int threads);

/* For a test: nl_linear_exact (exact = 1) or nl_linear_quantized (0), with the scalar micro-kernel of
 * linear_gemm.c in place of the one in vectors. The bits are the same. */
int nl_linear_scalar_micro_kernel(float *y, const void *x, int64_t T, const nl_matrix *w, int exact);

/* The arguments of nl_attention. Strides count elements, not bytes; the Dh elements of a head lie dense. In
 * Q8_0 they are blocks as stored, not packed, and Dh and all strides are multiples of 32. */
typedef struct {
    float *out;                         /* (B, T, H, Dh) */
    const float *q;                     /* (B, T, H, Dh) */
    const void *k, *v;                  /* (B, S, K, Dh) */
    int format;                         /* of k and v: F32, F16 or Q8_0 */
    int64_t B, T, S, H, K, Dh;          /* Dh at most NL_MAX_DH */
    int64_t k_strides[3], v_strides[3]; /* from one batch, one position, one head to the next */
    int64_t begin, end;                 /* the queries of T to compute */
    float *lse;      /* (B, H, T) log(sum(exp(scores))) of each softmax; NULL: not stored */
    int64_t window;  /* a query sees the last `window` positions, its own included; 0: all */
    int64_t dropped; /* positions that no query sees, and that k and v begin behind. The bits are those of 0
                      * where they are whole KV blocks */
} nl_attention_args;

/* out[:, begin:end] = (softmax(q @ k.T / sqrt(Dh) + causal_mask(T, S, window)) @ v)[:, begin:end]
 *                                                                                           attention.c
 *   k, v (B, S - dropped, K, Dh).   Returns 0, NL_NO_MEMORY or NL_UNKNOWN_FORMAT. */
int nl_attention(const nl_attention_args *a, int threads);

/* The arguments of nl_attention_backward. T = S, and all arrays are dense. */
typedef struct {
    float *dq, *dk, *dv;
    const float *dout, *q, *k, *v, *out; /* dout, out, dq as q (B, T, H, Dh); dk, dv as k, v (B, T, K, Dh) */
    const float *lse;                    /* (B, H, T), from nl_attention */
    int64_t B, T, H, K, Dh;              /* Dh at most NL_MAX_DH */
    int64_t begin, end;                  /* the keys of T whose part is computed */
} nl_attention_backward_args;

/* dq, dk, dv = attention_backward(dout, q, k, v, out, lse)      attention_backward.c
 *   Computes dk[:, begin:end] and dv[:, begin:end]; dq += what these keys give, = where begin is 0. Calls go
 * from the first keys to the last. begin is a multiple of NL_KEYS.   Returns 0 or NL_NO_MEMORY. */
enum { NL_KEYS = 96 };
int nl_attention_backward(const nl_attention_backward_args *a, int threads);

/* An update by LoRA: the weight is used as weight + b.T @ a. */
typedef struct {
    const float *a; /* (r, IN) */
    const float *b; /* (r, OUT) with the scale in it */
    int64_t r;      /* 0: no update */
} nl_lora;

/* An update by LoRA that learns: scale * b @ a is added to a weight (OUT, IN). */
typedef struct {
    const float *a; /* (r, IN) */
    const float *b; /* (OUT, r) */
    float scale;
    int64_t r, IN, OUT;
} nl_lora_part;

/* y += scale * x @ a.T @ b.T      lora.c
 *   x (T, IN)   y (T, OUT).   Returns 0 or NL_NO_MEMORY. */
int nl_add_lora(float *y, const float *x, const nl_lora_part *p, int64_t T, int threads);

/* dx += scale * dy @ b @ a;  da += scale * (dy @ b).T @ x;  db += scale * dy.T @ (x @ a.T)
 *   x, dx (T, IN)   dy (T, OUT)   da (r, IN)   db (OUT, r).   A call for some of the tokens should have a
 * multiple of NL_LORA_TOKENS; calls go from the first tokens to the last.   Returns 0 or NL_NO_MEMORY. */
enum { NL_LORA_TOKENS = 64 };
typedef struct {
    float *dx, *da, *db;
    const float *dy, *x;
} nl_lora_gradients;
int nl_lora_backward(const nl_lora_gradients *g, const nl_lora_part *p, int64_t T, int threads);

/* One TransformerBlock: its sizes and weights. D, F and H * Dh are multiples of 32. Dh is even, at most
 * NL_MAX_DH. */
typedef struct {
    int64_t D, H, K, Dh, F;      /* D dim, F hidden_dim */
    const float *attention_norm; /* (D,) */
    const float *ffn_norm;       /* (D,) */
    float eps;                   /* of both norms */
    int activation_bits;         /* 8 or 15: x is rounded; 32: it is not */
    nl_matrix weight[7];         /* wq wk wv wo w_gate w_up w_down */
    nl_lora lora[7];             /* their updates */
    int64_t rank;                /* the largest r of them */
    const int64_t *q_order;      /* (H * Dh,) output i of wq is its row q_order[i]; NULL: row i */
    const int64_t *k_order;      /* (K * Dh,) the same for wk */
    const int64_t *columns[7];   /* column j of weight i multiplies x[columns[i][j]]; NULL: x[j] */
} nl_layer_weights;

/* The keys and values of the layers, with room for T positions more. Strides count elements. */
typedef struct {
    void *const *keys;           /* keys[b] (layers, K, start[b] - dropped[b] + T, Dh) */
    void *const *values;         /* values[b], the same */
    int format;                  /* of both: F32, F16 or Q8_0 */
    int64_t position_stride;     /* from one position to the next */
    const int64_t *head_stride;  /* (B,) from one head of sequence b to the next */
    const int64_t *layer_stride; /* (B,) from one layer of sequence b to the next */
    const int64_t *start;        /* (B,) start_pos: how many positions of sequence b were stored already */
    const int64_t *dropped;      /* (B,) how many of these are stored no longer: as in nl_attention_args */
    int64_t window;              /* the same */
} nl_kv_cache;

/* A layer that is cut for several ranks (numpy_llama/parallel). Each has some rows of every weight: H and K
 * are its heads, F its rows of w_gate and w_up, and D the whole width. A call ends where the ranks gather an
 * activation: behind NL_ATTENTION and each later step with a product. `exchange` has the parts of all ranks,
 * one behind the other. A call reads all of them, and writes this rank's. */
enum { NL_HEADS, NL_DIM, NL_HIDDEN, NL_CUTS };
typedef struct {
    int64_t ranks, rank;
    const int64_t *widths[NL_CUTS]; /* (ranks,) numbers of a token in each part: of H * Dh, of D and of F */
    void *exchange;                 /* nl_exchange_bytes(weights, B * T) bytes */
} nl_cut;

/* The arguments of nl_layers. */
typedef struct {
    float *y;                               /* (B, T, D), another array than x. With a cut: not all of it */
    const float *x;                         /* (B, T, D) */
    const nl_layer_weights *const *weights; /* of each layer; all have the same sizes, all or none columns */
    const nl_cut *cut;                      /* NULL: the weights are whole */
    nl_kv_cache cache;
    const float *freqs_cis;   /* (T, Dh / 2) complex, or one of them for each sequence */
    int64_t freqs_cis_stride; /* floats from one sequence's freqs_cis to the next; 0: all share one */
    int64_t B, T;
    void *scratch; /* nl_layers_bytes(weights[0], cut, B * T) bytes */
} nl_layers_args;

/* The steps of a layer, in their order. */
enum {
    NL_ATTENTION_NORM,
    NL_QKV,
    NL_ROPE_AND_CACHE,
    NL_ATTENTION,
    NL_QUANTIZE_ATTENTION_OUTPUT,
    NL_WO_ADD_RESIDUAL,
    NL_FFN_NORM,
    NL_GATE_UP_SWIGLU,
    NL_QUANTIZE_SWIGLU,
    NL_W_DOWN_ADD_RESIDUAL,
    NL_STEPS
};

/* y = x; for each layer: y = TransformerBlock(y, start_pos, freqs_cis, cache)      layer.c
 *   Computes the steps first .. last - 1. Step i is step i % NL_STEPS of layer i / NL_STEPS. Two layers in
 * one call: 0, 2 * NL_STEPS, part 0 of 1. A call for one step may compute one of `parts` parts of it; each
 * part must be computed before the next step.
 *   Returns 0, NL_NO_MEMORY, NL_UNKNOWN_FORMAT or NL_F16_OVERFLOW. */
int nl_layers(const nl_layers_args *a, int first, int last, int64_t part, int64_t parts, int threads);
int64_t nl_layers_bytes(const nl_layer_weights *w, const nl_cut *cut, int64_t tokens);
int64_t nl_exchange_bytes(const nl_layer_weights *w, int64_t tokens);

/* The bytes of `width` numbers in the exchange behind that step. Where the next product rounds its
 * activations, they are rounded in the exchange already. */
int64_t nl_part_bytes(const nl_layer_weights *w, const nl_cut *cut, int64_t tokens, int step, int64_t width);

/* Activations in the exchange, rounded for a weight of that format: for 32 numbers, the largest |x| and 32
 * integers of 16 bits. Rounding the restored numbers again gives the same bits.   quantized_activations.c */
enum { NL_ROUNDED_BYTES = 4 + 2 * 32 };
void nl_round_activations(void *rounded, const float *x, int format, int64_t n);
void nl_restore_activations(float *x, const void *rounded, int format, int64_t n);

/* y = rms_norm(x, weight, eps), and its gradient: dx, dweight = rms_norm_backward(dy, x, weight, eps).
 *   y, x, dx, dy (rows, D)   weight, dweight (D,), D a multiple of 32.   Returns 0 or NL_NO_MEMORY.
 *                                                                                              training.c */
void nl_rms_norm(float *y, const float *x, const float *weight, float eps, int64_t rows, int64_t D,
                 int threads);
int nl_rms_norm_backward(float *dx, float *dweight, const float *dy, const float *x, const float *weight,
                         float eps, int64_t rows, int64_t D, int threads);

/* y = apply_rotary_emb(x, freqs_cis)
 *   x, y (tokens, heads, Dh), which may be one array; freqs_cis (tokens, Dh / 2) complex. Dh is even, at most
 * NL_MAX_DH. */
void nl_rotate(float *y, const float *x, const float *freqs_cis, int64_t tokens, int64_t heads, int64_t Dh,
               int threads);

/* s = swiglu(gate, up), and its gradient: dgate, dup = swiglu_backward(ds, gate, up), n numbers each. */
void nl_swiglu(float *s, const float *gate, const float *up, int64_t n, int threads);
void nl_swiglu_backward(float *dgate, float *dup, const float *ds, const float *gate, const float *up,
                        int64_t n, int threads);

/* nll, lse = cross_entropy(logits, targets);  logits = cross_entropy_backward(weights, logits, targets, lse)
 *   logits (rows, V)   nll, targets, weights (rows,), 0 <= targets < V. */
void nl_cross_entropy(float *logits, float *nll, const int64_t *targets, const float *weights, int64_t rows,
                      int64_t V, int threads);

/* One step of AdamW for n parameters p with gradients g:
 *     m = beta1 m + new1 g;  v = beta2 v + new2 g^2;  p = keep p - rate m / (sqrt(scale2 v) + eps) */
typedef struct {
    float beta1, new1, beta2, new2; /* new = 1 - beta */
    float keep;                     /* 1 - lr * weight_decay */
    float rate, scale2;             /* lr / (1 - beta1^t), 1 / (1 - beta2^t) */
    float eps;
} nl_adamw_step;
void nl_adamw(float *p, const float *g, float *m, float *v, const nl_adamw_step *step, int64_t n,
              int threads);

/* sum = x @ x for n numbers.   Returns 0 or NL_NO_MEMORY. */
int nl_squares(double *sum, const float *x, int64_t n, int threads);

/* dst = quantize(dequantize(src))      quantize.c
 *   src, dst: `rows` rows of IN weights as stored, IN a multiple of both formats' blocks.
 *   src is in any format, dst in F32, F16, BF16, Q8_0 or Q4_0.
 *   Returns 0, NL_UNKNOWN_FORMAT, or the first row that dst's format cannot store, counted from 1. Such a row
 *   has a NaN or a number beyond 65504. */
int64_t nl_convert(void *dst, int dst_format, const void *src, int src_format, int64_t rows, int64_t IN,
                   int threads);

/* y = exp(x) for n numbers, 0 below -87. It is the exponential of attention, callable for its tests. */
void nl_exp(float *y, const float *x, int64_t n);

/* The exclusive or of the 32-bit numbers of n pieces of memory, at the rate of the memory.      probe.c */
uint32_t nl_read_probe(const void *const *pieces, const int64_t *nbytes, int n, int threads);

/* Compute that many floating-point operations on each thread, in registers only. `operations` is a multiple
 * of 384. The result is 24 a thread, for any number of operations beyond 20,000. */
float nl_fma_probe(int64_t operations, int threads);

/* Watch the nbytes of a mapped file from `begin` on. When another program has cut the file, an access ends
 * the process with one line that names it, instead of with SIGBUS. Returns -1 when the table is full.
 *                                                                                                 watch.c */
int nl_watch(const void *begin, int64_t nbytes, const char *name);
void nl_unwatch(const void *begin);

/* Let the calling thread have a team of `threads`, itself included; it has `have` by now. A thread gets a
 * stack of `stack` bytes, as OpenMP's do (0: the system's default). Returns `threads`, or how many there can
 * be. room: the bytes left of the caller's stack, and of the smallest new one.      team.c */
int nl_form_team(int threads, int have, int64_t stack, int64_t room[2]);

/* The instruction sets that are compiled in and can run here, fastest first: "avx512", "avx_vnni", "avx2",
 * "neon", "scalar". NULL past the last one.      dispatch.c */
const char *nl_isa_name(int index);

/* Use this one from now on. Returns 0, or -1 if it is unknown or cannot run here. Not while a kernel runs. */
int nl_use_isa(const char *name);

/* The one in use; the OpenMP version (1: pool.c in its place, 0: neither); the compiler. */
const char *nl_isa(void);
int nl_openmp(void);
const char *nl_compiler(void);

/* Every C function that Python calls. This file is both the C header and the declaration that cffi
 * reads, so it holds hardly more than prototypes. Arrays are row-major and float32 unless said otherwise; the
 * letters of the shapes are those of numpy_llama/config.py:
 *
 *   B batch   T new tokens   S all positions   H query heads   K key/value heads   Dh head_dim
 *
 * `threads` is how many OpenMP threads to use; the result never depends on it, bit for bit.
 * `begin, end` name the part of the result to compute, so that a caller can keep each call short.
 * No function writes outside its output, reads outside the shapes given or, but for nl_watch, keeps a
 * pointer. numpy_llama/kernels.py checks all shapes before it calls; these functions check nothing. */

#pragma once

/* y[:, begin:end] = x @ w[begin:end].T      linear.c
 *   x (T, IN)   w (OUT, IN) as stored   y (T, OUT);   IN a multiple of 32, in K formats of 256.
 *   format is ggml's number: 0 F32, 1 F16, 30 BF16, 8 Q8_0, 2 Q4_0, 3 Q4_1, 6 Q5_0, 7 Q5_1, 12 Q4_K, 13 Q5_K,
 *   14 Q6_K (numpy_llama/quantize.py). */
void nl_linear(float *y, const float *x, const void *w, int format, int64_t T, int64_t OUT, int64_t IN,
               int64_t begin, int64_t end, int threads);

/* Up to so many tokens are summed in another order than more, in either of the fast ways, and by nl_attention
 * where keys and values are float16: */
enum { NL_GEMV_TOKENS = 4 };

/* The same as nl_linear, and however many tokens there are, they are summed in the same order. */
void nl_linear_exact(float *y, const float *x, const void *w, int format, int64_t T, int64_t OUT, int64_t IN,
                     int64_t begin, int64_t end, int threads);

/* The same with x in fixed point: rounded to 14 bits in blocks of 32, for K formats of 256.
 * quantized_activations.c `fixed` has room for nl_activations_bytes(T, IN) bytes; nl_quantize_activations
 * fills it from x. Not for F32. nl_quantizes_activations: whether this is the faster way; for few tokens
 * times single numbers it is not. */
int nl_quantizes_activations(int format, int64_t T);
int64_t nl_activations_bytes(int64_t T, int64_t IN);
void nl_quantize_activations(void *fixed, const float *x, int format, int64_t T, int64_t IN, int threads);
void nl_linear_quantized(float *y, const void *fixed, const void *w, int format, int64_t T, int64_t OUT,
                         int64_t IN, int64_t begin, int64_t end, int threads);

/* out[:, begin:end] = (softmax(q @ k.T / sqrt(Dh) + causal_mask(T, S)) @ v)[:, begin:end]      attention.c
 *   q, out (B, T, H, Dh)   k, v (B, S, K, Dh) in format 0 F32 or 1 F16;   Dh at most 256.
 *   k_strides, v_strides: numbers from one batch, one position, one head to the next; Dh lies dense.
 *   Returns 0, or -1 when there is no memory for the scratch. */
int nl_attention(float *out, const float *q, const void *k, const void *v, int format, int64_t B, int64_t T,
                 int64_t S, int64_t H, int64_t K, int64_t Dh, const int64_t *k_strides,
                 const int64_t *v_strides, int64_t begin, int64_t end, int threads);

/* One TransformerBlock: its sizes (D dim, F hidden_dim) and weights, which are kept by whoever made this. */
typedef struct {
    int64_t D, H, K, Dh, F;
    const float *attention_norm, *ffn_norm; /* (D,) */
    float eps;
    int exact;
    const void *weight[7]; /* wq wk wv wo w_gate w_up w_down, as stored */
    int format[7];
    const int64_t *q_order, *k_order; /* output i of wq and wk is their row order[i]; NULL: row i */
} nl_layer_weights;

/* y = TransformerBlock(x): of B sequences, T new positions each, behind start[b] old ones.      layer.c
 *   x, y (B, T, D)   freqs_cis (T, Dh / 2) complex, where `angles` is 0; else `angles` numbers for each
 * sequence. keys[b], values[b] (start[b] + T, K, Dh) in format 0 F32 or 1 F16;   `position`, head[b]: numbers
 * from one to the next.   D, F, H * Dh multiples of 32;   Dh even, at most 256. scratch has room for
 * nl_layer_bytes(w, B * T) bytes. All in one call with first = 0, last = 10, part 0 of 1; or in several, of
 * steps first .. last - 1; one single step also in parts, each of which must be done. Returns 0; -1 when
 * there is no memory for the scratch of attention; 1 when float16 cannot hold a key or value. */
int64_t nl_layer_bytes(const nl_layer_weights *w, int64_t tokens);
int nl_layer(float *y, const float *x, const nl_layer_weights *w, const float *freqs_cis, int64_t angles,
             void *const *keys, void *const *values, int cache_format, int64_t position, const int64_t *head,
             int64_t B, int64_t T, const int64_t *start, void *scratch, int first, int last, int64_t part,
             int64_t parts, int threads);

/* dst = quantize(dequantize(src))      quantize.c
 *   src, dst: `rows` rows of IN weights as stored, in any two of the formats above; dst in F32, F16, BF16,
 *   Q8_0 or Q4_0. IN a multiple of both formats' blocks.
 *   Returns 0, or the first row, counted from 1, that dst's format cannot store: NaN, or beyond 65504. */
int64_t nl_convert(void *dst, int dst_format, const void *src, int src_format, int64_t rows, int64_t IN,
                   int threads);

/* y = exp(x), n numbers: the exponential inside attention, for its tests. 0 below -87. */
void nl_exp(float *y, const float *x, int64_t n);

/* The exclusive or of the 32-bit words of n pieces of memory, as fast as they can be read.      probe.c */
uint32_t nl_read_probe(const void *const *pieces, const int64_t *nbytes, int n, int threads);

/* Do so many floating-point operations on each thread, a multiple of 384, in registers only: -> 24 a thread,
 * for any number beyond 20,000. */
float nl_fma_probe(int64_t operations, int threads);

/* If the nbytes from `begin` on, a mapped file, turn out to be cut: end the process with one line that names
 * the file, instead of by SIGBUS. Returns -1 when too many are watched already.      watch.c */
int nl_watch(const void *begin, int64_t nbytes, const char *name);
void nl_unwatch(const void *begin);

/* Let the calling thread have a team of `threads`, itself included, of which it has `have` by now. Threads get
 * stacks of `stack` bytes, as OpenMP's do (0: the system's default). Returns `threads`, or how many there can
 * be. room: what is left of the caller's stack, and of the smallest new one, in bytes.      team.c */
int nl_form_team(int threads, int have, int64_t stack, int64_t room[2]);

/* The instruction sets compiled in and able to run here, fastest first: "avx2", "scalar". NULL past
 * the last one.      dispatch.c */
const char *nl_isa_name(int index);

/* Use that one from now on; 0, or -1 for an unknown or unable one. Not while a kernel runs. */
int nl_use_isa(const char *name);

/* The one in use; the OpenMP version (0: built without); the compiler. */
const char *nl_isa(void);
int nl_openmp(void);
const char *nl_compiler(void);

/* Every C function that Python calls. This file is the C header and also the declaration that cffi reads, so
 * it has prototypes and no directives. Arrays are row-major and float32 unless said otherwise. The letters of
 * the shapes are those of numpy_llama/config.py:
 *
 *   B batch   T new tokens   S all positions   H query heads   K key/value heads   Dh head_dim
 *
 * `threads` is the number of OpenMP threads; the result has the same bits for every number.
 * `begin, end` name the part of the result to compute, so that a caller can keep each call short.
 * No function writes outside its output or reads outside the shapes given. Only nl_watch keeps a pointer.
 * numpy_llama/kernels.py checks all shapes before it calls; these functions check the format and nothing
 * else. */

#pragma once

/* What a function returns that could not do its work; 0: it did. */
enum { NL_NO_MEMORY = -1, NL_UNKNOWN_FORMAT = -2 };

/* A weight format: a block of `weights` weights takes `bytes` bytes, and the other numbers say where in it a
 * part begins; -1: it has no such part.      formats.h, which says what the parts are */
typedef struct {
    const char *name;
    int code; /* ggml's number, which is `format` everywhere below */
    int weights, bytes;
    int d, m, scales, high, quants;
    int zero; /* what is subtracted from q */
} nl_format;

/* The index-th format; NULL past the last. */
const nl_format *nl_format_at(int index);

/* A matrix of weights as stored: OUT rows of IN weights. IN is a multiple of 32, in K formats of 256. */
typedef struct {
    const void *data;
    int format;
    int64_t OUT, IN;
} nl_matrix;

/* Up to this many tokens go by GEMV (linear_gemv.c), more go by GEMM (linear_gemm.c) and are summed in
 * another order. nl_attention has the same limit where keys and values are float16. */
enum { NL_GEMV_TOKENS = 4 };
/* GEMM takes panels of up to this many rows; a call should have a multiple of it for each thread. */
enum { NL_PANEL_ROWS = 32 };

/* y[:, begin:end] = x @ w[begin:end].T      linear.c
 *   x (T, IN)   y (T, OUT).   Returns 0 or NL_UNKNOWN_FORMAT. */
int nl_linear(float *y, const float *x, int64_t T, const nl_matrix *w, int64_t begin, int64_t end,
              int threads);

/* The same as nl_linear, summed in the same order for any number of tokens. */
int nl_linear_exact(float *y, const float *x, int64_t T, const nl_matrix *w, int64_t begin, int64_t end,
                    int threads);

/* Quantized activations: x rounded to 14 bits in blocks of 32, for K formats of 256. quantized_activations.c
 *   `activations` has room for nl_activations_bytes(T, IN) bytes. Not for F32.
 *   nl_quantizes_activations: 1 where this is the faster way. It is not for F32, nor for few tokens and a
 *   format whose weights are single numbers. */
int nl_quantizes_activations(int format, int64_t T);
int64_t nl_activations_bytes(int64_t T, int64_t IN);
int nl_quantize_activations(void *activations, const float *x, int format, int64_t T, int64_t IN,
                            int threads);

/* The same as nl_linear, with the activations that nl_quantize_activations has made for w's format. */
int nl_linear_quantized(float *y, const void *activations, int64_t T, const nl_matrix *w, int64_t begin,
                        int64_t end, int threads);

/* For a test: nl_linear_exact (exact = 1) or nl_linear_quantized (0), with the scalar micro-kernel of
 * linear_gemm.c in place of the one in vectors. The bits are the same. */
int nl_linear_scalar_micro_kernel(float *y, const void *x, int64_t T, const nl_matrix *w, int exact);

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
 *   src, dst: `rows` rows of IN weights as stored, IN a multiple of both formats' blocks.
 *   src is in any format, dst in F32, F16, BF16, Q8_0 or Q4_0.
 *   Returns 0 or NL_UNKNOWN_FORMAT; or the first row, counted from 1, that dst's format cannot store because
 *   it has a NaN or a number beyond 65504. */
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

/* The instruction sets that are compiled in and can run here, fastest first: "avx512", "avx2", "scalar". NULL
 * past the last one.      dispatch.c */
const char *nl_isa_name(int index);

/* Use this one from now on. Returns 0, or -1 if it is unknown or cannot run here. Not while a kernel runs. */
int nl_use_isa(const char *name);

/* The one in use; the OpenMP version (0: built without); the compiler. */
const char *nl_isa(void);
int nl_openmp(void);
const char *nl_compiler(void);

/* training: what is computed number by number, in one pass over its arrays, and the optimizer.
 *
 *     nl_rms_norm_backward      dx, dweight
 *     nl_rotate                 RoPE; its gradient is RoPE with the conjugate
 *     nl_swiglu                 silu(gate) * up
 *     nl_swiglu_backward        dgate, dup
 *     nl_cross_entropy          logits become their gradient
 *     nl_adamw, nl_squares      the optimizer's step, and the norm of gradients
 *
 * Memory is the limit of all of them: NumPy makes 5 to 15 passes where these make one. Threads share rows, or
 * pieces of PIECE numbers. A sum over rows (dweight) or over pieces (nl_squares) is made of sums over fixed
 * parts, which are added in their order. So threads change no bit.
 *
 * Compiled once as it stands: the loop over threads and the scalar forms. Compiled once more for each
 * instruction set: the part under VECTOR_FORMS (README.md). tests/kernels/test_training_kernels.py compares
 * every form with NumPy. */
#include <stdlib.h>

#include "dispatch.h"
#include "exp_log.h"
#include "formats.h"
#include "vec.h"

/* PIECE numbers are whole registers of every instruction set. NORM_ROWS rows have one sum of dweight. */
enum { PIECE = 1 << 14, NORM_ROWS = 64 };

#ifndef VECTOR_FORMS

static int64_t piece(int64_t i, int64_t n) { return n - i < PIECE ? n - i : PIECE; }

int nl_rms_norm_backward(float *dx, float *dweight, const float *dy, const float *x, const float *weight,
                         float eps, int64_t rows, int64_t D, int threads) {
    const kernels *kernel = chosen_kernels();
    const int64_t parts = (rows + NORM_ROWS - 1) / NORM_ROWS;
    float *sums = calloc((size_t)(parts * D + 1), sizeof(float)); /* of each NORM_ROWS rows */
    if (!sums) return NL_NO_MEMORY;
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < parts; i++)
        for (int64_t t = i * NORM_ROWS; t < rows && t < (i + 1) * NORM_ROWS; t++)
            kernel->norm_backward(dx + t * D, sums + i * D, dy + t * D, x + t * D, weight, eps, D);
    for (int64_t d = 0; d < D; d++) dweight[d] = 0;
    for (int64_t i = 0; i < parts; i++)
        for (int64_t d = 0; d < D; d++) dweight[d] += sums[i * D + d];
    free(sums);
    return 0;
}

void nl_rms_norm(float *y, const float *x, const float *weight, float eps, int64_t rows, int64_t D,
                 int threads) {
    const kernels *kernel = chosen_kernels();
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t t = 0; t < rows; t++) kernel->norm(y + t * D, x + t * D, weight, eps, D);
}

void nl_rotate(float *y, const float *x, const float *freqs_cis, int64_t tokens, int64_t heads, int64_t Dh,
               int threads) {
    const kernels *kernel = chosen_kernels();
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t at = t * heads * Dh; at < (t + 1) * heads * Dh; at += Dh)
            kernel->store_head((uint8_t *)(y + at), F32, x + at, freqs_cis + t * Dh, Dh);
}

void nl_swiglu(float *s, const float *gate, const float *up, int64_t n, int threads) {
    const kernels *kernel = chosen_kernels();
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < n; i += PIECE) {
        const int64_t count = piece(i, n), whole = count / QK * QK;
        memcpy(s + i, gate + i, (size_t)count * sizeof(float));
        kernel->swiglu(s + i, up + i, whole);
        swiglu_scalar(s + i + whole, up + i + whole, count - whole);
    }
}

void nl_swiglu_backward(float *dgate, float *dup, const float *ds, const float *gate, const float *up,
                        int64_t n, int threads) {
    const kernels *kernel = chosen_kernels();
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < n; i += PIECE)
        kernel->swiglu_backward(dgate + i, dup + i, ds + i, gate + i, up + i, piece(i, n));
}

void nl_cross_entropy(float *logits, float *nll, const int64_t *targets, const float *weights, int64_t rows,
                      int64_t V, int threads) {
    const kernels *kernel = chosen_kernels();
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t r = 0; r < rows; r++)
        nll[r] = kernel->cross_entropy(logits + r * V, targets[r], weights[r], V);
}

void nl_adamw(float *p, const float *g, float *m, float *v, const nl_adamw_step *step, int64_t n,
              int threads) {
    const kernels *kernel = chosen_kernels();
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < n; i += PIECE) kernel->adamw(p + i, g + i, m + i, v + i, step, piece(i, n));
}

int nl_squares(double *sum, const float *x, int64_t n, int threads) {
    const kernels *kernel = chosen_kernels();
    const int64_t parts = (n + PIECE - 1) / PIECE;
    double *sums = malloc((size_t)(parts + 1) * sizeof(double));
    if (!sums) return NL_NO_MEMORY;
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < parts; i++) sums[i] = kernel->squares(x + i * PIECE, piece(i * PIECE, n));
    *sum = 0;
    for (int64_t i = 0; i < parts; i++) *sum += sums[i];
    free(sums);
    return 0;
}

/* ---------------------------------------------------------------- scalar: the definition in C */

/* dx = r (g - xh mean(g xh)), dweight += dy xh, with xh = x r, r = 1 / sqrt(mean(x^2) + eps), g = dy weight
 */
void norm_backward_scalar(float *dx, float *dweight, const float *dy, const float *x, const float *weight,
                          float eps, int64_t D) {
    float squares = 0, products = 0;
    for (int64_t d = 0; d < D; d++) squares += x[d] * x[d];
    for (int64_t d = 0; d < D; d++) products += dy[d] * weight[d] * x[d];
    const float r = 1 / sqrtf(squares / (float)D + eps), mean = products * r / (float)D;
    for (int64_t d = 0; d < D; d++) {
        const float xh = x[d] * r;
        dx[d] = r * (dy[d] * weight[d] - xh * mean);
        dweight[d] += dy[d] * xh;
    }
}

/* sig = 1 / (1 + exp(-gate)): dgate = ds up sig (1 + gate (1 - sig)), dup = ds gate sig */
void swiglu_backward_scalar(float *dgate, float *dup, const float *ds, const float *gate, const float *up,
                            int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const float g = gate[i] < -87 ? -87 : gate[i], e = exp_float(-g), sig = 1 / (1 + e);
        dgate[i] = ds[i] * up[i] * (sig * (1 + g * (e * sig)));
        dup[i] = ds[i] * (g * sig);
    }
}

/* z becomes (softmax(z) - onehot(target)) * weight. Returns -log(softmax(z)[target]). */
float cross_entropy_scalar(float *z, int64_t target, float weight, int64_t V) {
    float largest = z[0], sum = 0;
    for (int64_t i = 0; i < V; i++) largest = z[i] > largest ? z[i] : largest;
    const float chosen = z[target] - largest;
    for (int64_t i = 0; i < V; i++) sum += z[i] = exp_float(z[i] - largest);
    for (int64_t i = 0; i < V; i++) z[i] *= weight / sum;
    z[target] -= weight;
    return (float)log_float64(sum) - chosen;
}

void adamw_scalar(float *p, const float *g, float *m, float *v, const nl_adamw_step *s, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        m[i] = m[i] * s->beta1 + g[i] * s->new1;
        v[i] = v[i] * s->beta2 + g[i] * s->new2 * g[i];
        p[i] = p[i] * s->keep - m[i] * s->rate / (sqrtf(v[i] * s->scale2) + s->eps);
    }
}

double squares_scalar(const float *x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)x[i] * x[i];
    return sum;
}

#else
/* ---------------------------------------------------------------- vectors: the same, LANES at a time
 *
 * D is whole registers. Other arrays may have some numbers more: the scalar form takes those. A sum is made
 * over lanes, as in layer.c. */

VEC_TARGET void VEC(norm_backward)(float *dx, float *dweight, const float *dy, const float *x,
                                   const float *weight, float eps, int64_t D) {
    vec squares = vec_zero(), products = vec_zero();
    for (int64_t d = 0; d < D; d += LANES) {
        const vec x_d = vec_load(x + d);
        squares = vec_fma(x_d, x_d, squares);
        products = vec_fma(vec_mul(vec_load(dy + d), vec_load(weight + d)), x_d, products);
    }
    const float root = 1 / sqrtf(vec_sum(squares) / (float)D + eps);
    const vec r = vec_all(root), minus_mean = vec_all(-vec_sum(products) * root / (float)D);
    for (int64_t d = 0; d < D; d += LANES) {
        const vec xh = vec_mul(vec_load(x + d), r), dy_d = vec_load(dy + d);
        vec_store(dx + d, vec_mul(r, vec_fma(xh, minus_mean, vec_mul(dy_d, vec_load(weight + d)))));
        vec_store(dweight + d, vec_fma(dy_d, xh, vec_load(dweight + d)));
    }
}

VEC_TARGET void VEC(swiglu_backward)(float *dgate, float *dup, const float *ds, const float *gate,
                                     const float *up, int64_t n) {
    const int64_t whole = n / LANES * LANES;
    const vec one = vec_all(1);
    for (int64_t i = 0; i < whole; i += LANES) {
        const vec g = vec_max(vec_all(-87), vec_load(gate + i)), e = vec_exp(vec_sub(vec_zero(), g));
        const vec sig = vec_div(one, vec_add(one, e)), ds_i = vec_load(ds + i);
        const vec slope = vec_mul(sig, vec_fma(g, vec_mul(e, sig), one)); /* of silu */
        vec_store(dgate + i, vec_mul(vec_mul(ds_i, vec_load(up + i)), slope));
        vec_store(dup + i, vec_mul(ds_i, vec_mul(g, sig)));
    }
    swiglu_backward_scalar(dgate + whole, dup + whole, ds + whole, gate + whole, up + whole, n - whole);
}

VEC_TARGET float VEC(cross_entropy)(float *z, int64_t target, float weight, int64_t V) {
    const int64_t whole = V / LANES * LANES;
    vec highest = vec_all(z[0]), sums = vec_zero();
    for (int64_t i = 0; i < whole; i += LANES) highest = vec_max(highest, vec_load(z + i));
    float largest = vec_largest(highest), sum = 0;
    for (int64_t i = whole; i < V; i++) largest = z[i] > largest ? z[i] : largest;
    const float chosen = z[target] - largest;
    for (int64_t i = 0; i < whole; i += LANES) {
        const vec e = vec_exp(vec_sub(vec_load(z + i), vec_all(largest)));
        vec_store(z + i, e);
        sums = vec_add(sums, e);
    }
    for (int64_t i = whole; i < V; i++) sum += z[i] = exp_float(z[i] - largest);
    sum += vec_sum(sums);
    const float share = weight / sum;
    for (int64_t i = 0; i < whole; i += LANES) vec_store(z + i, vec_mul(vec_load(z + i), vec_all(share)));
    for (int64_t i = whole; i < V; i++) z[i] *= share;
    z[target] -= weight;
    return (float)log_float64(sum) - chosen;
}

/* Without an FMA, so the bits are those of the scalar form, and of NumPy. */
VEC_TARGET void VEC(adamw)(float *p, const float *g, float *m, float *v, const nl_adamw_step *s, int64_t n) {
    const int64_t whole = n / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) {
        const vec g_i = vec_load(g + i);
        const vec m_i = vec_add(vec_mul(vec_load(m + i), vec_all(s->beta1)), vec_mul(g_i, vec_all(s->new1)));
        const vec v_i = vec_add(vec_mul(vec_load(v + i), vec_all(s->beta2)),
                                vec_mul(vec_mul(g_i, vec_all(s->new2)), g_i));
        const vec root = vec_add(vec_sqrt(vec_mul(v_i, vec_all(s->scale2))), vec_all(s->eps));
        const vec change = vec_div(vec_mul(m_i, vec_all(s->rate)), root);
        vec_store(m + i, m_i);
        vec_store(v + i, v_i);
        vec_store(p + i, vec_sub(vec_mul(vec_load(p + i), vec_all(s->keep)), change));
    }
    adamw_scalar(p + whole, g + whole, m + whole, v + whole, s, n - whole);
}

/* Four sums, because an FMA takes 4 cycles. A lane adds PIECE / LANES / 4 squares at most. */
VEC_TARGET double VEC(squares)(const float *x, int64_t n) {
    const int64_t step = 4 * LANES, whole = n / step * step;
    vec sum[4] = {vec_zero(), vec_zero(), vec_zero(), vec_zero()};
    for (int64_t i = 0; i < whole; i += step)
        for (int j = 0; j < 4; j++) {
            const vec x_j = vec_load(x + i + j * LANES);
            sum[j] = vec_fma(x_j, x_j, sum[j]);
        }
    double total = squares_scalar(x + whole, n - whole);
    for (int j = 0; j < 4; j++) total += vec_sum(sum[j]);
    return total;
}
#endif

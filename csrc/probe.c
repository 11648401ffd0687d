/* probe: the limits of this machine. numpy_llama/inspect/bench.py compares the model with them.
 *
 *     read   loads every byte of the weights once     no decode is faster
 *     fma    multiply-adds in registers only          no prefill in float32 is faster
 *
 * The caller measures the time. The result proves that the work was done, and keeps the compiler from
 * removing it.
 *
 * Compiled once as it stands: the loop over threads and the scalar form. Compiled once more for each
 * instruction set: the part under VECTOR_FORMS (README.md).
 * tests/inspect/test_bench.py compares both results with their exact values. */
#include "dispatch.h"
#include "formats.h"
#include "vec.h"

/* An FMA takes 4 cycles (on Zen, and on Intel since Skylake), and two start in each cycle. So 8 independent
 * chains keep both units busy, and 12 leave some slack. The chains and the two constants take 14 of AVX2's 16
 * registers. */
enum { CHAINS = 12 };

#ifndef VECTOR_FORMS
/* Every thread reads its part of every piece, as in linear.c, but no thread waits for another. */
uint32_t nl_read_probe(const void *const *pieces, const int64_t *nbytes, int n, int threads) {
    const kernels *k = chosen_kernels();
    uint32_t sum = 0;
#pragma omp parallel for num_threads(threads) reduction(^ : sum) schedule(static) if (threads > 1)
    for (int i = 0; i < threads; i++)
        for (int j = 0; j < n; j++) {
            const int64_t part =
                (nbytes[j] / threads / 64 + 1) * 64; /* whole cache lines, so whole numbers */
            const int64_t begin = i * part, left = nbytes[j] - begin;
            if (left > 0) sum ^= k->read((const uint8_t *)pieces[j] + begin, left < part ? left : part);
        }
    return sum;
}

float nl_fma_probe(int64_t operations, int threads) {
    const kernels *k = chosen_kernels();
    float sum = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : sum) schedule(static) if (threads > 1)
    for (int i = 0; i < threads; i++) sum += k->fma(operations);
    return sum;
}

/* ---------------------------------------------------------------- scalar */

uint32_t read_scalar(const uint8_t *p, int64_t nbytes) {
    uint32_t sum = 0;
    int64_t i = 0;
    for (; i + 4 <= nbytes; i += 4) sum ^= load_u32(p + i);
    for (; i < nbytes; i++) sum ^= (uint32_t)p[i] << i % 4 * 8;
    return sum;
}

float fma_scalar(int64_t operations) {
    float x[CHAINS], sum = 0;
    for (int j = 0; j < CHAINS; j++) x[j] = (float)j;
    for (int64_t i = 0; i < operations / (2 * CHAINS); i++)
        for (int j = 0; j < CHAINS; j++) x[j] = x[j] * 0.5f + 1.0f; /* converges to 2 */
    for (int j = 0; j < CHAINS; j++) sum += x[j];
    return sum;
}

#else
/* ---------------------------------------------------------------- vectors: the same, LANES at a time
 *
 * A load of 64 bytes from memory takes some hundred cycles. A core has several dozen loads in flight when no
 * instruction waits for one: hence four sums. A thread reads one long stream, which the hardware prefetcher
 * follows best. */

enum { VEC_BYTES = 4 * LANES };

_Static_assert(384 % (2 * CHAINS * LANES) == 0, "nl_fma_probe promises any multiple of 384 operations");

VEC_TARGET uint32_t VEC(read)(const uint8_t *p, int64_t nbytes) {
    vec sum[4] = {vec_zero(), vec_zero(), vec_zero(), vec_zero()};
    int64_t i = 0;
    for (; i + 4 * VEC_BYTES <= nbytes; i += 4 * VEC_BYTES)
        for (int j = 0; j < 4; j++) sum[j] = vec_xor(sum[j], vec_load(p + i + j * VEC_BYTES));
    float lanes[LANES];
    vec_store(lanes, vec_xor(vec_xor(sum[0], sum[1]), vec_xor(sum[2], sum[3])));
    return read_scalar((const uint8_t *)lanes, VEC_BYTES) ^ read_scalar(p + i, nbytes - i);
}

VEC_TARGET float VEC(fma)(int64_t operations) {
    vec x[CHAINS];
    for (int j = 0; j < CHAINS; j++)
        x[j] = vec_all((float)j); /* different, or the compiler would merge them */
    for (int64_t i = 0; i < operations / (2 * CHAINS * LANES); i++)
        for (int j = 0; j < CHAINS; j++) x[j] = vec_fma(x[j], vec_all(0.5f), vec_all(1.0f));
    for (int j = 1; j < CHAINS; j++) x[0] = vec_add(x[0], x[j]);
    float sum[LANES];
    vec_store(sum, x[0]);
    return sum[0];
}
#endif

/* exp_log: e^x and log x for the scalar forms, in float64 and in the arithmetic of IEEE 754 alone. The last
 * bit of libm's functions depends on the system; the bits of these are the same everywhere.
 *
 * Their relative error is below 1e-12, so that a result in float32 is nearly always the nearest one. */
#ifndef NUMPY_LLAMA_EXP_LOG_H
#define NUMPY_LLAMA_EXP_LOG_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* e^x = 2^n e^r: n whole, |r| <= ln2 / 2, and ten terms of the series of e^r. 0 below -700, infinity above.
 */
static inline double exp_float64(double x) {
    static const double one_over_factorial[] = {
        1, 1, 1. / 2, 1. / 6, 1. / 24, 1. / 120, 1. / 720, 1. / 5040, 1. / 40320, 1. / 362880, 1. / 3628800};
    if (!(x > -700)) return x < 0 ? 0 : x; /* x may be NaN */
    if (x > 700) return INFINITY;
    const double n = (double)(int)(x * 1.4426950408889634 + (x < 0 ? -0.5 : 0.5));
    const double r = x - n * 0.6931471805599453;
    double sum = one_over_factorial[10];
    for (int i = 9; i >= 0; i--) sum = sum * r + one_over_factorial[i];
    const uint64_t bits = (uint64_t)(1023 + (int)n) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    return sum * power;
}

static inline float exp_float(float x) { return (float)exp_float64(x); }

/* log x = n ln2 + log m for a normal x > 0: 1/sqrt(2) <= m <= sqrt(2), log m = 2 artanh((m - 1) / (m + 1)).
 */
static inline double log_float64(double x) {
    if (!(x > 0 && x < INFINITY)) return x > 0 ? x : x == 0 ? -INFINITY : NAN;
    uint64_t bits;
    double m;
    memcpy(&bits, &x, sizeof bits);
    const int n = (int)((bits + 0x95f619980c433) >> 52) - 1023; /* x >= 2^n / sqrt(2) */
    bits -= (uint64_t)(int64_t)n << 52;
    memcpy(&m, &bits, sizeof m);
    const double s = (m - 1) / (m + 1), s2 = s * s;
    double sum = 1. / 15;
    for (int i = 13; i > 0; i -= 2) sum = sum * s2 + 1. / i;
    return n * 0.6931471805599453 + 2 * s * sum;
}

#endif

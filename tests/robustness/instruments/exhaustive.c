/* All 2^32 floats through what csrc/ computes of one float; exhaustive.py compiles and runs it.
 *
 *     exhaustive exp|silu|f16|bf16
 *
 * exp and silu on every instruction set are compared with libm in float64. An error counts units in the last
 * place of the float32 nearest to the true value. The two conversions are compared with rounding by
 * arithmetic, number by number. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dispatch.h"
#include "formats.h"

enum { BLOCK = 1 << 16, MOST_ISAS = 4 };

typedef struct {
    double ulp;
    float at;
    int64_t beyond; /* how many miss the demand */
} worst;

static double ulp_of(double x) {
    int exponent;
    frexp(x, &exponent);
    return ldexp(1, (exponent > -125 ? exponent : -125) - 24);
}

static void note(worst *to, double ulp, float at, double demand) {
    if (ulp > to->ulp) to->ulp = ulp, to->at = at;
    to->beyond += ulp > demand;
}

static void join(worst *to, const worst *from) {
    if (from->ulp > to->ulp) to->ulp = from->ulp, to->at = from->at;
    to->beyond += from->beyond;
}

static int print(const char *what, const char *isa, const worst *w) {
    printf("%-5s %-7s worst %.3g ulp at %.9g (0x%08x)", what, isa, w->ulp, w->at, bits_of_float(w->at));
    printf(w->beyond ? ", %lld beyond the demand\n" : "\n", (long long)w->beyond);
    fflush(stdout);
    return w->beyond != 0;
}

/* ---------------------------------------------------------------- exp, silu */

static double expected(int silu, float x) { return silu ? x / (1 + exp(-(double)x)) : exp(x); }

/* What is promised for other than finite numbers; and for those that exp takes to 0. */
static int special(int silu, float x, float y, double *ulp) {
    if (isnan(x) || (silu && isinf(x))) {
        *ulp = isfinite(y) || (x > 0 && !(y > 0)) ? INFINITY : 0;
        return 1;
    }
    if (!silu && x < -87) {
        *ulp = y == 0 ? 0 : INFINITY;
        return 1;
    }
    return 0;
}

static int all_floats(int silu, double demand) {
    kernels isas[MOST_ISAS];
    worst all[MOST_ISAS] = {{0, 0, 0}};
    int n = 0, failed = 0;
    for (int i = 0; nl_isa_name(i); i++) {
        nl_use_isa(nl_isa_name(i));
        n -= n > 0 && isas[n - 1].exp == chosen_kernels()->exp; /* avx_vnni has the functions of avx2 */
        isas[n++] = *chosen_kernels();
    }
#pragma omp parallel
    {
        worst own[MOST_ISAS] = {{0, 0, 0}};
        float *x = malloc(BLOCK * sizeof *x), *y = malloc(BLOCK * sizeof *y),
              *one = malloc(BLOCK * sizeof *one);
        double *exact = malloc(BLOCK * sizeof *exact), *unit = malloc(BLOCK * sizeof *unit);
#pragma omp for schedule(dynamic)
        for (int64_t block = 0; block < 1 << 16; block++) {
            for (int64_t i = 0; i < BLOCK; i++) {
                x[i] = float_of_bits((uint32_t)(block * BLOCK + i)), one[i] = 1;
                exact[i] = expected(silu, x[i]), unit[i] = ulp_of(exact[i]);
            }
            for (int k = 0; k < n; k++) {
                if (silu)
                    memcpy(y, x, BLOCK * sizeof *y), isas[k].swiglu(y, one, BLOCK);
                else
                    isas[k].exp(y, x, BLOCK);
                for (int64_t i = 0; i < BLOCK; i++) {
                    double ulp;
                    if (!silu && x[i] > 88) continue; /* attention has no such x: nothing is promised */
                    if (!special(silu, x[i], y[i], &ulp)) ulp = fabs(y[i] - exact[i]) / unit[i];
                    note(&own[k], isnan(ulp) ? INFINITY : ulp, x[i], demand);
                }
            }
        }
#pragma omp critical
        for (int k = 0; k < n; k++) join(&all[k], &own[k]);
        free(x), free(y), free(one), free(exact), free(unit);
    }
    for (int k = 0; k < n; k++) failed |= print(silu ? "silu" : "exp", isas[k].name, &all[k]);
    return failed;
}

/* ---------------------------------------------------------------- conversions */

/* A number of so many exponent and fraction bits, from its bits. */
static double decoded(uint16_t bits, int exponent_bits, int fraction_bits) {
    const int all = (1 << exponent_bits) - 1, bias = all >> 1;
    const int exponent = bits >> fraction_bits & all, fraction = bits & ((1 << fraction_bits) - 1);
    const double sign = bits >> 15 ? -1 : 1;
    if (exponent == all) return fraction ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * ldexp(fraction, 1 - bias - fraction_bits);
    return sign * ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
}

/* Where the last bit lies of such a number about as large as x. */
static int last_place(double x, int exponent_bits, int fraction_bits) {
    const int least = 2 - (1 << exponent_bits) / 2;
    int exponent;
    frexp(x, &exponent);
    return (exponent - 1 > least ? exponent - 1 : least) - fraction_bits;
}

static int conversion(const char *what, int format, int exponent_bits, int fraction_bits) {
    static double numbers[1 << 16];
    for (int i = 0; i < 1 << 16; i++) numbers[i] = decoded((uint16_t)i, exponent_bits, fraction_bits);
    worst all = {0, 0, 0};
#pragma omp parallel
    {
        worst own = {0, 0, 0};
        float *x = malloc(BLOCK * sizeof *x);
        uint16_t *y = malloc(BLOCK * sizeof *y);
#pragma omp for schedule(dynamic)
        for (int64_t block = 0; block < 1 << 16; block++) {
            for (int64_t i = 0; i < BLOCK; i++) x[i] = float_of_bits((uint32_t)(block * BLOCK + i));
            nl_convert(y, format, x, F32, 1, BLOCK, 1);
            /* all of a block have one exponent, or are subnormal */
            const int place = last_place(x[BLOCK - 1], exponent_bits, fraction_bits);
            const double unit = ldexp(1, place), inverse = ldexp(1, -place),
                         end = ldexp(1, 1 << (exponent_bits - 1));
            for (int64_t i = 0; i < BLOCK; i++) {
                const double got = numbers[y[i]];
                const int same_sign = y[i] >> 15 == (int)(bits_of_float(x[i]) >> 31);
                const int quiet = y[i] >> (fraction_bits - 1) & 1;
                /* to the nearest whole unit, ties to even, as float64 rounds */
                const double near = nearbyint(x[i] * inverse) * unit;
                const double wanted = fabs(near) >= end ? copysign(INFINITY, near) : near;
                const int right = isnan(x[i]) ? isnan(got) && quiet : got == (isinf(x[i]) ? x[i] : wanted);
                note(&own, right && same_sign ? 0 : 1, x[i], 0);
            }
        }
#pragma omp critical
        join(&all, &own);
        free(x), free(y);
    }
    return print(what, "", &all);
}

int main(int n, char **arguments) {
    const char *what = n == 2 ? arguments[1] : "";
    if (!strcmp(what, "exp")) return all_floats(0, 2);
    if (!strcmp(what, "silu")) return all_floats(1, 3);
    if (!strcmp(what, "f16")) return conversion("f16", F16, 5, 10);
    if (!strcmp(what, "bf16")) return conversion("bf16", BF16, 8, 7);
    fprintf(stderr, "exhaustive exp|silu|f16|bf16\n");
    return 2;
}

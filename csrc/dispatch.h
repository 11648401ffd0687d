/* One table of functions for each instruction set; dispatch.c chooses one when the module is loaded. */
#ifndef NUMPY_LLAMA_DISPATCH_H
#define NUMPY_LLAMA_DISPATCH_H

#include <stdint.h>

typedef struct {
    const float *x;
    const uint8_t *w;
    float *y;
    int format;
    int64_t T, OUT, IN;
} linear_args;

typedef struct {
    const float *q;
    const uint8_t *k, *v;
    float *out;
    int format;
    int64_t B, T, S, H, K, Dh;
    int64_t k_strides[3], v_strides[3]; /* in numbers: batch, position, head */
    int64_t begin, end;                 /* the queries to compute */
} attention_args;

typedef struct {
    const char *name;
    void (*linear_rows)(const linear_args *a, int64_t begin, int64_t end);
    void (*attention_item)(const attention_args *a, int64_t item, float *scratch);
    void (*exp)(float *y, const float *x, int64_t n);
} kernels;

const kernels *chosen_kernels(void);

void linear_rows_scalar(const linear_args *a, int64_t begin, int64_t end);
void linear_rows_avx2(const linear_args *a, int64_t begin, int64_t end);
void attention_item_scalar(const attention_args *a, int64_t item, float *scratch);
void attention_item_avx2(const attention_args *a, int64_t item, float *scratch);
void exp_scalar(float *y, const float *x, int64_t n);
void exp_avx2(float *y, const float *x, int64_t n);

#endif

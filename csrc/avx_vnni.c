/* The vector forms for quantized activations, compiled for AVX2 with AVX_VNNI. avx2 has all others. */
#include "dispatch.h"
#ifdef HAS_AVX_VNNI
#define AVX_VNNI
#define VECTOR_FORMS "vec_avx2.h"
#include "vec.h"

#include "quantized_activations.c"

#include "linear_gemv.c"

#include "linear_gemm.c"

#include "linear.c"
#endif

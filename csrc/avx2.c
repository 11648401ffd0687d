/* The vector forms of all kernels, compiled for AVX2. */
#include "dispatch.h"
#ifdef X86
#define VECTOR_FORMS "vec_avx2.h"
#include "vector_forms.h"
#endif

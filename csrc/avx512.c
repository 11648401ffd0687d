/* The vector forms of all kernels, compiled for AVX-512 with VNNI. */
#include "dispatch.h"
#ifdef X86
#define VECTOR_FORMS "vec_avx512.h"
#include "vector_forms.h"
#endif

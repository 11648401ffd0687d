/* The vector forms of all kernels, compiled for NEON. */
#include "dispatch.h"
#ifdef ARM64
#define VECTOR_FORMS "vec_neon.h"
#include "vector_forms.h"
#endif

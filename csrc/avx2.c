/* The vector forms of linear, attention and the probes, compiled in the words of vec_avx2.h. */
#include "vec.h"
#ifdef X86
#include "vec_avx2.h"

#include "quantized_activations.c"

#include "linear_gemv.c"

#include "linear_gemm.c"

#include "attention.c"

#include "layer.c"

#include "probe.c"
#endif

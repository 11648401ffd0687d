/* The vector forms of all kernels. avx2.c, avx512.c and neon.c include this, so each of these files is
 * compiled once for each instruction set, with VECTOR_FORMS defined (README.md, "What is compiled when"). */
#include "vec.h"

#include "quantized_activations.c"

#include "linear_gemv.c"

#include "linear_gemm.c"

#include "linear.c"

#include "linear_backward.c"

#include "attention.c"

#include "attention_backward.c"

#include "lora.c"

#include "layer.c"

#include "training.c"

#include "probe.c"

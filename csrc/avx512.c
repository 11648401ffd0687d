/* The vector forms of linear, attention and the probes, compiled in the words of vec_avx512.h. */
#include "vec.h"
#ifdef X86
#include "vec_avx512.h"

#include "fixed.c"

#include "few_tokens.c"

#include "many_tokens.c"

#include "attention.c"

#include "layer.c"

#include "probe.c"
#endif

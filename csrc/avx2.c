/* The vector forms of linear.c, attention.c and probe.c, compiled in the words of vec_avx2.h. */
#include "vec.h"
#ifdef X86
#include "vec_avx2.h"

#include "linear.c"

#include "fixed.c"

#include "attention.c"

#include "probe.c"
#endif

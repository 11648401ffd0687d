/* The vector forms of linear.c and attention.c, compiled in the words of vec_avx2.h. */
#include "vec.h"
#ifdef X86
#include "vec_avx2.h"

#include "linear.c"

#include "attention.c"
#endif

/* The vector functions of the instruction set that is being compiled, and all that the kernels assume of it.
 *
 * avx2.c, avx_vnni.c, avx512.c and neon.c define VECTOR_FORMS as the name of their header. A header defines
 *
 *     LANES, MR, TILE_ROWS              constants, explained in vec_avx2.h
 *     BYTE_RUN, SIGNED_BYTES            how it multiplies bytes, explained there too
 *     VEC, VEC_TARGET, VEC_INLINE       the name, the target and the inlining of a function
 *     vec                               LANES floats
 *     ints                              LANES int32, or 2 LANES int16, or 4 LANES bytes
 *
 * and a function for each operation on them. Another instruction set is one more header of this kind. Only
 * these headers have intrinsics. */
#ifndef NUMPY_LLAMA_VEC_H
#define NUMPY_LLAMA_VEC_H
#ifdef VECTOR_FORMS

#include VECTOR_FORMS

#include "dispatch.h"
#include "formats.h"

enum { NR = 2 * LANES }; /* linear_gemm.c: rows of a panel */

/* What is subtracted from the bytes of a format. Where bytes may not have a sign, those of a format with one
 * are q + 128. */
INLINE int byte_zero(const int format) {
    return has_sign(format) ? (SIGNED_BYTES ? 0 : 128) : format_of(format).zero;
}

/* sum + the products of n fours of bytes in each lane. x[k * stride] goes into all lanes. */
VEC_INLINE ints byte_dots(const int format, ints sum, const ints *q, const int32_t *x, const int64_t stride,
                          const int n) {
    const int run = BYTE_RUN(largest_q(format));
    for (int k = 0; k < n; k += run) {
        ints some = byte_dots_begin(sum);
        for (int i = k; i < k + run && i < n; i++)
            some = byte_dot(SIGNED_BYTES && has_sign(format), some, q[i], x + i * stride);
        sum = byte_dots_end(some, sum);
    }
    return sum;
}

/* What the pointer points to is loaded behind this, and not earlier. */
#define LOADED_FROM_HERE(pointer) __asm__("" : "+r"(pointer))

/* Ask for the cache lines of nbytes from p on, in L1 or in L2. A prefetch is a hint and never faults. */
VEC_INLINE void prefetch_to_l1(const void *p, int64_t nbytes) {
    for (int64_t i = 0; i < nbytes; i += 64) __builtin_prefetch((const uint8_t *)p + i);
}
VEC_INLINE void prefetch_to_l2(const void *p, int64_t nbytes) {
    for (int64_t i = 0; i < nbytes; i += 64) __builtin_prefetch((const uint8_t *)p + i, 0, 2);
}

/* What is assumed of an instruction set, by which file, and why. A file itself checks its own constants. */
_Static_assert(QK % LANES == 0, "all: a block of 32 is whole registers, so there are no ragged ends");
_Static_assert(LANES % 2 == 0, "layer.c: a register holds whole complex numbers");
_Static_assert(LANES % 4 == 0, "attention.c: decode_scores takes LANES / 4 keys at a time");
_Static_assert(PACKED_ROWS % LANES == 0, "unpack.h: packed rows fill whole registers");
_Static_assert(KC % QK_K == 0, "linear_gemm.c: a panel holds whole blocks");
_Static_assert(TOKEN_GROUP % MR == 0, "linear_gemm.c: a micro-kernel's tokens lie in one group");
_Static_assert(NL_PANEL_ROWS % NR == 0, "linear.c: threads share out whole panels");
_Static_assert(NL_PANEL_ROWS % PACKED_ROWS == 0, "linear.c: threads share out whole packed groups");

#endif
#endif

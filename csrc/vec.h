/* The vector functions of the instruction set that is being compiled, and all that the kernels assume of it.
 *
 * avx2.c and avx512.c define VECTOR_FORMS as the name of their header. A header defines
 *
 *     LANES, MR, BLOCKS_PER_STEP, TILE_ROWS     constants, explained in vec_avx2.h
 *     VEC, VEC_TARGET, VEC_INLINE               the name, the target and the inlining of a function
 *     vec                                       LANES floats
 *     ints                                      LANES int32, or 2 LANES int16, or 4 LANES bytes
 *     vec_scales                                four floats for each block of a step
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

/* A number in memory is loaded into all lanes at no cost. This keeps it there: gcc would otherwise hold it in
 * a register and shuffle it out. */
#define STAYS_STORED(array) __asm__("" : "+m"(array))

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
_Static_assert(LANES % 4 == 0, "linear_gemv.c: a register of shorts holds the scales of whole rows of four");
_Static_assert(LANES % 4 == 0, "attention.c: decode_scores takes LANES / 4 keys at a time");
_Static_assert(16 % LANES == 0, "linear_gemv.c: four rows of four sums of minima are 16 / LANES registers");
_Static_assert(BLOCKS_PER_STEP * 16 == 2 * LANES,
               "linear_gemv.c: half of each block of a step fills a register");
_Static_assert(QK_K % (4 * LANES) == 0, "linear_gemv.c: a K block is whole registers of bytes");
_Static_assert(sizeof(vec_scales) == 4 * BLOCKS_PER_STEP * sizeof(float),
               "linear_gemv.c: a scale for each row");
_Static_assert(KC % QK_K == 0, "linear_gemm.c: a panel holds whole blocks");
_Static_assert(TOKEN_GROUP % MR == 0, "linear_gemm.c: a micro-kernel's tokens lie in one group");
_Static_assert(NL_PANEL_ROWS % NR == 0, "linear.c: threads share out whole panels");

#endif
#endif

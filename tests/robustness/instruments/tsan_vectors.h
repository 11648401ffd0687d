/* clang does not report an access of 32 or 64 bytes to ThreadSanitizer. sanitize.py includes this header
 * before each C file, so that the loads and stores of csrc/vec_*.h are reported. A gather is not: it only
 * reads weights. */
#pragma once

#ifdef __x86_64__
/* team.c defines this too, but immintrin.h already includes system headers. */
#define _GNU_SOURCE
#include <immintrin.h>

void __tsan_read_range(void *begin, unsigned long bytes);
void __tsan_write_range(void *begin, unsigned long bytes);

/* A macro is not expanded inside itself, so the name on the right is the intrinsic. */
#define LOAD(load, p, bytes) (__tsan_read_range((void *)(p), bytes), load(p))
#define STORE(store, p, a, bytes) (__tsan_write_range((void *)(p), bytes), store(p, a))
#define _mm256_loadu_ps(p) LOAD(_mm256_loadu_ps, p, 32)
#define _mm256_loadu_si256(p) LOAD(_mm256_loadu_si256, p, 32)
#define _mm256_storeu_ps(p, a) STORE(_mm256_storeu_ps, p, a, 32)
#define _mm256_storeu_si256(p, a) STORE(_mm256_storeu_si256, p, a, 32)
#define _mm512_loadu_ps(p) LOAD(_mm512_loadu_ps, p, 64)
#define _mm512_loadu_si512(p) LOAD(_mm512_loadu_si512, p, 64)
#define _mm512_storeu_ps(p, a) STORE(_mm512_storeu_ps, p, a, 64)
#define _mm512_storeu_si512(p, a) STORE(_mm512_storeu_si512, p, a, 64)
#endif

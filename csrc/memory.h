/* memory: allocation in whole pairs of cache lines, so that no two threads write to the same line. */
#ifndef NUMPY_LLAMA_MEMORY_H
#define NUMPY_LLAMA_MEMORY_H

#include <stdint.h>
#include <stdlib.h>
#ifdef _WIN32
#include <malloc.h>
#endif

enum { ALIGNMENT = 128 };

/* Memory for so many bytes, or NULL. It is released by `free_aligned` alone. */
static inline void *allocate_aligned(int64_t bytes) {
    const size_t whole = ((size_t)bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
#ifdef _WIN32
    return _aligned_malloc(whole, ALIGNMENT);
#else
    return aligned_alloc(ALIGNMENT, whole);
#endif
}

static inline void free_aligned(void *memory) {
#ifdef _WIN32
    _aligned_free(memory);
#else
    free(memory);
#endif
}

#endif

/* team: can the calling thread have a team of `threads`, and do their stacks hold the kernels?
 *
 * GNU OpenMP ends the process when a thread cannot be made: no exception, no `finally`. So threads with the
 * same stacks are made here first, by pthread_create, which returns its failure:
 *
 *     1. make as many threads as the team lacks; each waits, so that all of them live at once
 *     2. let them end, and wait until the system no longer counts them
 *     3. if all could be made, let OpenMP make its team now, before another program uses the room */
#define _GNU_SOURCE /* pthread_getattr_np */
#include <stdint.h>

#include "kernels.h"

#ifdef NL_POOL /* pool.c has the team */
#elif defined(_OPENMP) && !defined(_WIN32)
#include <omp.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

enum { WAITS = 1000, WAIT_US = 50 }; /* until a thread that has ended is no longer counted */

typedef struct {
    pthread_mutex_t gate; /* held while threads are made */
    int64_t room;         /* the least of all their stacks; written behind the gate */
} applicants;

/* Bytes between here and the end of this thread's stack. */
static int64_t stack_room(void) {
    int64_t room = INT64_MAX;
#ifdef __linux__
    pthread_attr_t attr;
    void *end;
    size_t size;
    if (pthread_getattr_np(pthread_self(), &attr) == 0) {
        if (pthread_attr_getstack(&attr, &end, &size) == 0) room = (char *)&attr - (char *)end;
        pthread_attr_destroy(&attr);
    }
#endif
    return room;
}

static void *apply(void *shared) {
    applicants *all = shared;
    const int64_t room = stack_room();
    pthread_mutex_lock(&all->gate);
    if (room < all->room) all->room = room;
    pthread_mutex_unlock(&all->gate);
    return NULL;
}

/* How many links /proc/self/task has: two, and one for each thread that the system still counts. */
static int64_t counted(void) {
    struct stat task;
    return stat("/proc/self/task", &task) == 0 ? (int64_t)task.st_nlink : 0;
}

/* -> how many of n threads could be made. */
static int make_and_end(int n, int64_t stack, int64_t *room) {
    applicants all = {.gate = PTHREAD_MUTEX_INITIALIZER, .room = INT64_MAX};
    pthread_t *threads = malloc((size_t)n * sizeof *threads);
    pthread_attr_t attr;
    if (!threads) return 0;
    pthread_attr_init(&attr);
    if (stack)
        pthread_attr_setstacksize(&attr, (size_t)stack); /* as in libgomp, one too small changes nothing */
    const int64_t before = counted();
    int made = 0;
    pthread_mutex_lock(&all.gate);
    while (made < n && pthread_create(&threads[made], &attr, apply, &all) == 0) made++;
    pthread_mutex_unlock(&all.gate);
    for (int i = 0; i < made; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < WAITS && counted() > before; i++) usleep(WAIT_US);
    pthread_attr_destroy(&attr);
    free(threads);
    *room = all.room;
    return made;
}

int nl_form_team(int threads, int have, int64_t stack, int64_t room[2]) {
    const int limit = omp_get_thread_limit(); /* OMP_THREAD_LIMIT: OpenMP asks for no more */
    const int wanted = threads < limit ? threads : limit, lacking = wanted - have;
    int formed = 0;
    room[0] = stack_room(), room[1] = INT64_MAX;
    if (lacking > 0) {
        const int made = make_and_end(lacking, stack, &room[1]);
        if (made < lacking) return have + made;
    }
#pragma omp parallel num_threads(wanted) reduction(+ : formed) if (wanted > 1)
    formed++;
    return formed > 0 ? threads : 0;
}
#else
int nl_form_team(int threads, int have, int64_t stack, int64_t room[2]) {
    (void)have, (void)stack;
    room[0] = room[1] = INT64_MAX;
    return threads;
}
#endif

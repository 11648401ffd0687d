/* pool: OpenMP's library, as far as the kernels use it, for compilers that come without one.
 *
 * clang compiles `#pragma omp` into calls of LLVM's library, whose names begin with __kmpc. Apple's clang and
 * zig do so too (-fopenmp), but have no such library. Here are these functions. The kernels are the same as
 * with OpenMP, and so are their bits. Nothing is exported, so another library of OpenMP in the process, such
 * as PyTorch's, does no harm.
 *
 *     a parallel region    the caller is thread 0; workers 1 .. n - 1 wait for a new `region`, run it, arrive
 *     a second caller      another Python thread, while the pool is busy: its region has one thread
 *     waiting              SPINS looks at a number, then the system's condition variable
 *     after a fork         the child has no workers, and makes new ones
 *
 * The signatures are those of LLVM's openmp/runtime/src/kmp.h. */
#include "omp.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#include "../kernels.h"

#ifdef _WIN32
#include <windows.h>
typedef SRWLOCK lock_t;
typedef CONDITION_VARIABLE condition_t;
#define UNLOCKED SRWLOCK_INIT
#define NOBODY_WAITS CONDITION_VARIABLE_INIT
static void lock(lock_t *l) { AcquireSRWLockExclusive(l); }
static int try_lock(lock_t *l) { return TryAcquireSRWLockExclusive(l); }
static void unlock(lock_t *l) { ReleaseSRWLockExclusive(l); }
static void wait(condition_t *c, lock_t *l) { SleepConditionVariableSRW(c, l, INFINITE, 0); }
static void wake(condition_t *c) { WakeAllConditionVariable(c); }
static DWORD WINAPI work(void *index);
static int start(intptr_t index, size_t stack) {
    HANDLE made = CreateThread(NULL, stack, work, (void *)index, STACK_SIZE_PARAM_IS_A_RESERVATION, NULL);
    return made && CloseHandle(made);
}
#else
#include <pthread.h>
typedef pthread_mutex_t lock_t;
typedef pthread_cond_t condition_t;
#define UNLOCKED PTHREAD_MUTEX_INITIALIZER
#define NOBODY_WAITS PTHREAD_COND_INITIALIZER
static void lock(lock_t *l) { pthread_mutex_lock(l); }
static int try_lock(lock_t *l) { return pthread_mutex_trylock(l) == 0; }
static void unlock(lock_t *l) { pthread_mutex_unlock(l); }
static void wait(condition_t *c, lock_t *l) { pthread_cond_wait(c, l); }
static void wake(condition_t *c) { pthread_cond_broadcast(c); }
static void *work(void *index);
static int start(intptr_t index, size_t stack) {
    pthread_attr_t attr;
    pthread_t made;
    if (pthread_attr_init(&attr)) return 0;
    pthread_attr_setstacksize(&attr, stack);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    const int status = pthread_create(&made, &attr, work, (void *)index);
    pthread_attr_destroy(&attr);
    return status == 0;
}
#endif

enum { MOST_THREADS = 1023, REGION = 1024, MOST_ARGUMENTS = 16, SPINS = 10000, STACK = 4 << 20 };
typedef void microtask(int32_t *thread, int32_t *bound, ...);
typedef void microtask_16(int32_t *, int32_t *, void *, void *, void *, void *, void *, void *, void *,
                          void *, void *, void *, void *, void *, void *, void *, void *, void *);

/* The state of a thread. Thread 0 of a region is its caller. */
static _Thread_local int own_index, own_threads = 1, asked = 1;
static _Thread_local int64_t own_loops, own_singles; /* how many it has begun */

static lock_t busy = UNLOCKED;     /* held by the caller during a region */
static lock_t gate = UNLOCKED;     /* of `changed`, and of the numbers of a loop */
static lock_t critical = UNLOCKED; /* of critical regions and reductions */
static condition_t changed = NOBODY_WAITS;
static int workers; /* made so far: their indices are 1 .. workers */
/* region: the number of the present one, times REGION, and its threads. So a worker that comes late reads
 * whether it is one of them before it reads `team`, which is that of the next region by then. */
static _Atomic int64_t region, arrived, barriers, sleepers;

typedef struct {
    int64_t next, end, step;
} loop; /* a dynamic one: its next element, and its last */

static struct {
    microtask_16 *task;
    void *arguments[MOST_ARGUMENTS];
    int64_t loops, singles; /* begun by any thread */
    loop now;
} team;
static _Thread_local loop own_loop; /* in a region of one thread */

/* Wait until *number is another one than `old`. */
static void await_change(_Atomic int64_t *number, int64_t old) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load(number) != old) return;
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
    }
    lock(&gate);
    atomic_fetch_add(&sleepers, 1);
    while (atomic_load(number) == old) wait(&changed, &gate);
    atomic_fetch_sub(&sleepers, 1);
    unlock(&gate);
}

/* Another number, for all who wait for it. */
static void announce(_Atomic int64_t *number, int64_t value) {
    atomic_store(number, value);
    if (!atomic_load(&sleepers)) return;
    lock(&gate);
    wake(&changed);
    unlock(&gate);
}

static void run(int index, int threads) {
    int32_t thread = index, bound = index;
    own_index = index, own_threads = threads, own_loops = own_singles = 0;
    void **a = team.arguments; /* a function ignores the arguments behind its own */
    team.task(&thread, &bound, a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11],
              a[12], a[13], a[14], a[15]);
}

/* All threads of the team come here before one goes on. */
static void meet(void) {
    const int64_t before = atomic_load(&barriers);
    if (atomic_fetch_add(&arrived, 1) + 1 < own_threads) {
        await_change(&barriers, before);
    } else {
        atomic_store(&arrived, 0);
        announce(&barriers, before + 1);
    }
}

#ifdef _WIN32
static DWORD WINAPI work(void *index) {
#else
static void *work(void *index) {
#endif
    const int own = (int)(intptr_t)index;
    for (int64_t seen = 0;;) {
        await_change(&region, seen);
        seen = atomic_load(&region);
        if (own >= seen % REGION) continue;
        run(own, (int)(seen % REGION));
        meet();
    }
    return 0;
}

#ifndef _WIN32
static void forget_workers(void) {
    workers = 0, busy = gate = critical = (lock_t)UNLOCKED, changed = (condition_t)NOBODY_WAITS;
}
#endif

/* Make workers until there are `wanted`; -> how many there are. `busy` is held. */
static int hire(int wanted) {
#ifndef _WIN32
    static int prepared;
    if (!prepared) prepared = !pthread_atfork(NULL, NULL, forget_workers);
#endif
    if (!workers) atomic_store(&region, 0), atomic_store(&arrived, 0), atomic_store(&sleepers, 0);
    while (workers < wanted && workers < MOST_THREADS - 1 && start(workers + 1, STACK)) workers++;
    return workers < wanted ? workers : wanted;
}

int nl_form_team(int threads, int have, int64_t stack, int64_t room[2]) {
    (void)have, (void)stack;
    room[0] = room[1] = INT64_MAX;
    lock(&busy);
    const int made = 1 + hire(threads - 1);
    unlock(&busy);
    return made;
}

#ifndef _WIN32
#pragma GCC visibility push(hidden)
#endif

int omp_get_num_threads(void) { return own_threads; }
int omp_get_thread_num(void) { return own_index; }
int omp_get_thread_limit(void) { return MOST_THREADS; }

/* ---------------------------------------------------------------- what the compiler calls */

typedef struct ident ident;

int32_t __kmpc_global_thread_num(ident *where) { return (void)where, own_index; }
void __kmpc_push_num_threads(ident *where, int32_t thread, int32_t n) {
    (void)where, (void)thread, asked = n;
}

void __kmpc_fork_call(ident *where, int32_t n, microtask *task, ...) {
    va_list list;
    void *given[MOST_ARGUMENTS] = {0};
    (void)where;
    if (n > MOST_ARGUMENTS) abort();
    va_start(list, task);
    for (int i = 0; i < n; i++) given[i] = va_arg(list, void *);
    va_end(list);
    int32_t zero = 0, bound = 0;
    microtask_16 *call = (microtask_16 *)(void (*)(void))task;
    if (own_threads > 1 || asked < 2 || !try_lock(&busy)) { /* within a region, or beside one */
        const int index = own_index, threads = own_threads;
        own_index = 0, own_threads = 1;
        void **a = given;
        call(&zero, &bound, a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12],
             a[13], a[14], a[15]);
        own_index = index, own_threads = threads;
        return;
    }
    const int threads = 1 + hire(asked - 1);
    team.task = call, team.loops = team.singles = 0;
    for (int i = 0; i < MOST_ARGUMENTS; i++) team.arguments[i] = given[i];
    if (threads > 1) announce(&region, (atomic_load(&region) / REGION + 1) * REGION + threads);
    run(0, threads);
    if (threads > 1) meet();
    own_threads = 1;
    unlock(&busy);
}

/* A region without threads: `if` is false. */
void __kmpc_serialized_parallel(ident *where, int32_t thread) { (void)where, (void)thread; }
void __kmpc_end_serialized_parallel(ident *where, int32_t thread) { (void)where, (void)thread; }

/* The part of a thread in lower .. upper, both included. */
void __kmpc_for_static_init_8(ident *where, int32_t thread, int32_t schedule, int32_t *last, int64_t *lower,
                              int64_t *upper, int64_t *stride, int64_t step, int64_t chunk) {
    (void)where, (void)thread, (void)schedule, (void)chunk;
    const int64_t n = (*upper - *lower) / step + 1, begin = n * own_index / own_threads,
                  end = n * (own_index + 1) / own_threads, first = *lower;
    *stride = n * step, *last = end == n && begin < end;
    if (begin < end)
        *lower = first + begin * step, *upper = first + (end - 1) * step;
    else
        *lower = *upper + step; /* nothing: behind the last one, which has no sign perhaps */
}
void __kmpc_for_static_init_4(ident *where, int32_t thread, int32_t schedule, int32_t *last, int32_t *lower,
                              int32_t *upper, int32_t *stride, int32_t step, int32_t chunk) {
    int64_t from = *lower, to = *upper, far;
    __kmpc_for_static_init_8(where, thread, schedule, last, &from, &to, &far, step, chunk);
    *lower = (int32_t)from, *upper = (int32_t)to, *stride = (int32_t)far;
}
void __kmpc_for_static_fini(ident *where, int32_t thread) { (void)where, (void)thread; }

/* schedule(dynamic): one element at a time. The first thread that comes to a loop sets its numbers. */
void __kmpc_dispatch_init_8(ident *where, int32_t thread, int32_t schedule, int64_t lower, int64_t upper,
                            int64_t step, int64_t chunk) {
    (void)where, (void)thread, (void)schedule, (void)chunk;
    const loop whole = {lower, upper, step};
    if (own_threads == 1) {
        own_loop = whole;
        return;
    }
    lock(&gate);
    if (++own_loops > team.loops) team.loops = own_loops, team.now = whole;
    unlock(&gate);
}
int32_t __kmpc_dispatch_next_8(ident *where, int32_t thread, int32_t *last, int64_t *lower, int64_t *upper,
                               int64_t *stride) {
    (void)where, (void)thread;
    loop *now = own_threads == 1 ? &own_loop : &team.now;
    lock(&gate);
    const int more = now->next <= now->end;
    *lower = *upper = now->next, *stride = 1, *last = now->next == now->end;
    if (more) now->next += now->step;
    unlock(&gate);
    return more;
}
/* The same without a sign: no number here is that large. */
void __kmpc_for_static_init_8u(ident *where, int32_t thread, int32_t schedule, int32_t *last, uint64_t *lower,
                               uint64_t *upper, int64_t *stride, int64_t step, int64_t chunk) {
    __kmpc_for_static_init_8(where, thread, schedule, last, (int64_t *)lower, (int64_t *)upper, stride, step,
                             chunk);
}
void __kmpc_dispatch_init_8u(ident *where, int32_t thread, int32_t schedule, uint64_t lower, uint64_t upper,
                             int64_t step, int64_t chunk) {
    __kmpc_dispatch_init_8(where, thread, schedule, (int64_t)lower, (int64_t)upper, step, chunk);
}
int32_t __kmpc_dispatch_next_8u(ident *where, int32_t thread, int32_t *last, uint64_t *lower, uint64_t *upper,
                                int64_t *stride) {
    return __kmpc_dispatch_next_8(where, thread, last, (int64_t *)lower, (int64_t *)upper, stride);
}
void __kmpc_dispatch_deinit(ident *where, int32_t thread) { (void)where, (void)thread; }

void __kmpc_barrier(ident *where, int32_t thread) {
    (void)where, (void)thread;
    if (own_threads > 1) meet();
}

int32_t __kmpc_single(ident *where, int32_t thread) {
    (void)where, (void)thread;
    if (own_threads == 1) return 1;
    lock(&gate);
    const int first = ++own_singles > team.singles;
    if (first) team.singles = own_singles;
    unlock(&gate);
    return first;
}
void __kmpc_end_single(ident *where, int32_t thread) { (void)where, (void)thread; }

void __kmpc_critical(ident *where, int32_t thread, void *name) {
    (void)where, (void)thread, (void)name;
    lock(&critical);
}
void __kmpc_end_critical(ident *where, int32_t thread, void *name) {
    (void)where, (void)thread, (void)name;
    unlock(&critical);
}

/* Each thread adds its own result to that of all, one thread at a time. */
int32_t __kmpc_reduce_nowait(ident *where, int32_t thread, int32_t n, size_t size, void *data,
                             void (*reduce)(void *, void *), void *name) {
    (void)n, (void)size, (void)data, (void)reduce;
    __kmpc_critical(where, thread, name);
    return 1;
}
void __kmpc_end_reduce_nowait(ident *where, int32_t thread, void *name) {
    __kmpc_end_critical(where, thread, name);
}

/* watch: one line and exit code 1, instead of SIGBUS, when a mapped file is cut while it is in use.
 *
 * An access to a mapped page behind the file's new end raises SIGBUS, at any instruction and on any thread.
 * The process cannot go on, because the weights are gone. The handler looks up the address among the watched
 * ranges. If one contains it, the handler writes the line that names the file and ends the process. Any other
 * SIGBUS goes to the handler that was installed before.
 *
 * A signal handler may only call async-signal-safe functions. This one reads a fixed table of finished lines
 * and calls write(2), pause(2), _exit(2), sigaction(2) and raise(3).
 *
 * Windows lets nobody cut a file that is mapped, so there is nothing to watch. */
#define _XOPEN_SOURCE 700 /* SA_SIGINFO */
#include <stdint.h>

#include "kernels.h"

#ifdef _WIN32
int nl_watch(const void *begin, int64_t nbytes, const char *name) {
    (void)begin, (void)nbytes, (void)name;
    return 0;
}
void nl_unwatch(const void *begin) { (void)begin; }
#else
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <unistd.h>

enum { RANGES = 256, LINE = 1024 };
enum { FREE = 0, BUSY = 1 }; /* values of `begin`: no range begins at these addresses */

static struct {
    _Atomic uintptr_t begin; /* written last, so the handler never reads half an entry */
    uintptr_t end;
    int length;
    char line[LINE];
} table[RANGES];

static struct sigaction previous;

static atomic_flag reported = ATOMIC_FLAG_INIT;

static void on_sigbus(int signal, siginfo_t *info, void *context) {
    const uintptr_t at =
        info->si_code > 0 ? (uintptr_t)info->si_addr : FREE; /* <= 0: sent by a process, no address */
    for (int i = 0; i < RANGES; i++) {
        const uintptr_t begin = atomic_load(&table[i].begin);
        if (begin > BUSY && begin <= at && at < table[i].end) {
            while (atomic_flag_test_and_set(&reported))
                pause(); /* another thread writes the line and then ends the process */
            const ssize_t written = write(STDERR_FILENO, table[i].line, (size_t)table[i].length);
            (void)written;
            _exit(1);
        }
    }
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(signal, info, context);
    } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(signal);
    } else {
        sigaction(SIGBUS, &previous, NULL);
        raise(signal); /* delivered when this handler returns */
    }
}

int nl_watch(const void *begin, int64_t nbytes, const char *name) {
    static atomic_flag installed = ATOMIC_FLAG_INIT;
    for (int i = 0; i < RANGES; i++) {
        uintptr_t expected = FREE;
        if (!atomic_compare_exchange_strong(&table[i].begin, &expected, BUSY)) continue;
        table[i].end = (uintptr_t)begin + (uintptr_t)nbytes;
        table[i].length =
            snprintf(table[i].line, LINE,
                     "numpy-llama: %.900s was cut while it was in use; its weights are gone\n", name);
        atomic_store(&table[i].begin, (uintptr_t)begin);
        if (!atomic_flag_test_and_set(&installed)) {
            struct sigaction ours = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK};
            sigemptyset(&ours.sa_mask);
            sigaction(SIGBUS, &ours, &previous);
        }
        return 0;
    }
    return -1;
}

void nl_unwatch(const void *begin) {
    for (int i = 0; i < RANGES; i++) {
        uintptr_t expected = (uintptr_t)begin;
        if (atomic_compare_exchange_strong(&table[i].begin, &expected, FREE)) return;
    }
}
#endif

/* watch: when a mapped file is cut by someone else, say so and leave, instead of dying by a signal.
 *
 * Who touches a mapped page that the file no longer reaches gets SIGBUS, at any instruction and on any
 * thread. There is no way to go on: the weights are gone. So one handler looks whether the address lies in
 * a watched range, writes one line that names the file, and ends the process. Any other SIGBUS goes to
 * whoever would have had it. A handler may only do what is async-signal-safe: here, read a fixed table
 * whose text is ready, write(2), pause(2), _exit(2) and sigaction(2). */
#define _XOPEN_SOURCE 700 /* SA_SIGINFO */

#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <unistd.h>

#include "kernels.h"

enum { RANGES = 256, LINE = 1024 };
enum { FREE = 0, BUSY = 1 }; /* no range begins there */

static struct {
    _Atomic uintptr_t begin; /* written last, so that the handler never sees half an entry */
    uintptr_t end;
    int length;
    char line[LINE];
} table[RANGES];

static struct sigaction before;

static atomic_flag said = ATOMIC_FLAG_INIT;

static void on_sigbus(int signal, siginfo_t *info, void *context) {
    const uintptr_t at = info->si_code > 0 ? (uintptr_t)info->si_addr : FREE; /* <= 0: sent by a process */
    for (int i = 0; i < RANGES; i++) {
        const uintptr_t begin = atomic_load(&table[i].begin);
        if (begin > BUSY && begin <= at && at < table[i].end) {
            while (atomic_flag_test_and_set(&said))
                pause(); /* another thread is saying it, and then ends us */
            const ssize_t written = write(STDERR_FILENO, table[i].line, (size_t)table[i].length);
            (void)written;
            _exit(1);
        }
    }
    if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(signal, info, context);
    } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        before.sa_handler(signal);
    } else {
        sigaction(SIGBUS, &before, NULL);
        raise(signal); /* comes as soon as this returns */
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
            sigaction(SIGBUS, &ours, &before);
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

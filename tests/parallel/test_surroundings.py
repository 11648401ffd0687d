"""What a rank meets: CPUs that mpiexec has taken from it, and signals."""

import os
import signal
import sys

import pytest

from numpy_llama.backend import limits
from numpy_llama.parallel.load import slow
from numpy_llama.parallel.ranks import Ranks, delayed_signals, share_of_cpus

BOUND = "bound to 1 of its {} CPUs: start with --bind-to none (Open MPI) or I_MPI_PIN=0 (Intel MPI)"
THREADS = "{} threads, but {} ranks on this machine have {} CPUs each: give -t {}"


@pytest.mark.parametrize("own, parent, quota, local, share, threads, hints", [
    (16, 16, None, 1, 16, None, []),
    (16, 16, None, 2, 8, 8, []),
    (8, 16, None, 2, 8, None, []),  # bound to its share
    (1, 16, None, 2, 8, None, [BOUND.format(8)]),
    (2, 2, None, 1, 2, None, []),  # mpiexec itself was started by taskset
    (16, 16, 4, 2, 2, 3, [THREADS.format(3, 2, 2, 2)]),  # a container
    (1, 2, None, 4, 1, 1, []),  # more ranks than CPUs
    (1, 4, None, 2, 2, 3, [BOUND.format(2), THREADS.format(3, 2, 2, 2)]),
])  # fmt: skip
def test_what_makes_a_rank_slow(own, parent, quota, local, share, threads, hints, monkeypatch):
    cpus = {0: set(range(own)), os.getppid(): set(range(parent))}
    monkeypatch.setattr(os, "sched_getaffinity", cpus.__getitem__)
    for module in (limits, sys.modules[Ranks.__module__]):
        monkeypatch.setattr(module, "cpu_quota", lambda: quota)
    assert share_of_cpus(local) == share
    assert [*slow(local, threads)] == hints
    this = object.__new__(Ranks)
    this.local = local
    assert this.threads() == min(share, own)


def test_a_signal_acts_behind_one_that_is_ignored():
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with pytest.raises(KeyboardInterrupt), delayed_signals() as came:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGINT)
            assert came == [signal.SIGHUP, signal.SIGINT]
    finally:
        signal.signal(signal.SIGHUP, usual)

"""What a rank meets: CPUs that mpiexec has taken from it, signals, and a half of a prompt that fails."""

import os
import signal
import sys
from functools import partial

import numpy as np
import pytest

from numpy_llama.backend import limits
from numpy_llama.backend.signals import delayed_signals
from numpy_llama.parallel.fused import overlapped
from numpy_llama.parallel.load import slow
from numpy_llama.parallel.ranks import Ranks, share_of_cpus

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


def test_a_signal_acts_at_the_end():
    seen = []
    usual = signal.signal(signal.SIGINT, lambda number, frame: seen.append("signal"))
    try:
        with delayed_signals():
            signal.raise_signal(signal.SIGINT)
            seen.append("changed")
        assert seen == ["changed", "signal"]
        signal.raise_signal(signal.SIGINT)
        assert seen == ["changed", "signal", "signal"]
    finally:
        signal.signal(signal.SIGINT, usual)


def test_a_signal_at_the_beginning_leaves_the_usual_handlers(monkeypatch):
    """It comes when some signals are delayed already."""
    handler_of = signal.getsignal
    usual = handler_of(signal.SIGINT)

    def interrupted(number):
        if number == signal.SIGHUP:
            raise SystemExit
        return handler_of(number)

    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", interrupted)
        with pytest.raises(SystemExit), delayed_signals():
            pass
    assert handler_of(signal.SIGINT) is usual


def test_a_signal_acts_behind_one_that_is_ignored():
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with pytest.raises(KeyboardInterrupt), delayed_signals() as came:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGINT)
            assert came == [signal.SIGHUP, signal.SIGINT]
    finally:
        signal.signal(signal.SIGHUP, usual)


@pytest.mark.parametrize("failed", [0, 1])
def test_a_half_that_fails_ends_the_gathers(failed):
    """The other ranks go on with the same half, and would get the parts of another gather."""
    made = []

    def half(name, n, y):
        for i in range(n):
            yield partial(made.append, f"{name}{i}")
        return y

    y = np.zeros(1)
    halves = half("a", 3, y), half("b", 3, y)
    ends = [half("a", 2, None), halves[1]] if failed == 0 else [halves[0], half("b", 2, None)]
    assert overlapped(ends) == [None]
    assert made == ["a0", "b0", "a1", "b1"] + ["a2"] * failed
    made.clear()
    assert len(overlapped([half("a", 3, y), half("b", 3, y)])) == 2
    assert made == ["a0", "b0", "a1", "b1", "a2", "b2"]

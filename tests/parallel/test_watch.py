"""Which silence of another rank ends a run. The ranks and their messages are written down here."""

import os

import pytest

from numpy_llama.parallel import watch
from numpy_llama.parallel.watch import PATIENCE, Watch

NAMES = ["alice, rank 0", "bob, rank 1", "carol, rank 2"]


class Ended(Exception):
    """The run has ended."""


class Messages:
    """The MPI of a rank. In each beat come the signs of life of some ranks."""

    BYTE, ANY_SOURCE = "bytes", -1

    def __init__(self, rank, beats):
        self.rank, self.beats, self.come, self.sent, self.stuck = rank, iter(beats), [], [], set()
        self.COMM_WORLD = self

    def Dup(self):
        return self

    def Get_rank(self):
        return self.rank

    def Status(self):
        return self

    def Get_source(self):
        return self.source

    def Isend(self, what, rank):
        self.sent.append(rank)
        return Request(self, rank)

    def Iprobe(self, source, status):
        if not self.come:
            self.come = [*next(self.beats), None]
        self.source = self.come.pop(0)
        return self.source is not None

    def Recv(self, place, rank):
        assert rank == self.source


class Request:
    def __init__(self, messages, rank):
        self.messages, self.rank = messages, rank

    def Test(self):
        return self.rank not in self.messages.stuck


def end_of(messages, monkeypatch) -> str:
    """Watch until the run fails: what is said then. Without a fault the messages end."""
    monkeypatch.setattr(watch, "BEAT", 0)
    said = []
    watching = Watch(messages, NAMES, said.append)
    watching.thread.join()
    return f"{type(said[0]).__name__}: {said[0]}"


@pytest.mark.parametrize("rank, others", [(0, [1, 2]), (1, [0, 2]), (2, [0, 1])])
def test_a_rank_without_signs_of_life_ends_the_run(rank, others, monkeypatch):
    """The last others are heard for longer, and rank 0 is the first that ends the run."""
    heard, lost = others
    messages = Messages(rank, [*[others] * 5, *[[heard]] * (PATIENCE + rank)])
    assert end_of(messages, monkeypatch).startswith(f"ParallelError: no sign of life of {NAMES[lost]}, for ")
    assert next(messages.beats, None) is None  # not before
    assert messages.sent == others * (5 + PATIENCE + rank)


def test_a_silence_that_ends_is_none(monkeypatch):
    pattern = [*[[1]] * (PATIENCE - 1), [1, 2, 2]] * 3
    assert end_of(Messages(0, pattern), monkeypatch).startswith("StopIteration")


def test_a_rank_that_takes_no_message_gets_no_more(monkeypatch):
    messages = Messages(0, [[1, 2]] * 9)
    messages.stuck = {2}
    end_of(messages, monkeypatch)
    assert messages.sent.count(1) == 10 and messages.sent.count(2) == 1


def test_a_broken_connection_ends_the_run(monkeypatch):
    messages = Messages(0, [[1, 2]] * 3)
    messages.Recv = lambda place, rank: 1 // 0
    assert end_of(messages, monkeypatch).startswith("ZeroDivisionError")


def test_a_process_without_mpiexec_ends(monkeypatch):
    parents = iter([5, 5, 5, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    assert end_of(Messages(0, [[1, 2]] * 9), monkeypatch) == "ParallelError: mpiexec is gone"


def test_no_signs_of_life_at_the_end(monkeypatch):
    monkeypatch.setattr(watch, "BEAT", 1000)
    messages = Messages(0, [])
    watching = Watch(messages, NAMES, pytest.fail)
    watching.end()
    assert not watching.thread.is_alive() and messages.sent == []

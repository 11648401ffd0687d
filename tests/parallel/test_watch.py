"""Which silence of another rank ends a run. The ranks and their messages are written down here."""

import os
import signal
import sys
import threading

import pytest
from helpers.ranks import alone

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


def end_of(messages, monkeypatch, over=None) -> str:
    """Watch until the run fails: what is said then. Without a fault the messages end."""
    monkeypatch.setattr(watch, "BEAT", 0.001)
    said = []
    watching = Watch(messages, NAMES, said.append)
    watching.counter.join()
    if over is not None:
        over.set()
    watching.sender.join()
    return f"{type(said[0]).__name__}: {said[0]}"


def lost_line(rank, lost) -> str:
    """Rank 0 is the first that ends the run."""
    seconds = f"{(PATIENCE + rank) * watch.BEAT:.0f}"
    return (
        f"ParallelError: no sign of life of {NAMES[lost]}, for {seconds} s: the machine is switched off or "
        "cut off from the network, or the process is stopped or gone"
    )


@pytest.mark.parametrize("rank, others", [(0, [1, 2]), (1, [0, 2]), (2, [0, 1])])
def test_a_rank_without_signs_of_life_ends_the_run(rank, others, monkeypatch):
    heard, lost = others
    messages = Messages(rank, [*[others] * 5, *[[heard]] * 10 * PATIENCE])
    assert end_of(messages, monkeypatch) == lost_line(rank, lost)


def test_a_message_that_is_never_sent_names_its_receiver(monkeypatch):
    """MPI retries for ever if a process has ended. Then no sign of any other rank can be read."""
    messages, over = Messages(0, [[1, 2]] * 9), threading.Event()
    usual = messages.Isend
    messages.Isend = lambda what, rank: over.wait() if rank == 2 else usual(what, rank)
    assert end_of(messages, monkeypatch, over) == lost_line(0, 2)


def test_a_silence_that_ends_is_none(monkeypatch):
    pattern = [[1], [1, 2, 2]] * 3 * PATIENCE
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
    assert end_of(Messages(0, [[1, 2]] * 1000), monkeypatch) == "ParallelError: mpiexec is gone"


def test_a_start_has_an_end_though_nobody_reads_what_is_said():
    program = """
import os, time
from numpy_llama.parallel import watch
watch.START, watch.LONGEST_START = 0.1, 0.2
os.close(2)
with watch.starting(True):
    time.sleep(60)
"""
    done = alone(sys.executable, "-c", program)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"")


def test_no_signs_of_life_at_the_end(monkeypatch):
    monkeypatch.setattr(watch, "BEAT", 1000)
    messages = Messages(0, [])
    watching = Watch(messages, NAMES, pytest.fail)
    watching.end()
    assert not watching.sender.is_alive() and messages.sent == []

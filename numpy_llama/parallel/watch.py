"""Signs of life: a rank notices that another one is stopped, switched off or cut off from the network.

A gather waits for the slowest rank, and that may take minutes. So no length of a wait is a fault by itself.
A thread of each rank sends all others a message every second, whatever the rank computes. The messages go
through MPI, so they need no address and no open port, and they see the network that the gathers use.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from ..errors import ParallelError

BEAT = 1.0  # seconds between two signs of life
PATIENCE = 30  # beats without a sign of another rank, after which the run ends
START, LONGEST_START = 20, 300  # seconds of the start of MPI until a line says so, and until it ends


class Watch:
    """Sends signs of life of this rank. If those of another do not come, it calls `fail` with an error.

    Silence is counted in own beats. So a rank that was stopped itself, and continues, accuses nobody.
    MPI may never return from a message to a process that has ended, so another thread counts.
    """

    def __init__(self, mpi: Any, names: Sequence[str], fail: Callable[[BaseException], NoReturn]):
        """`names` of all ranks, for messages."""
        self.mpi, self.comm, self.names, self.fail = mpi, mpi.COMM_WORLD.Dup(), names, fail
        self.me, self.to = self.comm.Get_rank(), -1  # the receiver of the message that is being sent
        self.silent = {rank: 0 for rank in range(len(names)) if rank != self.me}
        self.parent, self.ended = os.getppid(), threading.Event()
        self.sender, self.counter = (
            threading.Thread(target=self._or_fail, args=[run], daemon=True)
            for run in (self._send, self._count)
        )
        self.sender.start()
        self.counter.start()

    def end(self) -> None:
        """No more signs of life: MPI is about to end."""
        self.ended.set()
        self.sender.join()

    def _or_fail(self, run: Callable[[], None]) -> None:
        try:
            run()
        except Exception as error:
            self.fail(error)

    def _send(self) -> None:
        sign, place, status = b"!", bytearray(1), self.mpi.Status()
        sent: dict[int, Any] = {}
        while not self.ended.wait(BEAT):
            for rank in self.silent:
                self.to = rank
                if rank not in sent or sent[rank].Test():  # a rank that takes none gets no more
                    sent[rank] = self.comm.Isend([sign, self.mpi.BYTE], rank)
            self.to = -1
            while self.comm.Iprobe(self.mpi.ANY_SOURCE, status=status):
                self.comm.Recv([place, self.mpi.BYTE], status.Get_source())
                self.silent[status.Get_source()] = 0

    def _count(self) -> None:
        # All notice at nearly the same time that a rank is lost. The first of them ends the others.
        patience = PATIENCE + self.me
        while self.sender.is_alive():
            time.sleep(BEAT)
            for rank in self.silent:
                self.silent[rank] += 1
            if os.getppid() != self.parent:  # nobody would end this process with the others
                raise ParallelError("mpiexec is gone")
            if lost := [rank for rank, beats in self.silent.items() if beats > patience]:
                one = self.to if self.to in lost else lost[0]
                raise ParallelError(
                    f"no sign of life of {self.names[one]}, for {patience * BEAT:.0f} s: the machine is "
                    "switched off or cut off from the network, or the process is stopped or gone"
                )


@contextmanager
def starting(says: bool) -> Iterator[None]:
    """A block that starts MPI. It waits for all processes, and does not end if one cannot start.

    MPI does not let threads run meanwhile, so a child process writes the line, and ends this one at last.
    """
    if sys.platform == "win32":
        raise ParallelError("Windows has no fork")  # ranks.py has said it before
    usual = None
    if threading.current_thread() is threading.main_thread():
        usual = signal.signal(signal.SIGINT, signal.SIG_DFL)  # the wait has no end, so Python's would not act
    here, there = os.pipe()
    if not (child := os.fork()):
        try:
            os.close(there)
            said = f"not all processes have started after {START} s: can each machine start this program?"
            line = f"numpy-llama: {said}\n" if says else ""
            for seconds, text in ((START, line), (LONGEST_START - START, "")):
                if select.select([here], [], [], seconds)[0]:  # MPI has started, or the process has ended
                    break
                with suppress(OSError):  # mpiexec is gone
                    os.write(2, text.encode())
            else:
                os.kill(os.getppid(), signal.SIGKILL)
        finally:
            os._exit(0)  # whatever happens here, the program goes on in its own process only
    try:
        yield
    finally:
        os.close(there)
        os.close(here)
        os.waitpid(child, 0)
        if usual is not None:
            signal.signal(signal.SIGINT, usual)

"""Signs of life: a rank notices that another one is stopped, switched off or cut off from the network.

A gather waits for the slowest rank, and that may take minutes. So no length of a wait is a fault by itself.
A thread of each rank sends all others a message every second, whatever the rank computes. The messages go
through MPI, so they need no address and no open port, and they see the network that the gathers use.
"""

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ..errors import ParallelError

BEAT = 1.0  # seconds between two signs of life
PATIENCE = 30  # beats without a sign of another rank, after which the run ends


class Watch:
    """Sends signs of life of this rank. If those of another do not come, it calls `fail` with an error.

    Silence is counted in own beats. So a rank that was stopped itself, and continues, accuses nobody.
    """

    def __init__(self, mpi: Any, names: Sequence[str], fail: Callable[[BaseException], NoReturn]):
        """`names` of all ranks, for messages."""
        self.mpi, self.comm, self.names, self.fail = mpi, mpi.COMM_WORLD.Dup(), names, fail
        me = self.comm.Get_rank()
        self.silent = {rank: 0 for rank in range(len(names)) if rank != me}
        # All notice at nearly the same time that a rank is lost. The first of them ends the others.
        self.patience, self.parent, self.ended = PATIENCE + me, os.getppid(), threading.Event()
        self.thread = threading.Thread(target=self._run, name="signs of life", daemon=True)
        self.thread.start()

    def end(self) -> None:
        """No more signs of life: MPI is about to end."""
        self.ended.set()
        self.thread.join()

    def _run(self) -> None:
        try:
            self._watch()
        except Exception as error:  # a connection is broken
            self.fail(error)

    def _watch(self) -> None:
        sign, place, status = b"!", bytearray(1), self.mpi.Status()
        sent: dict[int, Any] = {}
        while not self.ended.wait(BEAT):
            for rank in self.silent:
                self.silent[rank] += 1
                if rank not in sent or sent[rank].Test():  # a rank that takes none gets no more
                    sent[rank] = self.comm.Isend([sign, self.mpi.BYTE], rank)
            while self.comm.Iprobe(self.mpi.ANY_SOURCE, status=status):
                self.comm.Recv([place, self.mpi.BYTE], status.Get_source())
                self.silent[status.Get_source()] = 0
            if os.getppid() != self.parent:  # nobody would end this process with the others
                raise ParallelError("mpiexec is gone")
            for rank, beats in self.silent.items():
                if beats >= self.patience:
                    raise ParallelError(
                        f"no sign of life of {self.names[rank]}, for {beats * BEAT:.0f} s: the machine is "
                        "switched off or cut off from the network, or the process is stopped"
                    )

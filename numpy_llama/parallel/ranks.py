"""The processes that mpiexec has started, and their messages. Only they import MPI.

Rank 0 sends commands. All ranks run a command together, and exchange activations in it by collective calls. A
rank that leaves a command early would leave all others waiting, so it ends the whole run.
"""

import ctypes
import faulthandler
import math
import os
import pickle
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import accumulate, count, pairwise
from typing import Any, NoReturn, TypeVar

import numpy as np

from .. import system
from ..backend.limits import affinity, available_cpus, cpu_quota
from ..backend.signals import delayed_signals
from ..config import Array
from ..errors import NumpyLlamaError, ParallelError, UnsupportedError, printable
from .watch import Watch, starting

Result = TypeVar("Result")

COMMAND, ACTIVATION = 1, 2  # the tags of messages
# Bytes of a message that libfabric sends over TCP at once, in Intel's MPI and in MPICH with `ofi`. Before a
# larger one it asks the receiver, which takes one more latency. The default is 128.
INJECT = "16384"
# A rank without a command stays awake for a moment, because the next token follows soon. Then it naps, longer
# each time. Napping takes no CPU, and a command waits for a nap at most.
AWAKE, SHORTEST_NAP, LONGEST_NAP = 0.01, 0.0005, 0.02
GATHER_NAP = 0.00005  # at 10 Gbit/s 60 KB arrive meanwhile, which the system keeps
LAST_NAP, LONGEST_WAIT = 0.5, 2.0
LONGEST_END = 600  # seconds that rank 0 has for the end of its program


def launched() -> int:
    """The number of processes that mpiexec says it has started; 1 without it."""
    names = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
    return max([int(n) for name in names if (n := os.environ.get(name, "")).isdecimal()], default=1)


def is_first() -> bool:
    """Whether mpiexec says that this process is its first."""
    names = ("PMI_RANK", "OMPI_COMM_WORLD_RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)


def share_of_cpus(local: int) -> int:
    """The CPUs for each of `local` ranks of this machine.

    A container or taskset limits mpiexec too, which is the parent. An MPI that binds ranks limits only them.
    """
    cpus, quota = affinity(os.getppid()), cpu_quota()
    return max(1, (cpus if quota is None else min(cpus, int(quota))) // local)


def _of_another_mpi(how: str, library: str) -> ParallelError:
    return ParallelError(
        f"mpiexec has started {launched()} processes, and {how}: it belongs to another MPI than mpi4py's, "
        f"{library}; start with the mpiexec of that one"
    )


class Stopped(Exception):
    """A signal has come to rank 0, and all ranks leave the pass."""


class Ranks:
    """This process as one of several. A rank is a process and its number."""

    def __init__(self) -> None:
        """ParallelError if MPI is missing, or if it is not the MPI of this mpiexec, and on Windows."""
        if not hasattr(os, "fork"):
            raise ParallelError(
                f"mpiexec has started {launched()} processes, but a model on several machines needs Linux or "
                "macOS: leave mpiexec out"
            )
        os.environ.setdefault("FI_TCP_MAX_INJECT", INJECT)
        try:
            import mpi4py

            mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
            from mpi4py import MPI

            library = printable(MPI.Get_library_version().split("\n")[0].strip(" \t\0"))
            if "OMPI_COMM_WORLD_SIZE" in os.environ and library.startswith(("MPICH", "Intel")):
                raise _of_another_mpi("it is that of Open MPI", library)  # MPICH would end the program
            if not MPI.Is_initialized():
                with warnings.catch_warnings(), starting(is_first()):
                    warnings.simplefilter("ignore")  # of another mpiexec: an error says it below
                    MPI.Init_thread(MPI.THREAD_MULTIPLE)  # the watch sends while a gather waits
        except (ImportError, RuntimeError) as error:
            wanted = 'pip install "numpy_llama[mpi]", on every machine'
            raise ParallelError(
                f"mpiexec has started {launched()} processes without MPI ({error}): {wanted}"
            ) from None
        self.mpi, self.comm = MPI, MPI.COMM_WORLD
        self.rank, self.size = self.comm.Get_rank(), self.comm.Get_size()
        if self.size != launched():
            raise _of_another_mpi(f"each sees {self.size}", library)
        if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
            raise ParallelError(
                "MPI lets only one thread send, MPI_THREAD_MULTIPLE is needed: take another MPI, or do not "
                "start MPI with another level before nl.load"
            )
        self.host = MPI.Get_processor_name()
        self.local = self.comm.Split_type(MPI.COMM_TYPE_SHARED).Get_size()  # ranks on this machine
        self.forgotten: deque[tuple[Any, ...]] = deque()  # commands: rank 0 has some object no longer
        self.bandwidths: list[float] = []  # of the memory of all ranks, once measured
        self._numbers = count(1)
        self._lock, self._last_words = threading.RLock(), threading.RLock()
        self._owner: int | None = None  # the thread that runs a command
        self._signals: Sequence[int] = ()  # that came to rank 0 since the command began
        self.watch = Watch(MPI, self.exchange(self.where), self.fail)

    @property
    def where(self) -> str:
        """This rank, for messages."""
        return f"{self.host}, rank {self.rank}"

    def threads(self) -> int:
        """The threads of this rank by default: its share of the machine's CPUs, or fewer if it is bound."""
        return min(share_of_cpus(self.local), available_cpus())

    def new_number(self) -> int:
        """A number for an object that every rank has."""
        return next(self._numbers)

    def inside(self) -> bool:
        """Whether the calling thread runs a command, together with all other ranks."""
        return self._owner == threading.get_ident()

    @contextmanager
    def together(
        self, name: str, *arguments: Any, passing: type[Exception] | tuple[()] = ()
    ) -> Iterator[None]:
        """On rank 0: the others run the command `name` while this block runs here.

        An error in the block ends the run, because the others wait in it. A signal acts after the block;
        `stop_if_asked` leaves it early.
        `passing` is an error that all ranks raise; loading has it, and there a signal ends the run at once.
        """
        signals: AbstractContextManager[list[int]] = nullcontext([]) if passing else delayed_signals()
        command = pickle.dumps((name, *arguments))  # an error here is one of the caller
        with self._lock, signals as self._signals:
            try:
                while self.forgotten:
                    self._send(pickle.dumps(self.forgotten.popleft()))
                self._send(command)
                self._owner = threading.get_ident()
                yield
            except Stopped:
                pass
            except passing:
                raise
            except BaseException as error:
                self.fail(error)
            finally:
                self._owner = None

    def stop_if_asked(self) -> None:
        """On every rank: Stopped if a signal has come to rank 0."""
        came = bytearray([len(self._signals) > 0])
        self.comm.Bcast([came, self.mpi.BYTE])
        if came[0]:
            raise Stopped

    def _send(self, command: bytes) -> None:
        for rank in range(1, self.size):
            self.comm.Send([command, self.mpi.BYTE], rank, COMMAND)

    def end(self, code: int | None) -> None:
        """On rank 0, when it ends with that status: the others end too. None: the status is not known.

        mpiexec kills the others when a process ends with another status than 0, and its own may be any then.
        """
        if code:
            self._abort(code)
        self._lock.acquire()  # a thread may run a command, and none begins another
        self.watch.end()
        self._send(pickle.dumps(("end", code)))

    def commands(self) -> Iterator[tuple[Any, ...]]:
        """On the other ranks: the commands of rank 0."""
        self._owner = threading.get_ident()
        status = self.mpi.Status()
        while True:
            awake_until, nap = time.monotonic() + AWAKE, SHORTEST_NAP
            while not self.comm.Iprobe(0, COMMAND, status):
                if time.monotonic() < awake_until:
                    system.yield_cpu()
                else:
                    time.sleep(nap)
                    nap = min(2 * nap, LONGEST_NAP)
            data = bytearray(status.Get_count(self.mpi.BYTE))
            self.comm.Recv([data, self.mpi.BYTE], 0, COMMAND)
            yield pickle.loads(data)

    def gather(self, part: Array, widths: Sequence[int]) -> Array:
        """The parts of all ranks side by side: (..., widths[rank]) -> (..., sum(widths)), on every rank."""
        self.check_inside()
        if part.ndim < 3 or part.shape[:2] != (1, 1):  # a token by itself is soon done
            self.stop_if_asked()
        return self._gather(part, widths, self.comm.Allgatherv)

    def gather_on_first(self, part: Array, widths: Sequence[int]) -> Array:
        """`gather`, on rank 0 only; on the others the result has no meaning."""
        return self._gather(part, widths, self.comm.Gatherv)

    def gather_in_place(self, memory: Array, nbytes: Sequence[int]) -> None:
        """The bytes of all ranks, one behind the other: each has its own in place, and gets the others."""
        self.comm.Allgatherv(self.mpi.IN_PLACE, [memory, nbytes, self.mpi.BYTE])

    def gather_at_once(self, memory: Array, nbytes: Sequence[int]) -> None:
        """`gather_in_place` with one latency: each rank sends to all. MPI's own has up to log2(ranks)."""
        self.mpi.Request.Waitall(self._exchange(memory, nbytes))

    def gather_napping(self, memory: Array, nbytes: Sequence[int]) -> None:
        """`gather_at_once`, by a thread that leaves its CPU to others while it waits."""
        requests = self._exchange(memory, nbytes)
        while not self.mpi.Request.Testall(requests):
            time.sleep(GATHER_NAP)

    def _exchange(self, memory: Array, nbytes: Sequence[int]) -> list[Any]:
        ends = list(accumulate(nbytes, initial=0))
        parts = [[memory[begin:end], self.mpi.BYTE] for begin, end in pairwise(ends)]
        others = [rank for rank in range(self.size) if rank != self.rank]
        requests = [self.comm.Irecv(parts[rank], rank, ACTIVATION) for rank in others]
        return requests + [self.comm.Isend(parts[self.rank], rank, ACTIVATION) for rank in others]

    def check_inside(self) -> None:
        """UnsupportedError if the other ranks do not run the same command."""
        if not self.inside():
            raise UnsupportedError(
                "a part of a model on several ranks cannot be called by itself; call the model: "
                "model(tokens) or model.hidden(tokens)"
            )

    def _gather(self, part: Array, widths: Sequence[int], collect: Callable[..., None]) -> Array:
        self.check_inside()
        outer, total = part.shape[:-1], sum(widths)
        rows = math.prod(outer)
        part, gathered = np.ascontiguousarray(part), np.empty(rows * total, part.dtype)
        counts = [rows * width * part.itemsize for width in widths]
        collect([part, self.mpi.BYTE], [gathered, counts, self.mpi.BYTE])
        if rows == 1:
            return gathered.reshape(*outer, total)
        side_by_side, at = np.empty((rows, total), part.dtype), 0
        for width in widths:  # MPI has put one rank's rows behind the other's
            block = gathered[rows * at : rows * (at + width)]
            side_by_side[:, at : at + width] = block.reshape(rows, width)
            at += width
        return side_by_side.reshape(*outer, total)

    def parts(self, whole: Array, cuts: Sequence[slice], senders: int) -> Array:
        """This rank's part of an array of each of the first ranks: (n,) -> (senders, its part of n)."""
        nbytes = [(part.stop - part.start) * whole.itemsize for part in cuts]
        found = np.empty((senders, nbytes[self.rank] // whole.itemsize), whole.dtype)
        sent = nbytes if self.rank < senders else [0] * self.size
        received = [nbytes[self.rank] if rank < senders else 0 for rank in range(self.size)]
        self.comm.Alltoallv([whole, sent, self.mpi.BYTE], [found, received, self.mpi.BYTE])
        return found

    def broadcast(self, x: Array) -> None:
        """Put rank 0's numbers into the array of every rank."""
        self.comm.Bcast(x, 0)

    def exchange(self, value: Result) -> list[Result]:
        """The values of all ranks, on every rank."""
        return self.comm.allgather(value)

    def everywhere(self, step: Callable[[], Result]) -> Result:
        """Run a step on every rank: its result on this one. An error of one rank is raised on all."""
        error: tuple[type[NumpyLlamaError], str] | None = None
        try:
            result = step()
        except NumpyLlamaError as found:
            error = type(found), str(found)
        except Exception as found:
            error = ParallelError, _described(found)
        for rank, (where, failed) in enumerate(self.exchange((self.where, error))):
            if failed is not None:
                kind, text = failed
                raise kind(f"{where}: {text}" if rank else text)
        return result

    def fail(self, error: BaseException) -> NoReturn:
        """End the run on all ranks. The error is one line on stderr; a signal needs none."""
        self._last_words.acquire()  # of the first thread that fails
        code = 1
        if isinstance(error, KeyboardInterrupt):
            code = 130
        elif isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 1
        else:
            text = str(error) if isinstance(error, NumpyLlamaError) else _described(error)
            line = f"numpy-llama: {self.where} of {self.size}: {printable(text)}\n"
            with suppress(OSError):  # mpiexec is gone
                os.write(2, line.encode(errors="replace"))
        self._abort(code)

    def _abort(self, code: int) -> NoReturn:
        """End all ranks at once."""
        flushing = threading.Thread(target=flush, daemon=True)  # it may wait for a reader for ever
        flushing.start()
        flushing.join(LONGEST_WAIT)
        for fd in (1, 2):
            await_reader(fd)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # MPI would add a line of its own
        exit_within(LONGEST_WAIT)
        self.comm.Abort(code)
        os._exit(code)

    def leave(self, code: int | None) -> NoReturn:
        """End this process, and do nothing that the program would do after it. `code` is that of `end`.

        It is the exit of C, because MPI takes its leave of mpiexec there. os._exit would leave that out, and
        mpiexec would kill the processes that are left.
        """
        self.watch.end()
        exit_within(LONGEST_END)
        self.mpi.Finalize()  # it waits for rank 0
        if code is None:  # mpiexec takes the status of the first process that ends: rank 0
            time.sleep(LAST_NAP)
        ctypes.CDLL(None).exit(0)
        raise AssertionError("exit does not return")


def exit_within(seconds: float) -> None:
    """End this process with the status 1, if it still runs then, even if MPI holds Python's lock."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()


def await_reader(fd: int) -> None:
    """Wait until mpiexec has read what was written to this pipe. When a run is aborted, it drops the rest."""
    until = time.monotonic() + LONGEST_WAIT
    with suppress(OSError):  # no pipe
        while time.monotonic() < until and system.unread(fd):
            time.sleep(SHORTEST_NAP)


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__

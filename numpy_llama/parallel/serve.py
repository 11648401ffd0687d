"""All ranks but 0: they run the commands of rank 0 until it ends."""

import atexit
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import numpy as np

from ..config import Array
from ..errors import NumpyLlamaError, ParallelError
from ..generation.branch import branch
from ..model import Function
from .cut import Plan
from .load import LoadOrder, load_part
from .model import SharedCache
from .ranks import Ranks, Stopped, flush, is_first, launched
from .whole import Part, as_one

_ranks: Ranks | None = None
_status: int | None = None  # of this process at its end, if it is known


def ranks() -> Ranks | None:
    """All processes of this run, on rank 0; None if the process is alone.

    The other ranks serve, and end here. ParallelError if mpiexec has started this process without its MPI.
    """
    global _ranks
    if _ranks is None and launched() > 1:
        try:
            _ranks = Ranks()
        except ParallelError as error:
            if is_first():
                raise
            time.sleep(1)  # if the first process has the same error, mpiexec ends this one meanwhile
            os.write(2, f"numpy-llama: {socket.gethostname()}: {error}\n".encode())
            os._exit(1)
        if _ranks.rank:
            serve(_ranks)
        sys.excepthook = _failing(sys.excepthook)
        atexit.register(_end, _ranks, os.getpid())
    return _ranks


def ends_with(status: object) -> None:
    """Rank 0 will end with that exit status, and mpiexec too."""
    global _status
    _status = status if isinstance(status, int) else int(status is not None)


def _failing(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook for an error that nothing catches: it ends the process with the status 1."""

    def failed(*error: Any) -> None:
        ends_with(1)
        hook(*error)

    return failed


def _end(ranks: Ranks, pid: int) -> None:
    if os.getpid() == pid:  # not a child process of rank 0
        ranks.end(_status)


def serve(ranks: Ranks) -> NoReturn:
    """Run rank 0's commands, and end with it. A Ctrl-C reaches every process: rank 0 alone acts on it."""
    commands = Commands(ranks)
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with np.errstate(over="ignore", invalid="ignore"):  # rank 0 checks the results
            for name, *arguments in ranks.commands():
                getattr(commands, name)(*arguments)
    except BaseException as error:
        ranks.fail(error)
    os._exit(0)


class Commands:
    """What rank 0 may ask for. It names models and caches by their numbers."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.models: dict[int, Part] = {}
        self.caches: dict[int, SharedCache] = {}

    def load(self, number: int, order: LoadOrder) -> None:
        with suppress(NumpyLlamaError):  # it is raised on rank 0 too
            model, _ = load_part(self.ranks, order)
            self.models[number] = Part(model, Plan.of(order.args, order.shares), self.ranks)

    def call(self, function: Function, *arguments: Any) -> None:
        """A function of a room above, which all ranks run together."""
        function(self.ranks, *arguments)

    def new_cache(self, model: int, number: int, *about: Any) -> None:
        self.caches[number] = self.models[model].new_cache(*about).numbered(number)

    def copy_cache(self, old: int, number: int) -> None:
        self.caches[number] = self.caches[old].twin().numbered(number)

    def branch_cache(self, old: int, number: int) -> None:
        self.caches[number] = branch(self.caches[old]).numbered(number)

    def update(self, cache: int, layer: int, start_pos: int, xk: Array, xv: Array) -> None:
        with suppress(NumpyLlamaError):  # it is raised on rank 0 too
            self.caches[cache].update_all(layer, start_pos, xk, xv)

    def hidden(self, model: int, tokens: Array, start_pos: Any, caches: list[int]) -> None:
        run: Function = self.models[model].model.hidden  # with the arguments of a batch too
        with suppress(Stopped):
            run(tokens, start_pos, as_one([self.caches[number] for number in caches], start_pos))

    def linear(self, model: int, name: str, x: Array) -> None:
        self.models[model].linear(name, x)

    def block(
        self, model: int, i: int, layer: int, x: Array, start_pos: Any, freqs_cis: Array, caches: list[int]
    ) -> None:
        found = [self.caches[number] for number in caches]
        with suppress(Stopped):
            self.models[model].block(i, layer, x, start_pos, freqs_cis, found)

    def end(self, status: int | None) -> None:
        flush()
        self.ranks.leave(status)

    def forget(self, number: int) -> None:
        self.models.pop(number, None)
        self.caches.pop(number, None)

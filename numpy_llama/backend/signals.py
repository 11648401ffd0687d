"""Signals such as Ctrl-C, which act between two lines of Python: at some places they must wait."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .. import system

SIGNALS = (signal.SIGINT, *system.ENDING)


@contextmanager
def delayed_signals() -> Iterator[list[int]]:
    """Signals that come in this block act at its end. Only the main thread receives signals."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    handlers: dict[int, Any] = {}
    try:
        for number in SIGNALS:
            if (handler := signal.getsignal(number)) is not None:  # None: not one of Python
                handlers[number] = handler
                signal.signal(number, lambda number, frame: came.append(number))
        yield came
    finally:
        for one, handler in handlers.items():
            signal.signal(one, handler)
        for one in came:  # the first may be one that is ignored
            signal.raise_signal(one)

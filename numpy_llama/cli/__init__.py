"""The command line: one file a command. Text goes to stdout, everything else to stderr.

Exit codes: 0 done, 1 failed, 2 wrong usage or unreadable input text, 3 `verify` found a fault,
130 Ctrl-C.
"""

import argparse
import errno
import io
import logging
import os
import signal
import sys
from typing import NoReturn

from .. import __version__, parallel, system
from ..errors import NumpyLlamaError, ParameterError, TextError, printable
from . import (
    attention,
    bench,
    chat,
    common,
    convert,
    doctor,
    eval,
    finetune,
    generate,
    info,
    lens,
    merge,
    ops,
    perplexity,
    pull,
    tokenize,
    trace,
    train,
    verify,
)

VERBS = (
    *(generate, chat, info, tokenize, convert, merge, pull, bench, perplexity, eval, verify, doctor),
    *(train, finetune, ops, trace, attention, lens),
)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    main = OneLineParser(prog="numpy-llama", description="LLaMA in readable NumPy, at the speed of C.")
    main.add_argument("--version", action="version", version=f"numpy-llama {__version__}")
    verbs = main.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for verb in VERBS:
        name = verb.__name__.rpartition(".")[2]
        summary = (verb.__doc__ or "").strip()
        one = verbs.add_parser(name, help=summary.splitlines()[0], description=summary)
        verb.add_arguments(one)
        one.set_defaults(run=verb.run)
    return main


def main(argv: list[str] | None = None) -> int:
    """Run one command; -> its exit code. No mistake of a user ends in a traceback."""
    try:
        code = _run(argv)
    except SystemExit as end:  # wrong usage, or a signal
        parallel.ends_with(end.code)
        raise
    parallel.ends_with(code)
    return code


def _run(argv: list[str] | None) -> int:
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115  a parent may close it
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows question marks
        sys.stdout = common.Terminal(sys.stdout) if sys.stdout.isatty() else system.piped(sys.stdout)
    sys.stderr = sys.stderr if sys.stderr.isatty() else system.piped(sys.stderr)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if a parent ignores it
        common.await_ctrl_c()
    logging.getLogger("numpy_llama").addHandler(common.REMARKS)
    for number in system.ENDING:  # clean up and end, as for Ctrl-C
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        parallel.ranks()  # under mpiexec all processes but rank 0 do not return
        args = parser().parse_args(argv)
        code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _quietly(130)
    except BrokenPipeError:  # the reader of the output has closed it
        return _quietly(0)
    except (ParameterError, TextError) as error:
        return _fail(error, 2)
    except NumpyLlamaError as error:
        return _fail(error, 1)
    except MemoryError as error:
        return _fail(f"out of memory: {error}", 1)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return _quietly(_fail("the disk is full: the output is not complete", 1))
        return _fail(error, 1)


def _fail(problem: object, code: int) -> int:
    print(f"numpy-llama: {printable(str(problem))}", file=sys.stderr)
    return code


def _quietly(code: int) -> int:
    """End without the message that Python prints when the last flush of stdout fails."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code

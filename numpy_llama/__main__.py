"""`numpy-llama` and `python -m numpy_llama`: the command line, from its first import on."""

import os
import signal
import sys


def main() -> int:
    """Until all is imported Ctrl-C ends the program where it stands: no import can swallow or report it."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:  # not where we were started to ignore it
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    from . import cli

    signal.signal(signal.SIGINT, usual)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())

"""`numpy-llama` and `python -m numpy_llama`: the start of the command line."""

import os
import signal
import sys


def main() -> int:
    """During the imports Ctrl-C ends the program at once, so that no import can catch or report it."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:  # another handler, or none, was the caller's choice
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    from . import cli

    signal.signal(signal.SIGINT, usual)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())

"""`numpy-llama` and `python -m numpy_llama`: the start of the command line."""

import os
import signal
import sys


def main() -> int:
    """Run the command line. During the imports Ctrl-C ends the program at once: no import can catch it."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:  # not if a parent process ignores it
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    from . import cli

    signal.signal(signal.SIGINT, usual)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())

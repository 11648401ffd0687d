"""A terminal of its own for the program, as a person has one."""

import os
import pty
import select
import subprocess
import time
from pathlib import Path

from .command_line import PROGRAM


class Terminal:
    """The program on a terminal of its own, typed to and read from."""

    def __init__(self, *arguments: str, state: Path = Path("/dev/null"), term: str = "dumb"):
        """`state` is the folder of the history. A dumb terminal is sent no sequences for pasted text."""
        self.master, slave = pty.openpty()
        environment = os.environ | {"XDG_STATE_HOME": str(state), "TERM": term}
        streams = {"stdin": slave, "stdout": slave, "stderr": slave}
        self.process = subprocess.Popen(
            [PROGRAM, *arguments], **streams, start_new_session=True, env=environment
        )
        os.close(slave)
        self.seen = b""

    def wait_for(self, text: bytes, after: int = 0, seconds: float = 60) -> int:
        """Read until `text` is seen behind `after`; -> where it ends."""
        deadline = time.monotonic() + seconds
        while (at := self.seen.find(text, after)) < 0:
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"waited for {text!r}, saw {self.seen!r}"
            try:
                data = os.read(self.master, 4096)
            except OSError:  # Linux's way to say that the other side is closed
                data = b""
            assert data, f"waited for {text!r}, it ended with {self.seen!r}"
            self.seen += data
        return at + len(text)

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def end(self) -> int:
        return self.process.wait(timeout=20)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

"""Programs on several ranks: mpiexec of the MPI that is installed beside this Python."""

import os
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

MPIEXEC = str(Path(sys.executable).with_name("mpiexec"))
# There are more ranks than CPUs here, so a rank that waits gives its CPU to others.
ALONE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
TOGETHER = ALONE | {"MPIR_CVAR_ENABLE_HEAVY_YIELD": "1", "HYDRA_LAUNCHER": "fork"}
MARK = "NUMPY_LLAMA_TEST_RUN"  # a variable by which the processes of a run are found
TIMEOUT = 300  # seconds, for programs of a few


def alone(*command: str, **options) -> subprocess.CompletedProcess:
    """Run a program in one process."""
    return _run(command, ALONE, options)


def on_ranks(n: int, *command: str, **options) -> subprocess.CompletedProcess:
    """Run a program on n ranks."""
    return _run((MPIEXEC, "-n", str(n), *command), TOGETHER, options)


def on_each(*parts: tuple[str, ...], **options) -> subprocess.CompletedProcess:
    """Run a program on ranks of which each has a command, and options of mpiexec before it."""
    command = [word for part in parts for word in (":", "-n", "1", *part)]
    return _run((MPIEXEC, *command[1:]), TOGETHER, options)


def _run(command, environment, options) -> subprocess.CompletedProcess:
    """Run it to its end, which none of its processes outlives."""
    mark = f"{MARK}={uuid.uuid4()}"
    environment = os.environ | environment | options.pop("env", {}) | dict([mark.split("=")])
    options = options if "input" in options else {"stdin": subprocess.DEVNULL} | options
    done = subprocess.run(command, capture_output=True, timeout=TIMEOUT, env=environment, **options)
    until = time.monotonic() + TIMEOUT
    while left := processes(mark):
        assert time.monotonic() < until, f"processes {left} stay behind {command}"
        time.sleep(0.01)
    return done


def processes(mark: str) -> list[str]:
    """The processes that have this variable in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or is not ours
            if mark.encode() in path.read_bytes():
                found.append(path.parent.name)
    return found

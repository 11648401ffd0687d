"""One variant in a child process: with limits, watched by an audit hook, never trusted to end, and judged.

    python [-O] tests/robustness/hostile/attempt.py FOLDER [ID ...]       our readers: one JSON line a variant
    python tests/robustness/hostile/attempt.py FOLDER --reference [ID ...] the reference readers

The interpreter imports everything once and then forks a child for each variant.
"""

import contextlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[2])  # not this folder: its files are called as packages are

from robustness.hostile import (  # noqa: E402
    command_line,
    configs,
    files,
    gguf,
    models,
    quantized,
    quantized_floats,
    safetensors,
    templates,
    tokenizers,
    torch,
)
from robustness.hostile.case import CASES, CONTROLS, Case, MiB, Variant  # noqa: E402

MODULES = (
    *(models, gguf, safetensors, torch, tokenizers, configs, templates, command_line, files),
    *(quantized, quantized_floats),
)

ADDRESS_SPACE = 2 << 30
MAX_MESSAGE = 400  # characters, the name of the folder not counted

# What no file may make a loader do. `open` is looked at for itself: only reading is allowed.
FORBIDDEN = (
    "import", "exec", "compile", "marshal.", "pickle.", "code.__new__", "function.__new__", "ctypes.",
    "socket.", "subprocess.", "pty.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
    "os.kill", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "os.chown", "os.utime", "os.putenv", "os.setxattr", "shutil.", "tempfile.", "urllib.",
)  # fmt: skip
COMPILING = ("compile", "exec", "code.__new__")  # the last in the traceback of a template that fails


def perform(variant: Variant) -> dict:
    """In the child: run it under limits; -> what came of it."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("error")
    events: list[str] = []
    watching = variant.watched

    def watch(event: str, arguments: tuple) -> None:
        if not watching:
            return
        if event == "open" and isinstance(arguments[2], int):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                events.append(f"open for writing {arguments[0]!r}")
        elif event.startswith(FORBIDDEN) and not (variant.compiles and event in COMPILING):
            events.append(f"{event} {arguments[:1]!r:.100}")

    sys.addaudithook(watch)
    before, began = memory("VmRSS"), time.process_time()
    try:
        result, error = variant.run(), None
    except BaseException as caught:  # that it may be anything is what this is about
        result, error = None, caught
    seconds, watching = time.process_time() - began, False
    peak = memory("VmHWM") - before
    kinds = [kind.__name__ for kind in type(error).__mro__]
    got = (result if isinstance(result, str) else "accepted") if error is None else kinds[0]
    return {
        "got": got,
        "kinds": [got] if error is None else kinds,
        "message": "" if error is None else str(error),
        "seconds": seconds,
        "peak": peak,
        "events": events,
    }


def memory(line: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(row.split()[1]) << 10 for row in status if row.startswith(line))


def attempt(function, argument, patience: float) -> dict:
    """function(argument) -> dict, in a child process; what becomes of the child is in the dict."""
    reading, writing = os.pipe()
    began = time.monotonic()
    with tempfile.TemporaryFile() as printed:
        pid = os.fork()
        if not pid:
            try:
                os.setpgid(0, 0)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(printed.fileno(), 1)
                os.dup2(printed.fileno(), 2)
                answer = json.dumps(function(argument)).encode()
                while answer:
                    answer = answer[os.write(writing, answer) :]
            finally:
                os._exit(0)
        os.close(writing)
        answer, hung = b"", False
        with open(reading, "rb", buffering=0) as pipe:
            while True:
                left = began + patience - time.monotonic()
                if hung := not select.select([pipe], [], [], max(0, left))[0]:
                    os.kill(pid, signal.SIGKILL)
                    break
                if not (data := pipe.read(1 << 16)):
                    break
                answer += data
        status = os.waitpid(pid, 0)[1]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # and what it may have started
        printed.seek(0)
        output = printed.read(2000).decode(errors="replace")
    elapsed = time.monotonic() - began
    if hung or os.WIFSIGNALED(status) or not answer:
        got = "hung" if hung else f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "died"
        record = {"got": got, "kinds": [got], "message": "", "seconds": elapsed, "peak": 0, "events": []}
    else:
        record = json.loads(answer)
    return record | {"output": output, "elapsed": elapsed}


def faults(record: dict, variant: Variant, folder: str) -> list[str]:
    """What is wrong with the way in which a variant was answered."""
    wrong, got, message = [], record["got"], record["message"]
    if not {*record["kinds"]} & {*variant.expected}:
        wrong.append(f"expected {' or '.join(variant.expected)}, got {got}: {message[:300]}")
    if "NumpyLlamaError" in record["kinds"]:
        for word in (variant.names, *variant.says):
            if word.lower() not in message.lower():
                wrong.append(f"the message does not say {word!r}: {message}")
        if len(message.replace(folder, "")) > MAX_MESSAGE:
            wrong.append(f"the message has {len(message)} characters: {message}")
        if not (message.isascii() and message.isprintable()):
            wrong.append(f"the message is not printable ASCII: {message!r}")
    if record["seconds"] > variant.seconds:
        wrong.append(f"{record['seconds']:.2f} s, at most {variant.seconds} are allowed")
    if record["peak"] > variant.room:
        wrong.append(f"{record['peak'] / MiB:.0f} MiB, at most {variant.room / MiB:.0f} are allowed")
    wrong += [f"while loading: {event}" for event in record["events"]]
    if record["output"]:
        wrong.append(f"it printed {record['output'][:300]!r}")
    return wrong


def variants(case: Case, folder: Path) -> list[Variant]:
    folder.mkdir()
    found = list(case.build(folder))
    names = [variant.name for variant in found]
    assert found and len({*names}) == len(names), f"{case.id}: {names}"
    return found


def main() -> None:
    root, reference, wanted = Path(sys.argv[1]), "--reference" in sys.argv, set(sys.argv[2:])
    if reference:
        from robustness.hostile import readers

        wanted.remove("--reference")
    else:
        models.warm_up(root)
    order = sorted(CASES, key=lambda id: ("GSPTCJUFQB".index(id[0]), id))
    for id in [*CONTROLS, *order]:
        if wanted and id not in wanted:
            continue
        case, folder = (CONTROLS | CASES)[id], root / id
        for variant in variants(case, folder):
            if not reference:
                record = attempt(perform, variant, variant.patience)
                record["expected"] = " or ".join(variant.expected)
                record["problems"] = faults(record, variant, str(folder))
            elif variant.reference:
                record = attempt(readers.opinion, variant.reference, readers.SECONDS)
                record["reader"] = variant.reference[0]
            else:
                continue
            print(json.dumps({"id": id, "variant": variant.name} | record), flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

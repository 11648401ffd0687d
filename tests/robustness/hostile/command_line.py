"""U: the command line, as a program of its own: what it is given, and what is done to it while it runs."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from helpers.gguf_writer import padding, tensor_info

from .case import Variant, case
from .gguf import file_bytes, metadata
from .models import DH, GGUF_NAMES, V, sentencepieces
from .tokenizers import check

FLAGS = [] if __debug__ else ["-O"]
PYTHON = [sys.executable, *FLAGS]
PROGRAM = [*PYTHON, "-m", "numpy_llama"]
PROMPT_SECONDS = 0.25  # how long Ctrl-C may take
TRIES = 3  # on a busy machine the kernel may keep us waiting; three times in a row it does not

# A model that says "a" for ever: nothing is ever added to the embedding, which is 1 everywhere.


def talker(path: Path, context: int, dim: int = DH, n_layers: int = 1, type: tuple = (0, 1, 4)) -> Path:
    """`type`: number, block and bytes a block of the matrices, all of them zero and none of them written."""
    hidden, (code, block, block_bytes) = 4 * dim, type
    shapes = {"token_embd": (V, dim), "output_norm": (dim,), "output": (V, dim)}
    for name in GGUF_NAMES.values():
        for i in range(n_layers if name not in shapes else 0):
            out, n = {"ffn_gate": (hidden, dim), "ffn_up": (hidden, dim), "ffn_down": (dim, hidden)}.get(
                name, (dim, dim)
            )
            shapes[f"blk.{i}.{name}"] = (dim,) if name.endswith("norm") else (out, n)
    records, start, filled = [], 0, {}
    for name, shape in shapes.items():
        stored = code if name.startswith("blk.") and len(shape) == 2 else 0
        nbytes = int(np.prod(shape)) * 4 if not stored else int(np.prod(shape)) // block * block_bytes
        records.append(tensor_info(f"{name}.weight", shape[::-1], stored, start))
        if not name.startswith("blk."):
            filled[name] = start
        start += nbytes + len(padding(nbytes, 32))
    values = metadata(
        llama__embedding_length=dim,
        llama__feed_forward_length=hidden,
        llama__attention__head_count=dim // DH,
        llama__attention__head_count_kv=dim // DH,
        llama__block_count=n_layers,
        llama__context_length=context,
    )
    head = file_bytes(values, records)
    output = np.zeros((V, dim), np.float32)
    output[[text for text, _, _ in sentencepieces()].index("a")] = 1
    ones = np.ones((V, dim), np.float32)
    with path.open("wb") as file:
        file.write(head)
        for name, array in [("token_embd", ones), ("output_norm", ones[0]), ("output", output)]:
            file.seek(len(head) + filled[name])
            file.write(array.tobytes())
        file.truncate(len(head) + start)
    return path


def slow_talker(path: Path) -> Path:
    """Its prompt of 8,000 tokens takes seconds."""
    return talker(path, 8192, dim=256, n_layers=6)


# ---------------------------------------------------------------- running it


def ended(process: subprocess.Popen, code: int, out: bytes, err: bytes, says: tuple[str, ...]) -> str:
    """Its end was one of ours: a code, at most one line on stderr, never a traceback; -> "exit N"."""
    for text in (b"Traceback", b"Exception ignored"):
        check(text not in out + err, err.decode(errors="replace")[-250:])
    got = process.returncode
    check(got == code, f"exit code {got}, wanted {code}: {err.decode(errors='replace')[-500:]}")
    check(err.count(b"\n") <= 1 and (not err or err.endswith(b"\n")), f"not one line: {err!r}")
    check(bool(err) == (code in (1, 2)), f"stderr is {err!r}")
    for word in says:
        check(word.lower().encode() in err.lower(), f"stderr does not say {word!r}: {err!r}")
    check(len(err) < 600 and err.isascii(), f"stderr is {err!r}")
    return f"exit {code}"


def program(name: str, *arguments: object, code: int, stdin: bytes | None = None, says=(), then=None, **how):
    """Run the program to its end; then(stdout) looks at what it printed."""

    def run() -> str:
        source = subprocess.DEVNULL if stdin is None else subprocess.PIPE
        command = [*PROGRAM, *map(str, arguments)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
        process = subprocess.Popen(command, stdin=source, **options)
        out, err = process.communicate(stdin)
        got = ended(process, code, out or b"", err, says)
        if then:
            then(out)
        return got

    return Variant(name, run, (f"exit {code}",), watched=False, seconds=10)


@case("U01", "standard input that is no text")
def no_text(folder: Path) -> Iterator[Variant]:
    model = talker(folder / "model.gguf", 128)
    for verb, name, data, says in [
        ("generate", "FF FE 80", b"ab\xff\xfe\x80", ("not UTF-8", "offset 2")),
        ("generate", "UTF-16", "hello".encode("utf-16"), ("not UTF-8", "offset 0")),
        ("generate", "NUL", b"a\0b", ("offset 1",)),
        ("chat", "FF FE 80", b"ab\xff\xfe\x80", ("not UTF-8", "offset 2")),
        ("tokenize", "UTF-16", "hello".encode("utf-16"), ("not UTF-8", "offset 0")),
    ]:
        yield program(f"{verb}: {name}", verb, "-m", model, code=2, stdin=data, says=says)


@case("U02", "a reader that goes away")
def closed_pipe(folder: Path) -> Iterator[Variant]:
    model = talker(folder / "model.gguf", 1 << 18)

    def run() -> str:
        command = [*PROGRAM, "generate", "-m", model, "-n", "200000", "a"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            check(process.stdout.read(10) == b"a" * 10, "it does not talk")
            process.stdout.close()
            process.wait()  # if it does not notice, the watchdog ends this
            return ended(process, 0, b"", process.stderr.read(), ())

    yield Variant("head -c 10", run, ("exit 0",), watched=False, seconds=10)
    yield Variant(
        "before the first letter", lambda: nobody_reads(model), ("exit 0",), watched=False, seconds=10
    )


def nobody_reads(model: Path) -> str:
    reading, writing = os.pipe()
    os.close(reading)
    command = [*PROGRAM, "generate", "-m", model, "-n", "5", "a"]
    process = subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    return ended(process, 0, b"", process.communicate()[1], ())


# ---------------------------------------------------------------- Ctrl-C

LONG_PROMPT = b"ab" * 4000

# A program that uses the library: interrupted, it goes on with the same model and the same session.
LIBRARY = """
import sys, numpy_llama as nl
llama = nl.load(sys.argv[1])
session = llama.new_session()
print("ready", flush=True)
try:
    llama.generate("ab" * 4000, max_tokens=1, session=session)
    sys.exit("not interrupted")
except KeyboardInterrupt:
    print("stopped", flush=True)
same = llama.generate("abc", max_tokens=5, session=session).tokens
sys.exit(130 if same == llama.generate("abc", max_tokens=5).tokens and len(same) == 5 else "another text")
"""
THREAD = """
import sys, threading, numpy_llama as nl
llama = nl.load(sys.argv[1])
work = threading.Thread(target=lambda: llama.generate("ab" * 4000, max_tokens=1), daemon=True)
work.start()
print("ready", flush=True)
try:
    while work.is_alive():
        work.join(0.1)
    sys.exit("not interrupted")
except KeyboardInterrupt:
    sys.exit(130)
"""


def interrupted(command: list, ready, stdin: bytes = b"", kept: bytes = b"", stopped=None) -> str:
    """Ctrl-C when ready(process) returns: it must end soon, or stopped(process); what it wrote is there."""
    took = []
    for _ in range(TRIES):
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        process.stdin.write(stdin)
        process.stdin.close()
        process.stdin = None
        seen = ready(process) or b""
        began, used = time.monotonic(), cpu_seconds(process)
        process.send_signal(signal.SIGINT)
        if stopped:
            stopped(process)
        else:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        # On a busy machine it waits for a CPU: what it computes itself is what it can be blamed for.
        took.append(min(time.monotonic() - began, cpu_seconds(process) - used))
        out, err = process.communicate()
        ended(process, 130, out, err, ())
        check((seen + out).startswith(kept), f"it wrote {seen + out!r}")
        if took[-1] <= PROMPT_SECONDS:
            return "exit 130"
    raise ValueError(f"it took {', '.join(f'{t:.2f}' for t in took)} s to end")


def cpu_seconds(process: subprocess.Popen) -> float:
    """What all its threads have used so far; it may have ended, but must not have been waited for."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@case("U03", "Ctrl-C at any time")
def ctrl_c(folder: Path) -> Iterator[Variant]:
    model = slow_talker(folder / "model.gguf")
    endless = talker(folder / "endless.gguf", 1 << 18)
    large = talker(folder / "large.gguf", 128, dim=1024, n_layers=4)
    generate = [*PROGRAM, "generate", "-n", "200000", "-m"]

    def mapped(process) -> None:
        maps = Path(f"/proc/{process.pid}/maps")
        while str(folder) not in maps.read_text():
            check(process.poll() is None, "it ended by itself")
            time.sleep(0.001)

    def reading(process) -> None:
        mapped(process)
        time.sleep(0.5)

    def begun(process) -> bytes:
        return process.stdout.read(20)

    def ready(process) -> None:
        check(process.stdout.readline() == b"ready\n", "it is not ready")
        time.sleep(0.2)

    def stopped(process) -> None:
        check(process.stdout.readline() == b"stopped\n", "it did not stop")

    library, thread = ([*PYTHON, "-c", source, model] for source in (LIBRARY, THREAD))
    for name, run in {
        "while it loads": lambda: interrupted([*generate, large, "--backend", "numpy"], mapped, b"ab"),
        "while it reads the prompt": lambda: interrupted([*generate, model], reading, LONG_PROMPT),
        "while it writes": lambda: interrupted([*generate, endless], begun, b"a", b"a" * 20),
        "in a library, then on": lambda: interrupted(library, ready, stopped=stopped),
        "beside a second thread": lambda: interrupted(thread, ready),
    }.items():
        yield Variant(name, run, ("exit 130",), watched=False, seconds=30, patience=TRIES * 10)


# ---------------------------------------------------------------- nothing to do, too much to do


@case("U04", "nothing to read, nobody to ask")
def nothing(folder: Path) -> Iterator[Variant]:
    model = talker(folder / "model.gguf", 128)
    for verb in ("generate", "chat"):
        yield program(f"{verb}, /dev/null", verb, "-m", model, code=2, says=("empty",))
        yield program(f"{verb}, a newline", verb, "-m", model, code=2, stdin=b"\n", says=("empty",))
    yield program("no command", code=2, says=("--help",))


@case("U05", "more than the context holds")
def context(folder: Path) -> Iterator[Variant]:
    model = talker(folder / "model.gguf", 32)
    arguments = ("generate", "-m", model, "-n", "1000")
    yield program("the prompt", *arguments, code=1, stdin=b"b" * 100, says=("102", "32"))

    def ends_by_length(out: bytes) -> None:
        answer = json.loads(out)
        check(answer["finish_reason"] == "length" and len(answer["tokens"]) == 32 - 4, answer)

    yield program("the answer", *arguments, "--json", code=0, stdin=b"bb", then=ends_by_length)
    yield program("the answer, as text", *arguments, code=0, stdin=b"bb")


@case("U06", "too little memory")
def memory(folder: Path) -> Iterator[Variant]:
    q8_0 = (8, 32, 34)
    model = talker(folder / "model.gguf", 4096, dim=4096, n_layers=30, type=q8_0)
    size = model.stat().st_size
    check(7 << 30 < size < 8 << 30, f"{size} bytes")

    def limited(nbytes: int):
        return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))}

    arguments = ("generate", "-m", model, "a")
    yield program("7B on 4 GB", *arguments, code=1, says=(str(size), "model.gguf"), **limited(4 << 30))
    says = ("does not fit", "GiB", "KV cache", "available", "what would fit", "q4")
    yield program("room for half a copy", *arguments, code=1, says=says, **limited(size + (11 << 29)))


@case("U07", "an older CPU")
def scalar(folder: Path) -> Iterator[Variant]:
    model = talker(folder / "model.gguf", 64)
    arguments = ("generate", "-m", model, "-n", "10", "b")

    def says_a(out: bytes) -> None:
        check(out == b"a" * 10 + b"\n", out)

    for isa in ("scalar", ""):
        environment = os.environ | {"NUMPY_LLAMA_ISA": isa}
        yield program(isa or "the fastest", *arguments, code=0, then=says_a, env=environment)
    unknown = os.environ | {"NUMPY_LLAMA_ISA": "avx1024"}
    yield program("one that is not there", *arguments, code=1, says=("avx1024", "scalar"), env=unknown)


# ---------------------------------------------------------------- a full disk

CONVERT = """
import resource, sys
from numpy_llama.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
sys.exit(main(sys.argv[1:]))
"""
# In a mount namespace of its own, so that nothing stays mounted whatever happens.
ON_TMPFS = """
mount -t tmpfs -o size=32k none "$1" || exit 99
echo old > "$1/out.gguf"
shift; "$@"; code=$?
[ "$(ls -A "$OUT")" = out.gguf ] && [ "$(cat "$OUT/out.gguf")" = old ] || exit 98
exit $code
"""


@case("U08", "a full disk")
def full_disk(folder: Path) -> Iterator[Variant]:
    model = talker(folder / "model.gguf", 64)

    def to_full(*arguments: str) -> str:
        with open("/dev/full", "wb") as full:
            process = subprocess.Popen(
                [*PROGRAM, *arguments], stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE
            )
            return ended(process, 1, b"", process.communicate()[1], ("disk is full",))

    for arguments in (["generate", "-m", str(model), "a"], ["info", str(model)]):
        yield Variant(
            f"{arguments[0]} > /dev/full",
            lambda a=arguments: to_full(*a),
            ("exit 1",),
            watched=False,
            seconds=10,
        )
    out = folder / "out"

    def convert_within_a_limit() -> str:
        out.mkdir()
        (out / "out.gguf").write_text("old\n")
        command = [*PYTHON, "-c", CONVERT, "convert", model, out / "out.gguf", "--dtype", "f32"]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        got = ended(process, 1, b"", process.communicate()[1], ("out.gguf",))
        check([f.name for f in out.iterdir()] == ["out.gguf"], "it leaves something behind")
        check((out / "out.gguf").read_text() == "old\n", "the old file is gone")
        return got

    def convert_on_tmpfs() -> str:
        mounted = folder / "tmpfs"
        mounted.mkdir()
        alone = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
        command = [*PROGRAM, "convert", model, mounted / "out.gguf", "--dtype", "f32"]
        command = [*alone, "sh", "-c", ON_TMPFS, "sh", mounted, *command]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | {"OUT": str(mounted)},
        )
        err = process.communicate()[1]
        if process.returncode == 99 or b"unshare" in err:
            return "exit 1"  # mounting is not allowed here: the limit on file sizes has to do
        return ended(process, 1, b"", err, ("disk",))

    yield Variant("convert, RLIMIT_FSIZE", convert_within_a_limit, ("exit 1",), watched=False, seconds=10)
    yield Variant("convert, a full tmpfs", convert_on_tmpfs, ("exit 1",), watched=False, seconds=10)

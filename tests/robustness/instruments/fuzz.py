"""Coverage-guided fuzzing of file readers and of C entry points:

    python tests/robustness/instruments/fuzz.py TARGET ... [--minutes 10] [--keep]   `all` is every target

A reader runs under atheris, with readers.py. A C function runs under libFuzzer with AddressSanitizer and
UndefinedBehaviorSanitizer, with fuzz_kernels.c. `--minutes` is CPU time for each target. A run starts with
corpus/TARGET.zip, the inputs of earlier runs, and with small valid files. An input that fails is written to
build/fuzz/TARGET, and the exit code is 1. `--keep` writes the inputs that reached a new branch into that zip,
the smallest first, 16 KB at most.
"""

import argparse
import math
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
BUILD = ROOT / "build" / "fuzz"
CORPUS = HERE / "corpus"
FILES = ("gguf", "safetensors", "torch", "pickle", "llama2c", "params", "config", "tokenizer_json")
FILES += ("sentencepiece", "tiktoken", "template", "gptq", "awq", "gemv", "packed", "bitsandbytes", "fp8")
INFERENCE = ("linear", "linear_exact", "linear_quantized", "attention", "layer", "convert", "exp")
TRAINING = ("linear_dx", "linear_dw", "attention_backward", "training")
KERNELS = INFERENCE + TRAINING
SANITIZE = "-fsanitize=address,undefined"
# Without OpenMP: sanitize.py looks for races.
COMPILE = ["clang", "-std=c11", "-O1", "-g", "-ffp-contract=off", "-fno-sanitize-recover=all"]
COMPILE += ["-Wno-unknown-pragmas"]
LIMITS = ["-timeout=20"]
MEMORY = 300  # MB for a reader: Python and NumPy take 80, and a small file may take 64 MiB more
MOST_KEPT = 16 << 10  # bytes of a compressed corpus


def fuzz(target: str, minutes: float, keeping: bool) -> bool:
    """-> whether nothing was found."""
    work, log = begin(target), BUILD / target / "log"
    command = kernel_command(target) if target in KERNELS else reader_command(target)
    with log.open("w") as output:
        done = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, preexec_fn=lambda: limit_cpu(60 * minutes)
        )
    said = log.read_text(errors="replace")
    runs = int((re.findall(r"^#(\d+)\t", said, re.MULTILINE) or ["0"])[-1])  # at its last line
    reached = (re.findall(r"cov: (\d+)", said) or ["0"])[-1]
    print(f"{target:15}{runs:>12,} runs{reached:>7} reached", flush=True)
    good = done.returncode in (0, -signal.SIGXCPU)
    if not good:
        print(said[-6000:], f"\na failure: {log} has the whole log", sep="")
    if keeping:
        inputs = [path.read_bytes() for path in work.iterdir()]
        keep(target, inputs if target in KERNELS else least_of(target, inputs))
    return good


def limit_cpu(seconds: float) -> None:
    """Runs in the child. libFuzzer itself can only limit elapsed time, which other programs share."""
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), resource.RLIM_INFINITY))


def begin(target: str) -> Path:
    """A folder with the inputs of earlier runs."""
    work = BUILD / target / "inputs"
    shutil.rmtree(work.parent, ignore_errors=True)
    work.mkdir(parents=True)
    for i, data in enumerate(kept(target)):
        (work / f"kept-{i:03}").write_bytes(data)
    return work


def kept(target: str) -> Iterator[bytes]:
    """The inputs of corpus/TARGET.zip."""
    if (path := CORPUS / f"{target}.zip").exists():
        with zipfile.ZipFile(path) as archive:
            yield from map(archive.read, archive.namelist())


def keep(target: str, inputs: list[bytes]) -> None:
    CORPUS.mkdir(exist_ok=True)
    with zipfile.ZipFile(CORPUS / f"{target}.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        size = 0
        for i, data in enumerate(sorted(inputs, key=lambda data: (len(data), data))):
            info = zipfile.ZipInfo(f"{i:03}")  # dated 1980, so the same inputs make the same file
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, data)
            size += archive.getinfo(info.filename).compress_size + 100  # of the directory
            if size > MOST_KEPT:
                break


# ---------------------------------------------------------------- C


def kernel_command(target: str) -> list:
    program, folder = compiled(target), BUILD / target
    # The bytes after the first 200 only fill arrays, and a generator makes those too.
    command = [program, *LIMITS, f"-artifact_prefix={folder}/", "-max_len=200", "-len_control=0"]
    return [*command, folder / "inputs"]


def compiled(target: str) -> Path:
    """The fuzzer of a C function. The kernels are compiled once, because that takes minutes."""
    if not shutil.which("clang"):
        sys.exit("clang is missing: apt install clang libclang-rt-14-dev (or of another version)")
    BUILD.mkdir(parents=True, exist_ok=True)
    csrc = ROOT / "csrc"
    newest = max(path.stat().st_mtime for path in csrc.glob("*.[ch]"))

    def compile_one(name: str) -> Path:
        made = BUILD / f"{name}.o"
        if not made.exists() or made.stat().st_mtime < newest:
            print(f"compiling {name}", flush=True)
            part, flags = made.with_suffix(".part"), ["-fsanitize=fuzzer-no-link", SANITIZE]
            subprocess.run([*COMPILE, *flags, "-c", csrc / name, "-o", part], check=True)
            part.replace(made)
        return made

    sources = runpy.run_path(str(csrc / "build_kernels.py"))["SOURCES"]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sorted(sources)))
    program = BUILD / f"fuzz_{target}"
    flags = [*COMPILE, "-fsanitize=fuzzer", SANITIZE, f"-DTARGET=fuzz_{target}", "-I", csrc]
    subprocess.run([*flags, HERE / "fuzz_kernels.c", *objects, "-lm", "-o", program], check=True)
    return program


# ---------------------------------------------------------------- readers


def reader_command(target: str) -> list:
    """This file again, as a child, because atheris does not return."""
    return [sys.executable, __file__, target, "--child"]


def fuzz_reader(target: str) -> None:
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is missing: pip install atheris==3.0.0")
    sys.path.insert(0, str(HERE))
    with atheris.instrument_imports(include=["numpy_llama", "jinja2"]):
        from readers import READERS, attempt
    reader, folder = READERS[target], BUILD / target
    seeds = list(reader.seeds())
    for i, seed in enumerate(seeds):
        (folder / "inputs" / f"seed-{i}").write_bytes(seed)
        attempt(reader, seed)  # so that late imports happen now
    words = folder / "words"
    words.write_text("\n".join(map(quoted, words_of(seeds, reader.words))))
    arguments = [*LIMITS, f"-dict={words}", f"-artifact_prefix={folder}/", f"-rss_limit_mb={MEMORY}"]
    arguments += [f"-max_len={2 * max(map(len, seeds))}", str(folder / "inputs")]
    atheris.Setup([sys.argv[0], *arguments], lambda data: attempt(reader, data))
    atheris.Fuzz()


def words_of(seeds: list[bytes], more: str) -> list[bytes]:
    """Words for the fuzzer to insert: the names in the seeds, some numbers, and `more`."""
    found = {word for seed in seeds for word in re.findall(rb"[A-Za-z_][\w.]{3,40}", seed)}
    found |= {b"0", b"-1", b"1e999", b"NaN", b"null", b"true", b"[]", b"{}", b'""', b"18446744073709551616"}
    return sorted(found)[:400] + [word.encode("latin-1") for word in more.split(" ") if word]


def quoted(word: bytes) -> str:
    return '"' + "".join(f"\\x{byte:02x}" for byte in word) + '"'


def least_of(target: str, inputs: list[bytes]) -> list[bytes]:
    """The inputs that run a new pair of consecutive lines, the smallest input first."""
    sys.path.insert(0, str(HERE))
    from readers import READERS, attempt

    steps: set[tuple[str, int, int]] = set()
    chosen = []

    def trace(frame, event, argument):
        if "numpy_llama" not in frame.f_code.co_filename:
            return None
        last = 0

        def line(frame, event, argument):
            nonlocal last
            steps.add((frame.f_code.co_filename, last, frame.f_lineno))
            last = frame.f_lineno
            return line

        return line

    for data in sorted(inputs, key=len):
        before = len(steps)
        sys.settrace(trace)
        try:
            attempt(READERS[target], data)
        except Exception:
            continue  # a failure, which atheris has written to a file
        finally:
            sys.settrace(None)
        if len(steps) > before:
            chosen.append(data)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="+", choices=(*FILES, *KERNELS, "all"), metavar="TARGET")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        fuzz_reader(options.targets[0])
        return
    targets = (*FILES, *KERNELS) if "all" in options.targets else options.targets
    if not all([fuzz(target, options.minutes, options.keep) for target in targets]):
        sys.exit(1)


if __name__ == "__main__":
    main()

"""Coverage-guided fuzzing of one file reader, or of one C entry point:

    python tests/instruments/fuzz.py TARGET [--minutes 10]

A reader runs under atheris, with readers.py; a C function under libFuzzer with AddressSanitizer and
UndefinedBehaviorSanitizer, with fuzz_kernels.c. It begins with corpus/TARGET.zip, the inputs of earlier runs,
and with small files in order. What it finds wrong stays in build/fuzz/TARGET, and the exit code is not 0.
`--keep` puts what reached something new, the smallest first and 16 KB in all, into corpus/TARGET.zip.
"""

import argparse
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "fuzz"
CORPUS = HERE / "corpus"
FILES = ("gguf", "safetensors", "torch", "pickle", "llama2c", "params", "config", "tokenizer_json")
FILES += ("sentencepiece", "tiktoken", "template")
KERNELS = ("linear", "linear_exact", "fixed", "attention", "layer", "convert", "exp")
SANITIZE = "-fsanitize=address,undefined"
# Without OpenMP: races are sanitize.py's. Without optimisation by much, for the compiler's sake.
COMPILE = [
    "clang",
    "-std=c11",
    "-O1",
    "-g",
    "-ffp-contract=off",
    "-fno-sanitize-recover=all",
    "-Wno-unknown-pragmas",
]
LIMITS = ["-timeout=20", "-print_final_stats=1"]
MEMORY = 300  # MB for a reader, of which Python and NumPy take 80: a small file may take 64 MiB more
MOST_KEPT = 16 << 10  # bytes of a corpus, packed


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
            info = zipfile.ZipInfo(f"{i:03}")  # always of 1980: the same inputs make the same file
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, data)
            size += archive.getinfo(info.filename).compress_size + 100  # of the directory
            if size > MOST_KEPT:
                break


# ---------------------------------------------------------------- C


def compiled(target: str) -> Path:
    """The fuzzer of a C entry point. The kernels are compiled once: under sanitizers that takes minutes."""
    if not shutil.which("clang"):
        sys.exit(
            "clang is not there, whose libFuzzer this is: apt install clang libclang-rt-14-dev (or newer)"
        )
    BUILD.mkdir(parents=True, exist_ok=True)
    csrc = ROOT / "csrc"
    newest = max(path.stat().st_mtime for path in csrc.glob("*.[ch]"))

    def compile_one(name: str) -> Path:
        made = BUILD / f"{name}.o"
        if not made.exists() or made.stat().st_mtime < newest:
            print(f"compiling {name}", flush=True)
            source = csrc / name
            part = made.with_suffix(".part")
            subprocess.run(
                [*COMPILE, "-fsanitize=fuzzer-no-link", SANITIZE, "-c", source, "-o", part], check=True
            )
            part.replace(made)
        return made

    sources = runpy.run_path(str(csrc / "build_kernels.py"))["SOURCES"]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sorted(sources)))
    program = BUILD / f"fuzz_{target}"
    driver = [f"-DTARGET=fuzz_{target}", "-I", csrc, HERE / "fuzz_kernels.c"]
    subprocess.run(
        [*COMPILE, "-fsanitize=fuzzer", SANITIZE, *driver, *objects, "-lm", "-o", program], check=True
    )
    return program


def fuzz_kernel(target: str, minutes: float, keeping: bool) -> int:
    program, work = compiled(target), begin(target, kept(target))
    # What an input has beyond 200 bytes only fills arrays; where it ends a generator goes on.
    command = [program, *LIMITS, f"-artifact_prefix={work.parent}/", "-max_len=200", "-len_control=0"]
    done = subprocess.run([*command, f"-max_total_time={round(60 * minutes)}", work])
    if keeping:  # libFuzzer keeps what reaches something new; `keep` takes the smallest of it
        keep(target, [path.read_bytes() for path in work.iterdir()])
    return done.returncode


# ---------------------------------------------------------------- readers


def fuzz_reader(target: str, minutes: float, keeping: bool) -> int:
    """In a child, which atheris never comes back from."""
    work = begin(target, kept(target))
    done = subprocess.run([sys.executable, __file__, target, "--minutes", str(minutes), "--here"])
    if keeping:
        keep(target, least_of(target, [path.read_bytes() for path in work.iterdir()]))
    return done.returncode


def fuzz_here(target: str, minutes: float) -> None:
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not there: pip install atheris==3.0.0")
    sys.path.insert(0, str(HERE))
    with atheris.instrument_imports(include=["numpy_llama", "jinja2"]):
        from readers import READERS, attempt
    reader, work = READERS[target], BUILD / target / "inputs"
    seeds = list(reader.seeds())
    for i, seed in enumerate(seeds):
        (work / f"seed-{i}").write_bytes(seed)
        attempt(reader, seed)  # what is imported late is imported now
    words = work.with_name("words")
    words.write_text("\n".join(map(quoted, words_of(seeds, reader.words))))
    arguments = [*LIMITS, f"-rss_limit_mb={MEMORY}", f"-dict={words}", f"-artifact_prefix={work.parent}/"]
    arguments += [f"-max_len={2 * max(map(len, seeds))}", f"-max_total_time={round(60 * minutes)}", str(work)]
    atheris.Setup([sys.argv[0], *arguments], lambda data: attempt(reader, data))
    atheris.Fuzz()


def words_of(seeds: list[bytes], more: str) -> list[bytes]:
    """What such files are made of: names, numbers, and what else is given."""
    found = {word for seed in seeds for word in re.findall(rb"[A-Za-z_][\w.]{3,40}", seed)}
    found |= {b"0", b"-1", b"1e999", b"NaN", b"null", b"true", b"[]", b"{}", b'""', b"18446744073709551616"}
    return sorted(found)[:400] + [word.encode("latin-1") for word in more.split(" ") if word]


def quoted(word: bytes) -> str:
    return '"' + "".join(f"\\x{byte:02x}" for byte in word) + '"'


def least_of(target: str, inputs: list[bytes]) -> list[bytes]:
    """Of many inputs, smallest first, those that take a step from line to line that none before took."""
    sys.path.insert(0, str(HERE))
    from readers import READERS, attempt

    steps: set[tuple[str, int, int]] = set()
    chosen = []

    def trace(frame, event, argument):
        if event == "call" and "numpy_llama" not in frame.f_code.co_filename:
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
            continue  # a finding, kept by itself
        finally:
            sys.settrace(None)
        if len(steps) > before:
            chosen.append(data)
    return chosen


def begin(target: str, inputs: Iterator[bytes] | list[bytes]) -> Path:
    """An empty folder but for these inputs."""
    work = BUILD / target / "inputs"
    shutil.rmtree(work.parent, ignore_errors=True)
    work.mkdir(parents=True)
    for i, data in enumerate(inputs):
        (work / f"kept-{i:03}").write_bytes(data)
    return work


def main() -> None:
    readers = ("gguf", "safetensors", "torch", "pickle", "llama2c", "params", "config", "tokenizer_json")
    readers += ("sentencepiece", "tiktoken", "template")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=(*readers, *KERNELS))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        fuzz_here(options.target, options.minutes)
    else:
        fuzz = fuzz_kernel if options.target in KERNELS else fuzz_reader
        sys.exit(fuzz(options.target, options.minutes, options.keep))


if __name__ == "__main__":
    main()

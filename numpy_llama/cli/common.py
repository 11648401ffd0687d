"""What several commands share: their arguments, their input, and how they show progress."""

import argparse
import codecs
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, TaskID, TextColumn

from ..checkpoint.download import DEFAULT_MODEL
from ..errors import NumpyLlamaError, ParameterError, TextError, escape, printable, visible
from ..generation.generate import PREFILL_CHUNK
from ..generation.sampling import Sampler
from ..generation.transcript import Completion, Piece
from ..llama import Llama, finish, load
from ..text.tokenizer import PADDING, Tokenizer

MOST_TOKENS = 512  # of a text that is looked into: each layer's scores take 4 * H * T^2 bytes


def add_model_arguments(parser: argparse.ArgumentParser, many_threads: bool = False) -> None:
    """`many_threads`: -t takes several numbers, as a list."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m",
        "--model",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help="a file, a folder, or a name that `pull` knows [%(default)s]",
    )
    group.add_argument(
        "-t",
        "--threads",
        type=whole_numbers(1) if many_threads else whole_number(1),
        metavar="N,..." if many_threads else "N",
        help="threads of the C kernels [all CPUs]",
    )
    group.add_argument(
        "--backend", choices=["c", "numpy"], default="c", help="the C kernels, or plain NumPy [c]"
    )
    group.add_argument(
        "--max-seq-len",
        type=whole_number(1),
        metavar="N",
        help="a context of N tokens [the model's own]",
    )
    group.add_argument(
        "--exact",
        action="store_true",
        help="multiply float32 numbers as they are; slower, for reference work",
    )


def add_text_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", metavar="TEXT", help="what the model is to read")


def add_special_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--special", action="store_true", help="read control tokens' names in the text as those tokens"
    )


def path(text: str) -> Path:
    """An argument type: a path; `~` is the home folder, where no shell has expanded it."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def add_sampling_arguments(parser: argparse.ArgumentParser, max_tokens: int | None) -> None:
    shown = "until the context is full" if max_tokens is None else str(max_tokens)
    group = parser.add_argument_group("generation")
    group.add_argument(
        "-n",
        "--max-tokens",
        type=whole_number(0),
        default=max_tokens,
        metavar="N",
        help=f"new tokens at most [{shown}]",
    )
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token [0]"
    )
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest that make up the share P"
    )
    group.add_argument(
        "--min-p", type=float, metavar="P", help="draw from those at least P times as likely as the first"
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="make tokens seen before less likely [1: no]",
    )
    group.add_argument("--seed", type=int, metavar="N", help="the same chances each time")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text (may be repeated)"
    )
    group.add_argument("--json", action="store_true", help="print one JSON object instead of the text")


def whole_number(least: int) -> Callable[[str], int]:
    """An argument type: a whole number, `least` or above."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, {least} or above")
        return number

    return parse


def whole_numbers(least: int) -> Callable[[str], list[int]]:
    """An argument type: one or more of them, with commas."""
    one = whole_number(least)
    return lambda text: [one(part) for part in text.split(",")]


def generation_options(args: argparse.Namespace) -> dict:
    """The options of `Llama.stream`, checked before any model is loaded."""
    sampling = {
        name: getattr(args, name)
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    }
    Sampler(**sampling)
    filters = [name for name in ("top_k", "top_p", "min_p") if sampling[name] is not None]
    if filters and args.temperature == 0:
        option = filters[0].replace("_", "-")
        note(f"--{option} has no effect at temperature 0, which takes the likeliest token")
    if "" in args.stop:
        raise ParameterError("--stop is an empty text")
    return {**sampling, "max_tokens": args.max_tokens, "stop": args.stop}


def load_model(args: argparse.Namespace) -> Llama:
    if args.backend == "numpy" and args.threads is not None:
        note("-t sets the threads of the C kernels; NumPy's own are set by OPENBLAS_NUM_THREADS")
    with transfer_bar() as progress:
        options = {name: getattr(args, name) for name in ("backend", "threads", "exact", "max_seq_len")}
        llama = load(args.model, progress=progress, **options)
    ids, rows = llama.tokenizer.n_used, llama.model.args.vocab_size
    if rows - ids >= PADDING:
        note(f"the tokenizer has {ids} ids, the embedding {rows} rows: is it the tokenizer of this model?")
    return llama


def text_ids(llama: Llama, text: str) -> list[int]:
    """The ids of a text that is read in one pass, for a look inside; an error if there are none, or many."""
    note_names(llama.tokenizer, text)
    ids = llama.tokenizer.encode(without_mark(text, "the text"), bos=llama.tokenizer.add_bos)
    most = min(MOST_TOKENS, llama.max_context)
    if not 0 < len(ids) <= most:
        raise ParameterError(f"the text has {len(ids)} tokens, wanted 1 to {most}")
    return ids


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under its name only when it is whole."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise NumpyLlamaError(f"{path} cannot be written: {error.strerror}") from None
        raise


def read_stdin() -> str:
    """All of standard input as text, without the newline that ends the last line."""
    return as_text(sys.stdin.buffer.read(), "standard input").removesuffix("\n").removesuffix("\r")


def as_text(data: bytes, source: str) -> str:
    """The text that these bytes of `source` are in UTF-8."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        utf_16 = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        hint = "it begins as UTF-16: iconv -f UTF-16 -t UTF-8" if utf_16 else "iconv converts other encodings"
        found = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise TextError(f"{source} is not UTF-8: {found} ({hint})") from None
    if (at := data.find(0)) >= 0:
        raise TextError(f"{source} is not text: byte 0x00 at offset {at}")
    return without_mark(text, source)


def without_mark(text: str, source: str) -> str:
    """`text` without a byte order mark at its start: it names an encoding and is no text."""
    if text.startswith("\ufeff"):
        note(f"{source} begins with a byte order mark, which is left out")
    return text.removeprefix("\ufeff")


def note_names(tokenizer: Tokenizer, text: str, special: bool | None = None) -> None:
    """A remark where a text has a control token's name, unless it is read as that token: `special`.

    None: the command has no --special.
    """
    found = None if special else tokenizer.control_names.search(text)
    if found:
        way = "; --special reads it as the token" if special is False else ""
        note(
            f"the text has {escape(found[0])}, a control token's name, and it is read as plain text{way}; "
            "`chat` writes the model's own format"
        )


class Terminal(io.TextIOWrapper):
    """Standard output on a terminal: no text of a model or of a file can command it.

    `plain` is the stream below, for colours of our own.
    """

    def __init__(self, plain: io.TextIOWrapper):
        self.plain = plain
        super().__init__(plain.buffer, plain.encoding, plain.errors, line_buffering=True)

    def write(self, text: str) -> int:
        super().write(visible(text))
        return len(text)


def await_ctrl_c() -> None:
    """The next Ctrl-C is a KeyboardInterrupt; one more kills at once, whatever is still being tidied up."""

    def interrupt(number, frame):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the system's own way waits for no Python
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)


def note(text: str) -> None:
    """A remark to a person, on stderr; if nobody can hear it, the work is done all the same."""
    with suppress(OSError):
        print(f"numpy-llama: {printable(text)}", file=sys.stderr, flush=True)


def written(stream: Iterable[Piece]) -> Iterator[Piece]:
    """The same stream, its text printed as it comes; a line that was begun is ended, whatever happens."""
    last = "\n"
    try:
        for piece in stream:
            if piece.text:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
                last = piece.text[-1]
            yield piece
    finally:
        if last != "\n":
            sys.stdout.write("\n")
            sys.stdout.flush()


def show(stream: Iterable[Piece]) -> None:
    """Print a generation as it comes; how fast it came goes to stderr, for a person at a terminal."""
    completion = finish(written(stream))
    if sys.stderr.isatty():
        print(
            f"[prompt: {len(completion.prompt_tokens)} tokens in {completion.prefill_seconds:.2f} s; "
            f"answer: {len(completion.tokens)} tokens, {completion.decode_tokens_per_second:.1f} a second; "
            f"ended by {completion.finish_reason}]",
            file=sys.stderr,
        )


def collect(stream: Iterable[Piece], into: list[str]) -> Iterator[Piece]:
    """The same stream, its text also kept: what was said remains when the stream is cut."""
    for piece in stream:
        into.append(piece.text)
        yield piece


def run_stream(stream: Iterable[Piece], as_json: bool) -> None:
    """Print one generation, as text or as JSON."""
    if as_json:
        print(completion_json(finish(stream)))
    else:
        show(stream)


def completion_json(completion: Completion) -> str:
    shown = json.dumps(
        {
            "text": completion.text,
            "tokens": completion.tokens,
            "prompt_tokens": completion.prompt_tokens,
            "finish_reason": completion.finish_reason,
            "timings": {
                "prefill_seconds": round(completion.prefill_seconds, 6),
                "decode_seconds": round(completion.decode_seconds, 6),
                "prefill_tokens_per_second": round(
                    len(completion.prompt_tokens) / completion.prefill_seconds, 3
                ),
                "decode_tokens_per_second": round(completion.decode_tokens_per_second, 3),
            },
        },
        ensure_ascii=sys.stdout.encoding.lower() not in ("utf-8", "utf8"),
    )
    return visible(shown, "\\u{:04x}") if sys.stdout.isatty() else shown


class _Bar:
    """A progress bar on stderr while a person watches: begins at the first news, leaves nothing behind."""

    def __init__(self, *columns: ProgressColumn):
        console = Console(stderr=True)
        shown = (TextColumn("{task.description}"), BarColumn(), *columns)
        self.bar = Progress(*shown, console=console, transient=True, disable=not console.is_terminal)
        self.task: TaskID | None = None

    def show(self, what: str, done: int, total: int) -> None:
        if self.task is None:
            self.bar.start()
            self.task = self.bar.add_task(what, total=total)
        self.bar.update(self.task, description=what, completed=done, total=total)

    def close(self) -> None:
        if self.task is not None:
            self.bar.stop()


@contextmanager
def transfer_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar that counts bytes: progress(what, done, total)."""
    bar = _Bar(DownloadColumn())
    try:
        yield bar.show
    finally:
        bar.close()


@contextmanager
def prefill_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar for reading a long prompt: on_prefill(done, total). It is gone before the first token comes."""
    bar = _Bar(TextColumn("{task.completed}/{task.total} tokens"))

    def on_prefill(done: int, total: int) -> None:
        if done == total:
            bar.close()
        elif total - done > PREFILL_CHUNK or bar.task is not None:
            bar.show("reading the prompt", done, total)

    try:
        yield on_prefill
    finally:
        bar.close()


@contextmanager
def run_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that counts runs: on_run(done, total)."""
    bar = _Bar(TextColumn("{task.completed}/{task.total} runs"))
    try:
        yield lambda done, total: bar.show(what, done, total)
    finally:
        bar.close()


@contextmanager
def count_bar(unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar that counts windows of a text, or steps: progress(what is known or done now, done, total)."""
    bar = _Bar(TextColumn("{task.completed}/{task.total} " + unit))
    try:
        yield bar.show
    finally:
        bar.close()

"""The parts that several commands share: arguments, input, notes, output and progress bars."""

import argparse
import codecs
import io
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, TaskID, TextColumn

from ..checkpoint.download import DEFAULT_MODEL, locate, on_the_hub
from ..checkpoint.files import MappedFile
from ..checkpoint.hub import PREFIX
from ..checkpoint.json_file import JsonFile
from ..errors import NumpyLlamaError, ParameterError, TextError, escape, printable, visible
from ..generation.sampling import Logprobs, Sampler
from ..generation.speculative import Drafter, Lookup
from ..generation.structured import Grammar
from ..generation.transcript import Completion, Piece
from ..llama import Llama, finish, load
from ..text.tokenizer import PADDING, Tokenizer
from ..window import PREFILL_CHUNK

FILTERS = "top_k", "top_p", "min_p", "typical_p", "top_n_sigma", "xtc_probability", "mirostat_tau"
MOST_TOKENS = 512  # of a text whose intermediates are recorded: the scores of a layer take 4 * H * T^2 bytes


def add_model_arguments(parser: argparse.ArgumentParser, many_threads: bool = False) -> None:
    """The options of a command that loads a model. `many_threads`: -t takes several numbers, as a list."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m",
        "--model",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help="a file, a folder, hf:OWNER/REPO, or a name that `pull` lists [%(default)s]",
    )
    add_adapter_argument(group)
    group.add_argument(
        "-t",
        "--threads",
        type=whole_numbers(1) if many_threads else whole_number(1),
        metavar="N,..." if many_threads else "N",
        help="threads of the C kernels [all CPUs; under mpiexec the process's share of them]",
    )
    group.add_argument(
        "--backend", choices=["c", "numpy"], default="c", help="the C kernels, or plain NumPy [c]"
    )
    group.add_argument(
        "--max-seq-len",
        type=whole_number(1),
        metavar="N",
        help="the size of the context in tokens [the model's own]",
    )
    group.add_argument(
        "--activation-bits",
        type=int,
        choices=[8, 15],
        default=8,
        help="the bits of activations where weights are whole numbers; 15 are more accurate, slower [8]",
    )
    group.add_argument(
        "--cache-dtype",
        choices=["q8"],
        help="keep keys and values in 8 bits: about half the memory of float16 [float16; NumPy float32]",
    )
    group.add_argument(
        "--exact",
        action="store_true",
        help="keep activations, keys and values in float32; slower, for reference work",
    )
    group.add_argument(
        "--shares",
        type=shares,
        metavar="3,1",
        help="under mpiexec: how much of the weights each process gets; auto: by the measured speed of its "
        "memory [even]",
    )


def add_adapter_argument(parser: argparse._ActionsContainer, required: bool = False) -> None:
    parser.add_argument(
        "--adapter",
        action="append",
        required=required,
        metavar="PATH",
        help="a LoRA adapter for the model: a folder of PEFT, a GGUF file or hf:OWNER/REPO; PATH:0.5 takes "
        "half of it (may be repeated: the updates are added)",
    )


def add_text_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", metavar="TEXT", help="the text that the model reads")


def add_special_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parse-special",
        "--special",
        dest="special",
        action="store_true",
        help="read the name of a control token in the text as that token",
    )


def path(text: str) -> Path:
    """An argument type: a path. A `~` that no shell has expanded is the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty text is no path")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def add_sampling_arguments(
    parser: argparse.ArgumentParser, max_tokens: int | None, temperature: str = "0"
) -> None:
    """The options of `generation_options`; `temperature` describes its default. None: it was not given."""
    shown = "until the context is full" if max_tokens is None else str(max_tokens)
    group = parser.add_argument_group("generation")
    group.add_argument(
        "-n",
        "--max-tokens",
        type=whole_number(0),
        default=max_tokens,
        metavar="N",
        help=f"generate at most N tokens [{shown}]",
    )
    group.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help=f"0 takes the likeliest token; a higher T makes the choice more random [{temperature}]",
    )
    group.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    group.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample from the likeliest tokens whose probabilities sum to P",
    )
    group.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="sample from tokens at least P times as likely as the likeliest",
    )
    for option, metavar, meaning in [
        (
            "--typical-p",
            "P",
            "sample from the tokens of the most typical surprise whose probabilities sum to P",
        ),
        ("--top-n-sigma", "N", "sample from tokens within N standard deviations of the largest logit"),
        ("--xtc-probability", "P", "with probability P, drop all likely tokens but the least likely of them"),
        ("--xtc-threshold", "P", "XTC's likely tokens have a probability of P or more [0.1]"),
        ("--mirostat-tau", "BITS", "hold the surprise of the text near BITS a token (mirostat 2)"),
        ("--mirostat-eta", "RATE", "how fast mirostat corrects itself [0.1]"),
        ("--repetition-penalty", "R", "make tokens of the text so far less likely [1: off]"),
        ("--presence-penalty", "R", "subtract R from the logits of tokens of the text so far [0: off]"),
        (
            "--frequency-penalty",
            "R",
            "subtract R for each time that a token occurs in the text so far [0: off]",
        ),
        ("--dry-multiplier", "R", "DRY: penalize tokens that would repeat a sequence, by R or more [0: off]"),
        ("--dry-base", "R", "DRY's penalty grows by this factor for each repeated token [1.75]"),
    ]:
        group.add_argument(option, type=float, metavar=metavar, help=meaning)
    group.add_argument(
        "--dry-allowed-length", type=int, metavar="N", help="DRY lets repeats below N tokens pass [2]"
    )
    group.add_argument(
        "--penalty-window",
        type=int,
        metavar="N",
        help="the three penalties count the last N tokens of prompt and text [all]",
    )
    group.add_argument(
        "--logit-bias",
        type=bias,
        action="append",
        metavar="TOKEN=X",
        help="add X to the logit of a token: an id, or a text that is one; -inf bans it (may be repeated)",
    )
    group.add_argument(
        "--seed", type=int, metavar="N", help="the seed: the same N gives the same text [a new seed]"
    )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop before this text (may be repeated)"
    )
    group.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    group.add_argument(
        "--top-logprobs",
        type=whole_number(0),
        metavar="N",
        help="with --json: the log probability of each new token, and those of the N likeliest tokens",
    )
    drafts = group.add_mutually_exclusive_group()
    drafts.add_argument(
        "--lookup",
        action="store_true",
        help="the same text in fewer passes, if it repeats parts of itself or of the prompt: what followed "
        "the last tokens before is computed at once",
    )
    drafts.add_argument(
        "--draft",
        metavar="MODEL",
        help="the same text in fewer passes: a smaller model with the same vocabulary proposes tokens",
    )
    form = group.add_mutually_exclusive_group()
    form.add_argument(
        "--json-schema", type=path, metavar="FILE", help="the text is JSON that this JSON schema describes"
    )
    form.add_argument("--regex", metavar="TEXT", help="the text matches this regular expression as a whole")
    form.add_argument(
        "--grammar",
        type=path,
        metavar="FILE",
        help="the text follows this grammar, in llguidance's form of Lark",
    )


def bias(text: str) -> tuple[int | str, float]:
    """An argument type: TOKEN=X, with an id or a text before the last equals sign."""
    token, _, number = text.rpartition("=")
    try:
        x = float(number)
    except ValueError:
        x = math.nan
    if not token or not -math.inf <= x < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not TOKEN=X, with a number or -inf behind the sign")
    return int(token) if token.isdecimal() else token, x


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
    """An argument type: one or more whole numbers with commas between them."""
    one = whole_number(least)
    return lambda text: [one(part) for part in text.split(",")]


def shares(text: str) -> list[float] | str:
    """An argument type: numbers above 0 with commas between them, or "auto"."""
    if text == "auto":
        return text
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if not all(0 < number < math.inf for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers above 0, such as 3,1")
    return numbers


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `Llama.stream` that were given, checked before any model is loaded."""
    given = {field.name: getattr(args, field.name, None) for field in fields(Sampler)}
    sampling = {name: value for name, value in given.items() if value is not None}
    biases = dict(sampling.pop("logit_bias", ()))
    Sampler(**sampling)
    if biases:
        sampling["logit_bias"] = biases  # its texts become ids when the model is there
    if "" in args.stop:
        raise ParameterError("--stop is an empty text")
    if args.top_logprobs is not None and not args.json:
        raise ParameterError("--top-logprobs is for JSON: add --json")
    names = "max_tokens", "stop", "top_logprobs"
    return sampling | form_options(args) | {name: getattr(args, name) for name in names}


def form_options(args: argparse.Namespace) -> dict[str, Any]:
    """The option that gives the text a form, if there is one: its file is read, and it is compiled."""
    options: dict[str, Any] = {}
    if args.json_schema is not None:
        options["json_schema"] = JsonFile(args.json_schema).values
    if args.regex is not None:
        options["regex"] = args.regex
    if args.grammar is not None:
        options["grammar"] = as_text(MappedFile(args.grammar, "a grammar").map[:], str(args.grammar))
    if options:
        Grammar(**options)
    return options


def note_filters(options: dict[str, Any]) -> None:
    """Print a note if a filter was given without a temperature."""
    filters = [name for name in FILTERS if name in options]
    if filters and not options.get("temperature"):
        option = filters[0].replace("_", "-")
        note(f"--{option} has no effect at temperature 0, which takes the likeliest token")


def drafter(args: argparse.Namespace, llama: Llama) -> Drafter | None:
    """What --lookup or --draft asks for."""
    if args.lookup:
        return Lookup()
    if args.draft is None:
        return None
    with transfer_bar() as progress:
        options = {name: getattr(args, name) for name in ("backend", "threads", "exact", "shares")}
        draft = load(located(args.draft, progress), progress=progress, **options)
    return llama.new_drafter(draft)


class _Remarks(logging.Handler):
    """What the library logs, as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


REMARKS = _Remarks(logging.WARNING)


def located(
    model: str, progress: Callable[[str, int, int], None], find: Callable[..., Path] = locate
) -> Path:
    """The file or folder of a model. A note names the GGUF that was chosen where no quantization is given."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its remarks on tokens and repeats
    path = find(model, progress)
    address = on_the_hub(model)
    if address and ":" not in address.removeprefix(PREFIX) and path.is_file():
        note(f"{model} is {path.name}" + ("" if address == model else f" of {address}"))
    return path


def load_model(args: argparse.Namespace) -> Llama:
    if args.backend == "numpy" and args.threads is not None:
        note("-t sets the threads of the C kernels; NumPy's own are set by OPENBLAS_NUM_THREADS")
    with transfer_bar() as progress:
        names = [
            "backend",
            "threads",
            "exact",
            "max_seq_len",
            "activation_bits",
            "cache_dtype",
            "adapter",
            "shares",
        ]
        options = {name: getattr(args, name) for name in names}
        llama = load(located(args.model, progress), progress=progress, **options)
    ids, rows = llama.tokenizer.n_used, llama.model.args.vocab_size
    if rows - ids >= PADDING:
        note(f"the tokenizer has {ids} ids, the embedding {rows} rows: is it the tokenizer of this model?")
    return llama


def text_ids(llama: Llama, text: str) -> list[int]:
    """The ids of a text for one pass that records intermediates. ParameterError: no ids, or too many."""
    note_names(llama.tokenizer, text)
    ids = llama.tokenizer.encode(without_mark(text, "the text"), bos=llama.tokenizer.add_bos)
    if not ids:
        raise ParameterError("the text has no tokens, wanted 1 or more: give a text that is not empty")
    if len(ids) > llama.max_context:
        raise ParameterError(
            f"the text has {len(ids)} tokens, the context has room for {llama.max_context}: "
            "give a shorter text, or a larger --max-seq-len if model and memory allow it"
        )
    if len(ids) > MOST_TOKENS:
        raise ParameterError(
            f"the text has {len(ids)} tokens, at most {MOST_TOKENS} are recorded: give a shorter text"
        )
    return ids


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which appears under its name only when it is complete."""
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
    """`data` as text; TextError if it is not UTF-8 or has a zero byte. `source` is its name, for messages."""
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
    """`text` without a byte order mark at its start, which names an encoding and is not text."""
    if text.startswith("\ufeff"):
        note(f"{source} begins with a byte order mark, which is left out")
    return text.removeprefix("\ufeff")


def note_names(tokenizer: Tokenizer, text: str, special: bool | None = None) -> None:
    """Print a note if `text` has the name of a control token, which is read as plain text.

    `special` is the option --parse-special; None if the command does not have it.
    """
    found = None if special else tokenizer.control_names.search(text)
    if found:
        way = "; --parse-special reads it as the token" if special is False else ""
        note(
            f"the text has {escape(found[0])}, a control token's name, and it is read as plain text{way}; "
            "`chat` writes the model's own format"
        )


class Terminal(io.TextIOWrapper):
    """Standard output on a terminal, where control characters from a model or a file are escaped.

    `plain` is the stream below it, for colours of the commands.
    """

    def __init__(self, plain: io.TextIOWrapper):
        self.plain = plain
        super().__init__(plain.buffer, plain.encoding, plain.errors, line_buffering=True)

    def write(self, text: str) -> int:
        super().write(visible(text))
        return len(text)


def await_ctrl_c() -> None:
    """The next Ctrl-C raises KeyboardInterrupt. One more ends the program at once, even during cleanup."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the system's handler does not wait for Python
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)


def note(text: str) -> None:
    """Print a note for a person on stderr. If stderr cannot be written to, the work continues."""
    with suppress(OSError):
        print(f"numpy-llama: {printable(text)}", file=sys.stderr, flush=True)


def written(stream: Iterable[Piece]) -> Generator[Piece, None, None]:
    """Print the text of a stream as it arrives, and yield its pieces. The last line always gets its end."""
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


def show(stream: Iterable[Piece]) -> Completion:
    """Print a generation as it arrives. If stderr is a terminal, its speed is printed there."""
    completion = finish(written(stream))
    if sys.stderr.isatty():
        print_speed(completion)
    return completion


def print_speed(completion: Completion) -> None:
    drafts = completion.drafts
    print(
        f"[prompt: {len(completion.prompt_tokens)} tokens in {completion.prefill_seconds:.2f} s; "
        f"answer: {len(completion.tokens)} tokens, {completion.decode_tokens_per_second:.1f} a second; "
        + (f"{drafts.accepted} of {drafts.drafted} drafted tokens accepted; " if drafts else "")
        + f"ended by {completion.finish_reason}]",
        file=sys.stderr,
    )


def collect(stream: Iterable[Piece], into: list[str]) -> Iterator[Piece]:
    """Yield the pieces of a stream, and append their texts to `into`: an interrupted answer is kept."""
    for piece in stream:
        into.append(piece.text)
        yield piece


def run_stream(
    stream: Iterable[Piece], as_json: bool, tokenizer: Tokenizer, beams: Iterable[Completion] = ()
) -> Completion:
    """Print one generation, as text or as JSON. `beams`: all those that a beam search has found."""
    if not as_json:
        return show(stream)
    completion = finish(stream)
    print(completion_json(completion, tokenizer, beams))
    return completion


def note_cut(completion: Completion, options: Mapping[str, Any]) -> None:
    """Print a note if a text that follows a grammar was cut."""
    if completion.finish_reason == "length" and {"json_schema", "regex", "grammar"} & {*options}:
        n = len(completion.tokens)
        note(
            f"the text was cut after {n} tokens, it may be incomplete: a larger --max-tokens leaves more room"
        )


def results_json(results: Any) -> str:
    """Results as JSON. JSON has no NaN and no infinity: null takes their place."""
    return json.dumps(_finite(results), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def completion_json(completion: Completion, tokenizer: Tokenizer, beams: Iterable[Completion] = ()) -> str:
    """One completion, and all those of a beam search."""
    found = completion.logprobs
    logprobs = {} if found is None else {"logprobs": logprobs_json(completion.tokens, found, tokenizer)}
    shown_of_each = "score", "text", "tokens", "finish_reason"
    all_beams = [{name: getattr(beam, name) for name in shown_of_each} for beam in beams]
    shown = json.dumps(
        {
            "text": completion.text,
            "tokens": completion.tokens,
            "prompt_tokens": completion.prompt_tokens,
            "finish_reason": completion.finish_reason,
            **logprobs,
            **({"beams": all_beams} if all_beams else {}),
            "timings": {
                "prefill_seconds": round(completion.prefill_seconds, 6),
                "decode_seconds": round(completion.decode_seconds, 6),
                "prefill_tokens_per_second": round(
                    len(completion.prompt_tokens) / completion.prefill_seconds, 3
                ),
                "decode_tokens_per_second": round(completion.decode_tokens_per_second, 3),
            },
            **({} if completion.drafts is None else {"drafts": vars(completion.drafts)}),
        },
        ensure_ascii=sys.stdout.encoding.lower() not in ("utf-8", "utf8"),
    )
    return visible(shown, "\\u{:04x}") if sys.stdout.isatty() else shown


def logprobs_json(
    tokens: Iterable[int], logprobs: Iterable[Logprobs], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """The log probabilities of the new tokens in the form of OpenAI's API, with the ids too."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        piece, data = tokenizer.piece(token), [*tokenizer.token_bytes(token)]
        return {"id": token, "token": piece, "bytes": data, "logprob": round(logprob, 6)}

    return [
        entry(token, chosen) | {"top_logprobs": [entry(*one) for one in top]}
        for token, (chosen, top) in zip(tokens, logprobs, strict=True)
    ]


class _Bar:
    """A progress bar on stderr if that is a terminal. `show` starts it, and `close` removes it.

    While it is shown, what is printed would go to stderr too: so `close` it before.
    """

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
            self.bar.remove_task(self.task)
            self.task = None


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
    """A bar for a long prompt: on_prefill(done, total). It is removed before the first new token."""
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
    """A bar that counts windows of a text, or steps: progress(what, done, total)."""
    bar = _Bar(TextColumn("{task.completed}/{task.total} " + unit))
    try:
        yield bar.show
    finally:
        bar.close()


@contextmanager
def step_bar() -> Iterator[_Bar]:
    """A bar that counts steps of a training. It is closed for each line that is printed."""
    bar = _Bar(TextColumn("{task.completed}/{task.total} steps"))
    try:
        yield bar
    finally:
        bar.close()

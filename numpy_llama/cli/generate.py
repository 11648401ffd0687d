"""Continue a text.

The text is the argument TEXT, or else standard input. The command prints the text that the model adds.
The names of control tokens in a text are plain text, unless --parse-special is given. To ask a question, use
`chat`, which writes the model's own format.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ParameterError
from ..generation.beam import BeamSearch, check_no_chance
from ..generation.session import Session
from ..generation.transcript import Piece
from ..llama import Llama
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", metavar="TEXT", help="the text to continue [standard input]")
    parser.add_argument(
        "--prompt-ids", type=ids, metavar="1,403,407", help="the ids to continue, instead of a text"
    )
    common.add_special_argument(parser)
    parser.add_argument(
        "--session",
        type=common.path,
        metavar="FILE",
        help="begin with the keys and values in FILE, as far as the texts are alike, and write it at the end",
    )
    common.add_model_arguments(parser)
    common.add_sampling_arguments(parser, max_tokens=128)
    group = parser.add_argument_group("beam search")
    group.add_argument(
        "--beams",
        type=common.whole_number(1),
        metavar="B",
        help="search for the likeliest text with B beams; --json prints all B with their scores",
    )
    group.add_argument(
        "--length-penalty",
        type=float,
        metavar="P",
        help="divide the score of a text of n tokens by n^P: a higher P favors longer texts [1]",
    )


def ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers with commas") from None


def beam_options(args: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any] | None:
    """The options of a beam search, checked before any model is loaded; None if there is none."""
    if args.beams is None:
        if args.length_penalty is not None:
            raise ParameterError("--length-penalty is for a beam search: add --beams 4")
        return None
    for name in ("session", "top_logprobs", "lookup", "draft", "json_schema", "regex", "grammar"):
        given = getattr(args, name)
        if given is not None and given is not False:  # --top-logprobs 0 is given
            option = name.replace("_", "-")
            raise ParameterError(f"--{option} has no place in a beam search: leave out one of the two")
    check_no_chance(options.get("temperature", 0), options.get("seed"))
    penalty = 1.0 if args.length_penalty is None else args.length_penalty
    BeamSearch(args.beams, penalty)
    shown = args.beams if args.json else 1
    return {"beams": args.beams, "length_penalty": penalty, "num_return_sequences": shown}


def run(args: argparse.Namespace) -> None:
    options = common.generation_options(args)
    common.note_filters(options)
    prompt = args.prompt_ids if args.prompt_ids is not None else args.prompt
    if args.prompt_ids is not None and args.prompt is not None:
        raise ParameterError("give a text or --prompt-ids, not both")
    if prompt is None:
        if sys.stdin.isatty():
            raise ParameterError('nothing to continue: numpy-llama generate "Once upon a time"')
        if not (prompt := common.read_stdin()):  # a model with BOS would begin a text of its own
            raise ParameterError("nothing to continue: the prompt is empty")
    elif isinstance(prompt, str):
        prompt = common.without_mark(prompt, "the text")
    search = beam_options(args, options)
    llama = common.load_model(args)
    if isinstance(prompt, str):
        common.note_names(llama.tokenizer, prompt, args.special)
        options["special"] = args.special
    if search is not None:
        del options["top_logprobs"]
        with common.prefill_bar() as on_prefill:
            found = llama.beam_search(prompt, on_prefill=on_prefill, **search, **options)
        common.run_stream([Piece(found[0].text, None, found[0])], args.json, llama.tokenizer, found)
        return
    options["draft"] = common.drafter(args, llama)
    with saved_session(llama, args.session) as session, common.prefill_bar() as on_prefill:
        stream = llama.stream(prompt, session=session, on_prefill=on_prefill, **options)
        completion = common.run_stream(stream, args.json, llama.tokenizer)
    common.note_cut(completion, options)


@contextmanager
def saved_session(llama: Llama, path: Path | None) -> Iterator[Session | None]:
    """The session in a file, or a new one, which is written at the end. None without a path."""
    if path is None:
        yield None
        return
    is_new = not path.exists()
    session = llama.new_session() if is_new else llama.load_session(path)
    if is_new:
        llama.save_session(session, path)  # because a path that cannot be written is an error now
    try:
        yield session
    except BaseException:
        if is_new:
            path.unlink(missing_ok=True)
        raise
    llama.save_session(session, path)

"""Continue a text.

The text is the argument TEXT, or else standard input. The command prints the text that the model adds.
The names of control tokens in a text are plain text, unless --parse-special is given. To ask a question, use
`chat`, which writes the model's own format.
"""

import argparse
import sys
from pathlib import Path

from ..errors import ParameterError
from ..generation.session import Session
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


def ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers with commas") from None


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
    llama = common.load_model(args)
    if isinstance(prompt, str):
        common.note_names(llama.tokenizer, prompt, args.special)
        options["special"] = args.special
    if args.session is not None:
        options["session"] = saved_session(llama, args.session)
    options["draft"] = common.drafter(args, llama)
    with common.prefill_bar() as on_prefill:
        stream = llama.stream(prompt, on_prefill=on_prefill, **options)
        common.run_stream(stream, args.json, llama.tokenizer)
    if args.session is not None:
        llama.save_session(options["session"], args.session)


def saved_session(llama: Llama, path: Path) -> Session:
    """The session in a file, or a new one. Then it is saved at once, because a bad path is an error now."""
    if path.exists():
        return llama.load_session(path)
    session = llama.new_session()
    llama.save_session(session, path)
    return session

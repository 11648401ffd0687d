"""Continue a text.

The text is the argument TEXT, or else standard input. The command prints the text that the model adds.
The names of control tokens in a text are plain text, unless --special is given. To ask a question, use
`chat`, which writes the model's own format.
"""

import argparse
import sys

from ..errors import ParameterError
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", metavar="TEXT", help="the text to continue [standard input]")
    parser.add_argument(
        "--prompt-ids", type=ids, metavar="1,403,407", help="the ids to continue, instead of a text"
    )
    common.add_special_argument(parser)
    common.add_model_arguments(parser)
    common.add_sampling_arguments(parser, max_tokens=128)


def ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers with commas") from None


def run(args: argparse.Namespace) -> None:
    options = common.generation_options(args)
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
    with common.prefill_bar() as on_prefill:
        stream = llama.stream(prompt, on_prefill=on_prefill, **options)
        common.run_stream(stream, args.json, llama.tokenizer)

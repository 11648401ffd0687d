"""Show the token ids of a text, and the piece of the text for each id.

Of hf:OWNER/REPO only the files of the tokenizer are fetched. A GGUF holds its tokenizer, and is fetched as a
whole.
"""

import argparse
import sys
from functools import partial

from ..checkpoint.download import DEFAULT_MODEL, locate
from ..errors import ParameterError
from ..llama import load_tokenizer
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", metavar="TEXT", help="the text to tokenize [standard input]")
    common.add_special_argument(parser)
    parser.add_argument(
        "-m",
        "--model",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help="a model, a tokenizer file, hf:OWNER/REPO, or a name that `pull` lists [%(default)s]",
    )


def run(args: argparse.Namespace) -> None:
    if args.text is None and sys.stdin.isatty():
        raise ParameterError('nothing to tokenize: numpy-llama tokenize "Once upon a time"')
    text = common.read_stdin() if args.text is None else common.without_mark(args.text, "the text")
    with common.transfer_bar() as progress:
        find = partial(locate, wanted="tokenizer")
        tokenizer = load_tokenizer(common.located(args.model, progress, find))
    common.note_names(tokenizer, text, args.special)
    for token in tokenizer.encode(text, bos=tokenizer.add_bos, special=args.special):
        whole = token in tokenizer.control_tokens.values() or _is_utf8(tokenizer.token_bytes(token))
        shown = tokenizer.piece(token) if whole else tokenizer.token_bytes(token)
        print(f"{token:>7}  {shown!r}")


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:  # half a character
        return False
    return True

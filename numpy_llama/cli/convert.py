"""Write a model as one file that maps straight into memory.

MODEL may be anything that can be run; OUT is a GGUF file in formats that the kernels use where they lie. It
appears under its name only when it is whole and has been read back.
"""

import argparse

from ..checkpoint import open_checkpoint
from ..checkpoint.convert import DTYPES, convert
from ..checkpoint.download import locate
from ..checkpoint.memory import gib
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a file, a folder or a name")
    parser.add_argument("out", metavar="OUT", type=common.path, help="the file to write, or to replace")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), required=True, help="how the weights are stored: 8 and 4 are bits"
    )
    parser.add_argument(
        "-t", "--threads", type=common.whole_number(1), metavar="N", help="threads to use [all CPUs]"
    )


def run(args: argparse.Namespace) -> None:
    with common.transfer_bar() as progress:
        source = open_checkpoint(locate(args.model, progress))
        out = convert(source, args.out, args.dtype, args.threads, progress)
    common.note(f"{out}: {gib(out.stat().st_size)}, {args.dtype}")

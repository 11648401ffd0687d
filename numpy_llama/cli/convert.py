"""Write a model to one GGUF file, which loads without conversion.

MODEL is any model that numpy-llama runs. The C kernels use the weights of OUT directly from the file. OUT is
replaced only when the new file is complete and has been read back. Weights that are quantized already keep
their formats if --dtype is left out. With --packed the weights lie as the kernels read them: loading copies
nothing, but other programs cannot read the file.
"""

import argparse

from ..checkpoint import open_checkpoint
from ..checkpoint.convert import DTYPES, convert
from ..checkpoint.memory import gib
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a file, a folder, hf:OWNER/REPO, or a name that `pull` lists"
    )
    parser.add_argument("out", metavar="OUT", type=common.path, help="the file to write or replace")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        help="the format of the weights: q8 has 8 bits, q4 has 4; it may be left out with --packed, and if "
        "the weights are quantized already",
    )
    parser.add_argument(
        "--packed",
        action="store_true",
        help="pack the rows of block formats; without --dtype every weight keeps its format",
    )
    parser.add_argument(
        "-t", "--threads", type=common.whole_number(1), metavar="N", help="threads to use [all CPUs]"
    )


def run(args: argparse.Namespace) -> None:
    with common.transfer_bar() as progress:
        source = open_checkpoint(common.located(args.model, progress))
        out = convert(source, args.out, args.dtype, args.threads, progress, args.packed)
    how = [args.dtype] * bool(args.dtype) + ["packed"] * args.packed or ["every weight in its format"]
    common.note(f"{out}: {gib(out.stat().st_size)}, {', '.join(how)}")

"""Merge a LoRA adapter into its base model, and write the result as a new model.

OUT is a GGUF file if its name ends in .gguf. If the base is a folder of Hugging Face, any other name is that
of a new folder of the same kind. Without --dtype every weight keeps the format of the base. The command
measures how much of each update is left after rounding. It writes nothing if rounding would erase one.
"""

import argparse
import statistics

from ..checkpoint import open_checkpoint
from ..checkpoint.adapters import read_adapters
from ..checkpoint.convert import DTYPES
from ..checkpoint.download import DEFAULT_MODEL
from ..checkpoint.merge import merge
from ..lora import by_weight
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        "--model",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help="the base: a file, a folder, hf:OWNER/REPO, or a name that `pull` lists [%(default)s]",
    )
    common.add_adapter_argument(parser, required=True)
    parser.add_argument("--out", required=True, metavar="OUT", type=common.path, help="the model to write")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="the format of all weights [each keeps its own]"
    )
    parser.add_argument(
        "-t", "--threads", type=common.whole_number(1), metavar="N", help="threads to use [all CPUs]"
    )


def run(args: argparse.Namespace) -> None:
    with common.transfer_bar() as progress:
        source = open_checkpoint(common.located(args.model, progress))
        updates = by_weight(read_adapters(args.adapter, source.args, source.weights(), progress))
        found = merge(source, updates, args.out, args.dtype, args.threads, progress)
    size, kept = statistics.median(one.update for one in found), min(one.kept for one in found)
    what = f"{len(found)} weights changed by {100 * size:.2g}% of their size"
    common.note(f"{args.out}: {what}; at least {min(kept, 1):.0%} of each update is left after rounding")

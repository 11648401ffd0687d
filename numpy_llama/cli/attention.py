"""Show the attention weights of one layer on a text, as a picture.

A row is a token whose query attends, and a column is a token that it attends to. A darker cell is a larger
weight. The picture is printed, or --out writes it to a file (pip install "numpy_llama[plot]").
"""

import argparse
import sys

from rich.console import Console
from rich.text import Text

from ..errors import ParameterError, printable
from ..inspect.tracing import attention_weights
from . import common

SHADES = " .:-=+*#%@"
PICTURES = (".svg", ".png", ".pdf")
MOST = 60  # tokens on a terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_text_argument(parser)
    parser.add_argument(
        "--layer", type=common.whole_number(0), metavar="N", help="the layer, from 0 on [the middle one]"
    )
    parser.add_argument(
        "--head", type=common.whole_number(0), metavar="N", help="the head, from 0 on [the mean of all]"
    )
    parser.add_argument("--out", type=common.path, metavar="FILE", help="write a .svg, .png or .pdf file")
    common.add_model_arguments(parser)


def run(args: argparse.Namespace) -> None:
    if args.out is not None and args.out.suffix not in PICTURES:
        raise ParameterError(f"--out is {str(args.out)!r}, it must end in {', '.join(PICTURES)}")
    llama = common.load_model(args)
    ids = common.text_ids(llama, args.text)
    n_layers = llama.model.args.n_layers
    layer = n_layers // 2 if args.layer is None else args.layer
    weights = attention_weights(llama.model, ids, layer, args.head)  # (T, T)
    labels = [printable(llama.tokenizer.piece(i)) for i in ids]
    title = f"layer {layer}, " + ("mean of all heads" if args.head is None else f"head {args.head}")
    if args.out is not None:
        from ..inspect.plots import attention_map  # matplotlib is an extra

        figure = attention_map(weights, labels, title)
        with common.new_file(args.out) as file:
            figure.savefig(file, format=args.out.suffix[1:])
        return
    if len(ids) > MOST:
        raise ParameterError(f"the text has {len(ids)} tokens, a terminal shows {MOST}: --out draws more")
    console = Console(file=getattr(sys.stdout, "plain", None), highlight=False)
    width = max(map(len, labels))
    print(title)
    for label, row in zip(labels, weights, strict=True):
        line = Text(f"{label:>{width}} ")
        for share in row:
            level = min(int(share * len(SHADES)), len(SHADES) - 1)
            line.append(2 * SHADES[level], f"on grey{100 - 10 * level}" if level else "")
        console.print(line, no_wrap=True, crop=False)

"""Show the next token as each layer predicts it: the logit lens (nostalgebraist 2020).

The last norm and the output run on the residual stream after each layer, as if no layer followed. The command
prints the likeliest next tokens after TEXT, with their probabilities.
"""

import argparse

import numpy as np

from ..inspect.tracing import lens
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_text_argument(parser)
    parser.add_argument(
        "-k", type=common.whole_number(1), default=4, metavar="K", help="tokens to print for each layer [4]"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    common.add_model_arguments(parser)


def run(args: argparse.Namespace) -> None:
    llama = common.load_model(args)
    probs = lens(llama.model, common.text_ids(llama, args.text))  # (n_layers + 1, V)
    likeliest = []
    for row in probs:
        best = np.argsort(-row, kind="stable")[: args.k]
        likeliest.append([(llama.tokenizer.piece(int(i)), float(row[i])) for i in best])
    if args.json:
        print(
            common.results_json([[{"text": text, "probability": p} for text, p in row] for row in likeliest])
        )
        return
    for layer, row in enumerate(likeliest):
        shown = "".join(f"{p:>7.1%} {text!r:<14.14}" for text, p in row)
        print(f"{'embedding' if layer == 0 else f'layer {layer - 1}':<9}{shown}".rstrip())

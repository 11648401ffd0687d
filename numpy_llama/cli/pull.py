"""Fetch a model by its name, check its sha256, and print its path in the cache folder."""

import argparse

from ..checkpoint.download import MODELS, pull
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help=f"one of: {', '.join(MODELS)}")


def run(args: argparse.Namespace) -> None:
    with common.transfer_bar() as progress:
        path = pull(args.name, progress)
    print(path)

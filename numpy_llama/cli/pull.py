"""Fetch a model by its name, check its checksum, and print its path in the cache.

NAME is one of the short list, or hf:OWNER/REPO for a model or an adapter of the Hugging Face Hub.
hf:OWNER/REPO:Q4_K_M or :FILE.gguf chooses one GGUF of it, and hf:OWNER/REPO@REVISION a branch, tag or commit.
Without NAME, the list is printed.
"""

import argparse

from ..checkpoint.download import MODELS, pull
from ..checkpoint.repositories import REPOSITORIES
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="a name of the list, or hf:OWNER/REPO [print the list]"
    )


def run(args: argparse.Namespace) -> None:
    if args.name is None:
        for name in MODELS:
            print(f"{name:<26} the default model")
        for name, repository in REPOSITORIES.items():
            print(f"{name:<26} hf:{repository}")
        return
    with common.transfer_bar() as progress:
        path = common.located(args.name, progress, pull)
    print(path)

"""The intermediates of a forward pass in their order: the name of each, its shape, and what it is.

By these names `trace` records them, and numpy_llama.edit replaces them in Python. The letters: B sequences,
T new tokens, S all positions, D dim, H heads, K key/value heads, Dh head_dim, F hidden_dim, V vocabulary.
"""

import argparse

from ..inspect.tracing import PLACES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> None:
    for name, (shape, meaning) in PLACES.items():
        print(f"{name:<30} ({', '.join(shape.split())})".ljust(46), meaning)

"""List the names of the intermediates of a forward pass, with their shapes and meanings.

`numpy-llama trace` records an intermediate by its name, and numpy_llama.edit replaces one in Python. The
letters: B sequences, T new tokens, S all positions, D dim, H query heads, K key/value heads, Dh head_dim,
F hidden_dim, V vocabulary.
"""

import argparse

from ..inspect.tracing import PLACES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> None:
    for name, (shape, meaning) in PLACES.items():
        print(f"{name:<30} ({', '.join(shape.split())})".ljust(46), meaning)

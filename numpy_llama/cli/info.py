"""What is in a model's file, and what it takes to run it; from the headers alone."""

import argparse
from collections import Counter

from ..checkpoint import open_checkpoint
from ..config import ModelArgs
from ..pull import DEFAULT_MODEL, locate
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help="a file or a name [%(default)s]"
    )


def run(args: argparse.Namespace) -> None:
    with common.transfer_bar() as progress:
        path = locate(args.model, progress)
    checkpoint = open_checkpoint(path)
    model_args = checkpoint.args
    tensors = checkpoint.tensors.values()
    count = Counter(t.type_name for t in tensors)
    size = Counter({name: sum(t.nbytes for t in tensors if t.type_name == name) for name in count})
    parameters = sum(_product(t.shape) for t in tensors)

    print(f"file             {path}")
    print(f"format           {checkpoint.format}, {path.stat().st_size:,} bytes")
    print(f"parameters       {parameters:,}")
    for name, nbytes in size.most_common():
        print(f"  {name:<14} {count[name]} tensors, {_mib(nbytes)}")
    for name in ModelArgs.__dataclass_fields__:
        print(f"{name:<16} {getattr(model_args, name)}")
    print(f"chat template    {'yes' if checkpoint.chat_format() else 'none'}")
    per_token = 2 * 4 * model_args.n_layers * model_args.n_kv_heads * model_args.head_dim
    print(
        f"KV cache         {_mib(1024 * per_token)} for 1,024 tokens, "
        f"{_mib(model_args.max_seq_len * per_token)} for all"
    )


def _product(shape: tuple[int, ...]) -> int:
    n = 1
    for length in shape:
        n *= length
    return n


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"

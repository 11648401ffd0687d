"""llama2.c's files: the .bin of Andrej Karpathy's run.c and runq.c, versions 0, 1 and 2.

    version 0   7 numbers i32; then the weights in float32, with two unused tables of angles among them.
                A negative vocab_size means that the output matrix is stored too
    version 1   256 bytes: magic "24ka", version i32, the 7 numbers, u8: 1 if the embedding is the output
                matrix too; then the weights in float32
    version 2   the same header with the group size i32 after that byte; then the norms in float32; then each
                other weight: int8 numbers, followed by a float32 scale for each group of them

The 7 numbers are dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len. All numbers are
little-endian. A kind of weight is stored for all layers, then the next kind. Rows are in Meta's order.

What this file promises: these numbers give exactly the file's size, which is checked before anything is used.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np

from ..backend.formats import FORMATS, StoredTensor
from ..config import ModelArgs
from ..errors import ConfigError, FormatError, NumpyLlamaError, TokenizerError, UnsupportedError
from ..text.tokenizer import Tokenizer
from .base import Checkpoint, TensorInfo
from .files import MappedFile
from .names import expected_shape
from .tokenizers import open_tokenizer

MAGIC = b"24ka"
NUMBERS = struct.Struct("<7i")
HEADER = struct.Struct("<4si7iBi")  # magic, version, 7 numbers, tied, group size
HEADER_BYTES = 256
# These two are literals in run.c, because the format has no field for them.
NORM_EPS, ROPE_THETA = 1e-5, 1e4

ATTENTION = ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
FEED_FORWARD = ("feed_forward.w_gate", "feed_forward.w_down", "feed_forward.w_up")
ANGLES = ("freqs_cos", "freqs_sin")  # [max_seq_len, head_dim / 2] each
ORDER_0 = (
    "tok_embeddings", "attention_norm", *ATTENTION, "ffn_norm", *FEED_FORWARD, "norm", *ANGLES, "output",
)  # fmt: skip
ORDER = ("attention_norm", "ffn_norm", "norm", "tok_embeddings", *ATTENTION, *FEED_FORWARD, "output")
ONCE = {"tok_embeddings", "norm", "output", *ANGLES}  # every layer has the others


@dataclass(frozen=True)
class Layout:
    """The header of a file, which determines all further bytes."""

    version: int
    args: ModelArgs
    tied: bool
    group: int  # weights that share a scale, in version 2
    start: int

    @classmethod
    def read(cls, head: bytes) -> "Layout":
        """The layout from the first 256 bytes, or fewer. Messages do not name the file."""
        head = head.ljust(HEADER_BYTES, b"\0")
        magic, version, *numbers, tied, group = HEADER.unpack_from(head)
        start = HEADER_BYTES
        if magic != MAGIC:
            version, numbers, start = 0, list(NUMBERS.unpack_from(head)), NUMBERS.size
            tied, numbers[5] = int(numbers[5] > 0), abs(numbers[5])
        elif version not in (1, 2):
            raise UnsupportedError(f"version {version} of llama2.c's format; this program reads 0, 1, 2")
        if tied > 1:
            raise FormatError(f"byte 36 is {tied}, it must be 1 (the embedding is the output too) or 0")
        if version == 2 and group < 1:
            raise FormatError(f"the group size at byte 37 is {group}, it must be 1 or more")
        dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = numbers
        if n_heads < 1 or dim % n_heads:
            raise ConfigError(f"dim {dim} cannot be divided among {n_heads} heads")
        args = ModelArgs(
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=dim // n_heads,
            hidden_dim=hidden_dim,
            vocab_size=vocab_size,
            norm_eps=NORM_EPS,
            rope_theta=ROPE_THETA,
            max_seq_len=max_seq_len,
        )
        return cls(version, args, bool(tied), group if version == 2 else 0, start)

    def tensors(self) -> Iterator[TensorInfo]:
        """All tensors in the order of the file. The format has no names, so the names are ours."""
        at = self.start
        for kind in ORDER if self.version else ORDER_0:
            if kind == "output" and self.tied:
                continue
            prefixes = [""] if kind in ONCE else [f"layers.{i}." for i in range(self.args.n_layers)]
            for prefix in prefixes:
                info = self._tensor(f"{prefix}{kind}", at)
                at += info.nbytes
                yield info

    def _tensor(self, name: str, at: int) -> TensorInfo:
        if name in ANGLES:
            shape: tuple[int, ...] = (self.args.max_seq_len, self.args.head_dim // 2)
        else:
            name += ".weight"
            shape = expected_shape(name, self.args)
        n = prod(shape)
        if not self.group or len(shape) == 1:
            return TensorInfo(name, "F32", shape, at, 4 * n)
        # Groups are cut from the whole matrix, so a group may contain the end of a row and the start of the
        # next.
        if n % self.group:
            raise FormatError(f"{name} has {n} weights, no multiple of the group size {self.group}")
        return TensorInfo(name, "Q8", shape, at, n + 4 * (n // self.group))


def looks_like_llama2c(head: bytes, size: int | None) -> bool:
    """Whether a file of `size` bytes that begins with `head` (256 bytes, or the whole file) is llama2.c's.

    Version 0 has no magic. A file is version 0 if its 7 numbers are possible and give exactly its size, or
    any size for None.
    """
    if head.startswith(MAGIC):
        return True
    try:
        *_, last = Layout.read(head).tensors()
    except NumpyLlamaError:
        return False
    return size is None or last.offset + last.nbytes == size


class Llama2cCheckpoint(Checkpoint):
    """A model in one .bin file, with its tokenizer in the same folder."""

    format = "llama2.c"

    def __init__(self, path: Path):
        self.path = Path(path)
        self.file = MappedFile(path, "a llama2.c model", NUMBERS.size)
        head = self.file.map[:HEADER_BYTES]
        self.file.checked_end(0, HEADER_BYTES if head.startswith(MAGIC) else NUMBERS.size, "the header")
        try:
            self.layout = Layout.read(head)
            self.tensors = {info.name: info for info in self.layout.tensors()}
        except NumpyLlamaError as error:
            raise type(error)(f"{path}: {error}") from None
        last = next(reversed(self.tensors.values()))
        end = self.file.checked_end(last.offset, last.nbytes, last.name)
        if end != self.file.size:
            raise FormatError(f"{path}: the weights end at byte {end}, the file has {self.file.size}")
        self.files = [self.file]

    @cached_property
    def args(self) -> ModelArgs:
        return self.layout.args

    def weights(self) -> dict[str, StoredTensor]:
        found = {name: self._stored(info) for name, info in self.tensors.items() if name not in ANGLES}
        return {"output.weight": found["tok_embeddings.weight"]} | found

    def _stored(self, info: TensorInfo) -> StoredTensor:
        """A float32 weight in place. An int8 weight is expanded at each use, as Q8_0 has float16 scales."""
        if info.type_name == "Q8":
            return StoredTensor(FORMATS["F32"], info.shape, lambda rows: self._dequantized(info, rows))
        return StoredTensor(
            FORMATS["F32"], info.shape, self.file.bytes_at(info.offset, info.nbytes, info.name)
        )

    def _dequantized(self, info: TensorInfo, rows: slice) -> np.ndarray:
        data = self.file.bytes_at(info.offset, info.nbytes, info.name)
        n = prod(info.shape)
        q, scales = data[:n].view(np.int8), data[n:].view("<f4")
        # The first exporter of version 2 put all scales at the end of the file, under the same number.
        if not (np.isfinite(scales) & (scales >= 0)).all():
            where = f"behind the int8 numbers of {info.name}, at byte {info.offset + n}"
            raise FormatError(f"{self.path}: {where}, are no scales; written by an early llama2.c?")
        weights = q.reshape(-1, self.layout.group) * scales[:, None]
        self.file.forget(info.offset, info.nbytes)
        return weights.reshape(-1, info.shape[-1])[rows].view(np.uint8)

    def tokenizer_path(self) -> Path:
        # llama2.c's own vocabularies have their size in their name; tokenizer.bin is Llama 2's.
        names = (f"tok{self.args.vocab_size}.bin", "tokenizer.bin", "tokenizer.model")
        for path in map(self.path.with_name, names):
            if path.exists():
                return path
        wanted = f"looked beside it for {', '.join(names)}"
        raise TokenizerError(f"{self.path}: a llama2.c model has no tokenizer in it; {wanted}")

    def read_tokenizer(self) -> Tokenizer:
        return open_tokenizer(self.tokenizer_path())

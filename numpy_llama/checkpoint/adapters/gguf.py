"""An adapter in a GGUF file, as llama.cpp's convert_lora_to_gguf.py writes it.

    general.type "adapter", general.architecture "llama", adapter.type "lora", adapter.lora.alpha f32
    blk.N.attn_q.weight.lora_a (r, IN)    blk.N.attn_q.weight.lora_b (OUT, r)
    token_embd.weight.lora_a (V, r)       token_embd.weight.lora_b (D, r)

The scale of a pair is alpha / r, with its own r; an alpha of 0 means a scale of 1. The rows of B have the
model's order.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...backend.formats import FORMATS, StoredTensor
from ...config import ModelArgs
from ...errors import FormatError, MismatchError, NumericsError, UnsupportedError, escape
from ...lora import LowRank
from ..files import sync, write_file
from ..gguf.file import GGUFFile
from ..gguf.write import layout, write_tensor
from ..names import our_names, tensor_names
from .base import Adapter, Pair, paired

PLAIN = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}


class GGUFAdapter(Adapter):
    """An adapter in GGUF."""

    format = "GGUF"

    def __init__(self, path: Path):
        self.path, self.file, self.copies = path, GGUFFile(path), {}
        for key, wanted in PLAIN.items():
            if (found := self.file.get(key, str)) != wanted:
                what = f"{key} is {escape(found, 60)}, a LoRA adapter of a LLaMA has {wanted!r}"
                raise (FormatError if key == "general.type" else UnsupportedError)(f"{path}: {what}")
        if "adapter.alora.invocation_tokens" in self.file.metadata:
            raise UnsupportedError(
                f"{path}: adapter.alora.invocation_tokens: an activated LoRA, which works only from "
                "a certain token on, is not run here"
            )
        alpha = self.file.get("adapter.lora.alpha", float, 0.0)
        if not np.isfinite(alpha):
            raise NumericsError(f"{path}: adapter.lora.alpha is {alpha}, it must be a finite number")
        self.base = self.file.get("general.base_model.0.name", str)
        halves: dict[str, tuple[str | None, str | None]] = {}
        for tensor in self.file.tensors:
            name = re.fullmatch(r"(.+)\.lora_([ab])", tensor)
            names = our_names(name[1], "gguf") if name else []
            if not name or not names or "norm" in names[0]:
                raise MismatchError(f"{path}: {escape(tensor)} is no .lora_a or .lora_b of a LLaMA's matrix")
            a, b = halves.get(names[0], (None, None))
            halves[names[0]] = (tensor, b) if name[2] == "a" else (a, tensor)
        matched = paired(self.file, halves, (".lora_a", ".lora_b"))
        self.pairs = {}
        for ours, (a, b) in matched.items():
            table = ours == "tok_embeddings.weight"
            rank = self.file.tensors[a].shape[1 if table else 0]
            self.pairs[ours] = Pair(a, b, alpha / rank if alpha else 1.0, flipped=table, transposed=table)


def write_gguf(path: Path, updates: Mapping[str, LowRank], args: ModelArgs) -> None:
    """Write the updates, by our names, as an adapter in GGUF; `path` is replaced when the file is whole.

    The file has one alpha. Where a pair's scale is not alpha / r, the difference is multiplied into its B.
    """
    scales = {name: one.scale * len(one.a) for name, one in updates.items()}
    alpha = float(str(np.float32(next(iter(scales.values())))))  # the number that a FLOAT32 holds
    theirs, tensors = tensor_names(args, "gguf"), dict[str, np.ndarray]()
    for name, (a, b, scale) in updates.items():
        factor = scales[name] / alpha if alpha else scale
        b = b if abs(factor - 1) < 1e-6 else np.float32(factor) * b
        a, b = (b, a.T) if name == "tok_embeddings.weight" else (a, b)
        tensors |= {f"{theirs[name]}.lora_a": a, f"{theirs[name]}.lora_b": b}
    f32 = FORMATS["F32"]
    plan = [(name, f32, x.shape) for name, x in tensors.items()]
    head, infos = layout(plan, PLAIN | {"adapter.lora.alpha": alpha})

    def write(part: Path) -> None:
        with part.open("xb") as file:
            file.write(head)
            for info, x in zip(infos, tensors.values(), strict=True):
                [*write_tensor(file, info, [StoredTensor.quantize(x, f32).data])]
            sync(file)

    write_file(path, infos[-1].offset + infos[-1].nbytes, write)

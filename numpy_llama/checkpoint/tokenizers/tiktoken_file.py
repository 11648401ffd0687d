"""Llama 3's tokenizer.model: tiktoken's ranks, a token in base64 and its rank on each line.

    IQ== 0
    Ig== 1

The rank is the number of the line, from 0, and the id is the rank. The control tokens are not in the file:
they have the next 256 ids, and the names that Meta published with Llama 3.1. Some of these ids are reserved
tokens in Llama 3. The pattern is Llama 3's.
"""

import base64
import binascii
from typing import Any

import numpy as np

from ...errors import ResourceLimitError, TokenizerError, escape
from ...text.bpe import MAX_MERGED_TEXT
from ...text.tokenizer import CONTROL, MAX_TOKENS, NORMAL, RANKS, spelled

N_CONTROL = 256
CONTROL_NAMES = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
)  # fmt: skip


def tiktoken_metadata(data: bytes, source: str) -> dict[str, Any]:
    """GGUF's form of tiktoken's ranks."""
    tokens = [spelled(token) for token in _tokens(data, source)]
    n = len(tokens)
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(3, N_CONTROL))
    tokens += [*CONTROL_NAMES, *reserved][:N_CONTROL]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([NORMAL] * n + [CONTROL] * N_CONTROL, np.int32),
        RANKS: True,
        "tokenizer.ggml.bos_token_id": n,
        "tokenizer.ggml.eos_token_id": n + 1,
        "tokenizer.ggml.add_bos_token": True,
    }


def _tokens(data: bytes, source: str) -> list[bytes]:
    lines = data.removesuffix(b"\n").split(b"\n", MAX_TOKENS)
    if len(lines) > MAX_TOKENS:
        raise ResourceLimitError(f"{source} has more than {MAX_TOKENS} lines")
    ranks: dict[bytes, int] = {}
    for rank, line in enumerate(lines):
        text, _, number = line.rstrip(b"\r").partition(b" ")
        try:
            token = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            token = b""
        if number != b"%d" % rank or not 0 < len(token) <= MAX_MERGED_TEXT or token in ranks:
            wanted = f"wanted a token in base64 that is not there yet, a space, {rank}"
            raise TokenizerError(f"{source}, line {rank + 1} is {escape(line, 60)}; {wanted}")
        ranks[token] = rank
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise TokenizerError(f"{source} has no token for byte 0x{missing[0]:02X}: some texts had no ids")
    return list(ranks)

"""llama2.c's tokenizer.bin: SentencePiece's pieces and scores only.

    i32 length of the longest token, then for each token f32 score, i32 length, UTF-8; little-endian

The file has a space for U+2581, and line feeds around "<s>" and "</s>". The first three tokens are <unk>,
<s> and </s>.
"""

import struct
from typing import Any

import numpy as np

from ...errors import ResourceLimitError, TokenizerError, TruncatedError, escape
from ...text.tokenizer import BYTE, CONTROL, MAX_TOKEN_TEXT, MAX_TOKENS, NORMAL, UNKNOWN

RECORD = struct.Struct("<fi")
FIRST = {b"<unk>": UNKNOWN, b"\n<s>\n": CONTROL, b"\n</s>\n": CONTROL}
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


def llama2c_metadata(data: bytes, source: str) -> dict[str, Any]:
    """GGUF's form of a tokenizer.bin."""
    tokens: list[str] = []
    scores, kinds, at = [], [], 4
    while at < len(data):
        start = at + RECORD.size
        score, length = RECORD.unpack_from(data, at) if start <= len(data) else (0.0, 0)
        at = start + length
        if not 0 <= length <= MAX_TOKEN_TEXT:
            raise TokenizerError(f"{source}: token {len(tokens)} at byte {start} has {length} bytes")
        if at > len(data):
            raise TruncatedError(f"{source}: token {len(tokens)} needs {at} bytes, the file has {len(data)}")
        if len(tokens) == MAX_TOKENS:
            raise ResourceLimitError(f"{source} has more than {MAX_TOKENS} tokens")
        text = data[start:at]
        if len(tokens) < 3 and text != list(FIRST)[len(tokens)]:
            wanted = escape(list(FIRST)[len(tokens)])
            raise TokenizerError(f"{source}: token {len(tokens)} is {escape(text, 60)}, it must be {wanted}")
        kind = FIRST[text] if len(tokens) < 3 else NORMAL
        try:
            token = (text.strip(b"\n") if kind == CONTROL else text).decode().replace(" ", "\u2581")
        except UnicodeDecodeError:
            what = f"token {len(tokens)} is {escape(text, 60)}, which is not UTF-8"
            raise TokenizerError(f"{source}: {what}") from None
        tokens.append(token)
        scores.append(score)
        kinds.append(BYTE if token in BYTES else kind)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }

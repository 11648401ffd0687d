"""SentencePiece's tokenizer.model: a protobuf message, ModelProto. LLaMA uses these fields.

    1 pieces, many           1 piece   2 score, float   3 type
    2 trainer_spec           3 model_type   24 treat_whitespace_as_suffix   46 bos_piece   47 eos_piece
    3 normalizer_spec        1 name   2 precompiled_charsmap   3 add_dummy_prefix
                             4 remove_extra_whitespaces   5 escape_whitespaces
    5 denormalizer_spec      2 precompiled_charsmap

What this file promises: plain Python reads the message. A setting that changes a text before BPE, or that
cuts it without BPE, is refused with its name.
"""

import struct
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np

from ...errors import ResourceLimitError, TokenizerError, UnsupportedError, escape
from ...text.tokenizer import CONTROL, MAX_TOKENS, NORMAL, USER_DEFINED

VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5  # wire types
MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}
# A field's number, the wire type that it must have, and its default.
PIECE = {1: (LENGTH, b""), 2: (FOUR_BYTES, 0.0), 3: (VARINT, NORMAL)}
TRAINER = {3: (VARINT, 1), 24: (VARINT, 0), 46: (LENGTH, b"<s>"), 47: (LENGTH, b"</s>")}
NORMALIZER = {1: (LENGTH, b""), 2: (LENGTH, b""), 3: (VARINT, 1), 4: (VARINT, 1), 5: (VARINT, 1)}


def sentencepiece_metadata(data: bytes, source: str) -> dict[str, Any]:
    """GGUF's form of a SentencePiece model of type BPE."""
    reader = _Protobuf(source)
    tokens: list[str] = []
    scores, kinds = [], []
    specs = {2: b"", 3: b"", 5: b""}
    for number, wire, value in reader.fields(data):
        if number == 1 or number in specs:
            if wire != LENGTH:
                reader.malformed(f"field {number} has wire type {wire}")
            if number != 1:
                specs[number] += value  # the parts of a message in two parts are joined
                continue
            piece = reader.message(value, PIECE)
            if len(tokens) == MAX_TOKENS:
                raise ResourceLimitError(f"{source} has more than {MAX_TOKENS} pieces")
            if not piece[1]:
                raise TokenizerError(f"{source}: piece {len(tokens)} is empty")
            tokens.append(reader.text(piece[1]))
            scores.append(piece[2])
            kinds.append(min(piece[3], 255))

    trainer, normalizer = reader.message(specs[2], TRAINER), reader.message(specs[3], NORMALIZER)
    if trainer[3] != 2:
        found = MODEL_TYPES.get(trainer[3], f"number {trainer[3]}")
        raise UnsupportedError(f"{source} is a SentencePiece model of type {found}; LLaMA's are BPE")
    name = escape(reader.text(normalizer[1]))
    if normalizer[2] or reader.message(specs[5], NORMALIZER)[2]:
        raise UnsupportedError(f"{source} changes texts by the normalizer {name}; LLaMA's is 'identity'")
    if trainer[24] or not normalizer[5]:
        what = "treat_whitespace_as_suffix" if trainer[24] else "escape_whitespaces = false"
        raise UnsupportedError(f"{source} has {what}, which no LLaMA has")
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": bool(normalizer[3]),
        "tokenizer.ggml.remove_extra_whitespaces": bool(normalizer[4]),
    }
    if symbols := [i for i, kind in enumerate(kinds) if kind == USER_DEFINED]:
        metadata["numpy_llama.tokenizer.symbols"] = np.array(symbols, np.int32)
    control = {text: i for i, text in enumerate(tokens) if kinds[i] == CONTROL}
    for key, number in (("bos", 46), ("eos", 47)):  # sentencepiece uses the names, not the ids
        if (i := control.get(reader.text(trainer[number]))) is not None:
            metadata[f"tokenizer.ggml.{key}_token_id"] = i
    return metadata


class _Protobuf:
    """The wire format: each field is a varint, number << 3 | wire type, and a value."""

    def __init__(self, source: str):
        self.source = source

    def malformed(self, what: str) -> NoReturn:
        raise TokenizerError(f"{self.source}: malformed protobuf: {what}")

    def text(self, data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.malformed(f"{escape(data, 60)} is not UTF-8")

    def message(self, data: bytes, known: dict[int, tuple[int, Any]]) -> dict[int, Any]:
        """The known fields of a message. The last value counts if a field has several."""
        found = {number: default for number, (_, default) in known.items()}
        for number, wire, value in self.fields(data):
            if number in known:
                if wire != known[number][0]:
                    self.malformed(f"field {number} has wire type {wire}, it must be {known[number][0]}")
                found[number] = struct.unpack("<f", value)[0] if wire == FOUR_BYTES else value
        return found

    def fields(self, data: bytes) -> Iterator[tuple[int, int, Any]]:
        """(number, wire type, value): an int for VARINT, bytes for the others."""
        at = 0
        while at < len(data):
            tag, at = self.varint(data, at)
            number, wire = tag >> 3, tag & 7
            if not 0 < number < 1 << 29:
                self.malformed(f"field number {number}")
            if wire == VARINT:
                value, at = self.varint(data, at)
                yield number, wire, value
                continue
            if wire == LENGTH:
                length, at = self.varint(data, at)
            elif wire in (EIGHT_BYTES, FOUR_BYTES):
                length = 8 if wire == EIGHT_BYTES else 4
            else:
                self.malformed(f"field {number} has wire type {wire}")
            if length > len(data) - at:
                self.malformed(f"field {number} has {length} bytes, {len(data) - at} are left")
            yield number, wire, data[at : at + length]
            at += length

    def varint(self, data: bytes, at: int) -> tuple[int, int]:
        """Seven bits a byte, lowest first, up to 64 bits -> the number, the position of the next byte."""
        number = 0
        for i in range(10):
            if at + i >= len(data):
                self.malformed("it ends within a number")
            number |= (data[at + i] & 0x7F) << 7 * i
            if data[at + i] < 0x80:
                if number >= 1 << 64:
                    break
                return number, at + i + 1
        self.malformed("a number of more than 64 bits")

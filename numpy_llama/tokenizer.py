"""Text to token ids and back: "Hello world" <-> [19556, 905].

LLaMA has had two families of vocabularies. GGUF calls them by the models that had them first:

    gpt2    byte-level BPE (Llama 3, SmolLM2): a pattern cuts the text into words, and in each word
            neighbouring byte strings are merged, lowest rank first. tiktoken does the merging.
    llama   SentencePiece BPE (LLaMA 1 and 2): the text is one stream in which U+2581 stands for the
            space; what has no piece is spelt in byte tokens. sentencepiece does all of it.

What this file promises: `encode` takes every text as ordinary text. It never returns a control token,
whatever the text says; those are placed by number, by code that means them. A vocabulary is checked
as a whole before any of it is used.
"""

import codecs
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import regex
import sentencepiece
import tiktoken

from .errors import (
    FormatError,
    MismatchError,
    NumpyLlamaError,
    ParameterError,
    TextError,
    TokenizerError,
    UnsupportedError,
    escape,
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token_type, SentencePiece's numbers
MAX_TOKEN_TEXT = 65_536  # characters
# Where a model ends its turn, by the text of the control token. A vocabulary may have several of them.
END_TOKENS = {
    "</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>",
    "<|eot|>", "<|eom|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>",
}  # fmt: skip

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Each digit alone, then GPT-2's pattern on what lies between: a digit is to it as the end of the text.
_SMOLLM = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = {  # by tokenizer.ggml.pre
    "gpt-2": _GPT2, "default": _GPT2, "smollm": _SMOLLM,
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3,
}  # fmt: skip

# GPT-2 writes a byte as one printable character: itself if it is printable, else the next from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = sorted({*range(256)} - {*_PRINTABLE})
# For str.translate. What is Latin-1 but not printable goes where .encode("latin-1") refuses it.
_BYTE_OF_CHAR = (
    dict.fromkeys(_OTHERS, 0xFFFF) | {c: c for c in _PRINTABLE} | {256 + i: b for i, b in enumerate(_OTHERS)}
)
_BYTE_TOKENS = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}


@dataclass(frozen=True, eq=False, repr=False)
class Tokenizer:
    """One vocabulary, whatever file it came from."""

    tokens: list[str]  # as the file spells them
    meanings: list[bytes]  # what each adds to a text
    control_tokens: dict[str, int]  # those that no text can produce: their names and ids
    encode_text: Callable[[str], list[int]]
    bos_id: int | None
    eos_ids: tuple[int, ...]  # all that end a turn, the file's own EOS first
    add_bos: bool  # a prompt begins with BOS
    add_space: bool  # SentencePiece puts a space before a text, and takes it away again

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of a text, on demand with BOS before and EOS behind. Half a surrogate pair: TextError."""
        before = () if self.bos_id is None else (self.bos_id,)
        if (bos and not before) or (eos and not self.eos_ids):
            raise ParameterError("BOS or EOS is asked for, but the vocabulary has no such token")
        return [*before[:bos], *self.encode_text(check_text(text)), *self.eos_ids[:eos]]

    def decode(self, ids: Iterable[int], start_of_text: bool = True) -> str:
        """The text of some ids. Control tokens say nothing, bytes that are no UTF-8 become U+FFFD.

        `start_of_text=False` where the ids continue a text: a leading space is then a real one.
        """
        stream = StreamDecoder(self, start_of_text)
        return "".join(map(stream.push, ids)) + stream.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text: it may be half a character; of a control token, nothing."""
        if isinstance(token_id, (int, np.integer)) and 0 <= token_id < len(self.tokens):
            return self.meanings[token_id]
        raise TokenizerError(f"token id {escape(token_id)} is no whole number in 0..{len(self.tokens) - 1}")

    def piece(self, token_id: int) -> str:
        """A token to look at: a control token by its name, half a character as \\xf0."""
        meaning, name = self.token_bytes(token_id), self.tokens[token_id]
        return name if name in self.control_tokens else meaning.decode("utf-8", "backslashreplace")


class StreamDecoder:
    """`decode`, token by token. `push` returns whole characters and keeps back what is none yet."""

    def __init__(self, tokenizer: Tokenizer, start_of_text: bool = True):
        self._tokenizer = tokenizer
        self._drop_space = start_of_text and tokenizer.add_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        data = self._tokenizer.token_bytes(token_id)
        if data and self._drop_space:
            data, self._drop_space = data.removeprefix(b" "), False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """The end: a character that is still incomplete becomes U+FFFD."""
        return self._utf8.decode(b"", final=True)


def check_text(text: str) -> str:
    """`text` itself, if it can be written in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}, half a surrogate pair"
        raise TextError(f"character {error.start} of the text is {half}") from None
    return text


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describe; `source` is the file's name, for messages."""
    read = _Reader(metadata, source)
    model = read.get("model", str)
    if model not in ("gpt2", "llama"):
        read.fail("model", f"is {escape(model)}, we know 'gpt2' and 'llama'", UnsupportedError)
    tokens, kinds, meanings = read.vocabulary(model)
    # The defaults below are ggml's.
    if model == "gpt2":
        pre = read.get("pre", str)
        if pre not in WORDS:
            read.fail("pre", f"is {escape(pre)}, we know {', '.join(WORDS)}", TokenizerError)
        add_bos, add_space = WORDS[pre] is _LLAMA3, False
        normal = {text: i for i, text in enumerate(tokens) if kinds[i] == NORMAL}
        encode_text = _byte_level(source, normal, meanings, read.get("merges", list), WORDS[pre])
    else:
        add_bos, add_space = True, read.get("add_space_prefix", bool, True)
        encode_text = _sentencepiece(source, tokens, kinds, read.column("scores", np.float32), add_space)
    usual = {"bos": 1, "eos": 2} if model == "llama" else {}
    bos, *ends, _ = (read.token_id(name, usual.get(name)) for name in ("bos", "eos", "eot", "eom", "unknown"))
    add_bos = read.get("add_bos_token", bool, add_bos) and bos is not None
    control = {text: i for i, text in enumerate(tokens) if kinds[i] in (CONTROL, UNKNOWN)}
    ends += [control.get(text) for text in sorted(END_TOKENS)]
    eos_ids = tuple(dict.fromkeys(i for i in ends if i is not None))
    return Tokenizer(tokens, meanings, control, encode_text, bos, eos_ids, add_bos, add_space)


class _Reader:
    """The entries tokenizer.ggml.* of a file, each checked to be what it must be."""

    def __init__(self, metadata: Mapping[str, Any], source: str):
        self.metadata, self.source = metadata, source
        self.tokens: list[str] = self.get("tokens", list)

    def fail(self, name: str, what: str, error: type[NumpyLlamaError] = FormatError) -> NoReturn:
        raise error(f"{self.source}: tokenizer.ggml.{name} {what}")

    def get(self, name: str, kind: type, default: Any = ...) -> Any:
        value = self.metadata.get(f"tokenizer.ggml.{name}", default)
        found = value.dtype.type if isinstance(value, np.ndarray) else type(value)
        if value is ...:
            self.fail(name, "is missing", TokenizerError)
        if found is not kind and value is not default:
            what = escape(value) if isinstance(value, (str, int, float)) else "an array"
            self.fail(name, f"is {what} ({found.__name__}), it must be {kind.__name__}")
        return value

    def column(self, name: str, kind: type) -> np.ndarray:
        """An array with one entry for each token."""
        value, n = self.get(name, kind), len(self.tokens)
        if len(value) != n:
            self.fail(name, f"has {len(value)} entries, the vocabulary has {n} tokens", MismatchError)
        return value

    def token_id(self, name: str, default: int | None) -> int | None:
        token_id, n = self.get(f"{name}_token_id", int, default), len(self.tokens)
        if token_id is not None and not 0 <= token_id < n:
            self.fail(f"{name}_token_id", f"is {token_id}, the vocabulary has {n} tokens", MismatchError)
        return token_id

    def vocabulary(self, model: str) -> tuple[list[str], list[int], list[bytes]]:
        """The tokens, their types, and their meanings."""
        tokens, kinds, meanings = self.tokens, self.column("token_type", np.int32).tolist(), []
        ids = {text: i for i, text in enumerate(tokens)}
        for i, (text, kind) in enumerate(zip(tokens, kinds, strict=True)):
            # Old converters called added control tokens USER_DEFINED, and those a text may spell.
            if kind == USER_DEFINED and (text in END_TOKENS or re.fullmatch(r"<\|.*\|>", text)):
                kind = kinds[i] = CONTROL
            try:
                meanings.append(_meaning(text, kind, model))
                fault = "" if ids[text] == i else f"and so is tokens[{ids[text]}]"
            except (ValueError, KeyError):
                fault = f"which no {model} token of type {kind} can be"
            if fault:
                self.fail(f"tokens[{i}]", f"is {escape(text)}, {fault}", TokenizerError)
        return tokens, kinds, meanings


def _meaning(text: str, kind: int, model: str) -> bytes:
    if not (0 < len(text) <= MAX_TOKEN_TEXT and NORMAL <= kind <= BYTE):
        raise ValueError
    if kind == NORMAL and model == "gpt2":
        return text.translate(_BYTE_OF_CHAR).encode("latin-1")
    if kind in (CONTROL, UNKNOWN):
        return b""
    if kind == BYTE:
        return _BYTE_TOKENS[text]
    return (text.replace("\u2581", " ") if model == "llama" else text).encode()


def _byte_level(
    source: str, ids: dict[str, int], meanings: list[bytes], merges: list[str], pattern: str
) -> Callable[[str], list[int]]:
    singles = {meanings[i]: i for i in ids.values() if len(meanings[i]) == 1}
    # Real vocabularies lack bytes: SmolLM2 has neither 0x04 nor 0xF1. Hugging Face's BPE goes on as if such
    # a byte were not there, and so do we. A vocabulary without some letter is another matter.
    missing = bytes(b for b in range(256) if bytes([b]) not in singles)
    if lost := bytes(b for b in missing if b in b"\t\n" or 0x20 <= b < 0x7F):
        raise TokenizerError(f"{source}: the vocabulary is too small, it has no token for {escape(lost)}")

    # tiktoken merges the pair whose union has the lowest rank: a union's first place among the merges.
    by_rank = dict.fromkeys(singles.values())
    for i, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            wanted = "it must be two tokens that make a third"
            raise TokenizerError(f"{source}: tokenizer.ggml.merges[{i}] is {escape(merge)}, {wanted}")
        by_rank[ids[left + right]] = None
    id_of_rank = list(by_rank)
    ranks = {meanings[i]: rank for rank, i in enumerate(id_of_rank)}

    # We cut the text into words and tiktoken merges: its own cutting aborts on long runs of spaces.
    words = regex.compile(pattern)
    merger = tiktoken.Encoding(source, pat_str=".", mergeable_ranks=ranks, special_tokens={})

    def encode_text(text: str) -> list[int]:
        out: list[int] = []
        for word in words.findall(text):
            if data := word.encode().translate(None, missing):
                out += [id_of_rank[rank] for rank in merger._encode_single_piece(data)]
        return out

    return encode_text


def _sentencepiece(
    source: str, tokens: list[str], kinds: list[int], scores: np.ndarray, add_space: bool
) -> Callable[[str], list[int]]:
    """sentencepiece takes a vocabulary only as its ModelProto: pieces, trainer_spec, normalizer_spec."""
    if kinds.count(UNKNOWN) != 1 or kinds.count(BYTE) != 256:
        found = f"{kinds.count(UNKNOWN)} UNKNOWN and {kinds.count(BYTE)} BYTE tokens"
        raise TokenizerError(f"{source}: the vocabulary has {found}, it must have 1 and 256")
    if len(bad := np.flatnonzero(~np.isfinite(scores))):
        raise TokenizerError(f"{source}: tokenizer.ggml.scores[{bad[0]}] is {scores[bad[0]]}, not finite")
    columns = zip(tokens, scores.tolist(), kinds, strict=True)
    pieces = ((1, _message((1, text.encode()), (2, score), (3, kind))) for text, score, kind in columns)
    trainer = _message((3, 2), (35, 1), (40, kinds.index(UNKNOWN)))  # model_type BPE, byte_fallback, unk_id
    # add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    normalizer = _message((1, b"identity"), (3, int(add_space)), (4, 0), (5, 1))
    model = _message(*pieces, (2, trainer), (3, normalizer))
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model).encode
    except (RuntimeError, ValueError) as error:
        raise TokenizerError(f"{source}: sentencepiece refuses the vocabulary: {escape(error)}") from None


def _message(*fields: tuple[int, int | float | bytes]) -> bytes:
    """A protobuf message: each field is number << 3 | wire type, then its value."""
    out = bytearray()
    for number, value in fields:
        if isinstance(value, bytes):
            out += _varint(number << 3 | 2) + _varint(len(value)) + value
        elif isinstance(value, float):
            out += _varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            out += _varint(number << 3) + _varint(value)
    return bytes(out)


def _varint(n: int) -> bytes:
    # Seven bits a byte, lowest first; a set top bit says that more follow.
    return bytes([n]) if n < 0x80 else bytes([n & 0x7F | 0x80]) + _varint(n >> 7)

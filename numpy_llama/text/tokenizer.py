"""Text to token ids and back: "Hello world" <-> [19556, 905].

LLaMA has two families of vocabularies. GGUF names each by the model that had it first:

    gpt2    byte-level BPE (Llama 3, SmolLM2): a pattern cuts the text into words, and in each word
            neighbouring byte strings are merged, lowest rank first. tiktoken does the merging.
    llama   SentencePiece BPE (LLaMA 1 and 2): the text is one stream in which U+2581 stands for the
            space; a character without a piece is spelt in byte tokens. sentencepiece does all of it.

What this file promises: `encode` reads every text as ordinary text. No text makes a control token, unless the
caller asks for `special`; programs place control tokens by their ids. A vocabulary is checked as a whole
before it is used. The vocabulary of every file is first brought into GGUF's form, the entries
tokenizer.ggml.*. A `Tokenizer` keeps these entries: written into a GGUF file, they give the same tokenizer.
"""

import codecs
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import regex
import sentencepiece
import tiktoken

from ..errors import (
    FormatError,
    MismatchError,
    NumpyLlamaError,
    ParameterError,
    ResourceLimitError,
    TextError,
    TokenizerError,
    UnsupportedError,
    check_flag,
    check_iterable,
    check_kind,
    escape,
    is_whole,
)
from .added import AddedTokens, Parts, names_pattern, unchanged
from .bpe import in_chunks, order_of_merging
from .pretokenizer import CUSTOM, LLAMA3, WORDS, custom_words, of_older_unicode

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token_type, SentencePiece's numbers
MAX_TOKENS = 1 << 20
MAX_TOKEN_TEXT = 65_536  # characters
PADDING = 1024  # an embedding that was only padded has fewer rows than this without a token
MAX_MATCHED = 4096  # added tokens that `encode` searches a text for
# The control tokens with which a model ends its turn, by their text. A vocabulary may have several of them.
END_TOKENS = {
    "</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>",
    "<|eot|>", "<|eom|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>",
}  # fmt: skip

# The special tokens in Hugging Face's files, and in GGUF's entries NAME_token_id.
NAMED_TOKENS = {
    "bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "cls": "cls",
    "mask": "mask",
}  # fmt: skip
RANKS = "numpy_llama.tokenizer.ranks"  # true: no merges; the normal tokens are in tiktoken's order

# GPT-2 writes a byte as one printable character: itself if it is printable, else the next from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = sorted({*range(256)} - {*_PRINTABLE})
# For str.translate. A character of Latin-1 that is not printable becomes U+FFFF, which .encode refuses.
_BYTE_OF_CHAR = (
    dict.fromkeys(_OTHERS, 0xFFFF) | {c: c for c in _PRINTABLE} | {256 + i: b for i, b in enumerate(_OTHERS)}
)
_CHAR_OF_BYTE = {c: c for c in _PRINTABLE} | {b: 256 + i for i, b in enumerate(_OTHERS)}
_BYTE_TOKENS = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}


@dataclass(frozen=True, eq=False, repr=False)
class Tokenizer:
    """The vocabulary of one model, from any kind of file."""

    tokens: list[str]  # as the file spells them
    meanings: list[bytes]  # the bytes that each adds to a text
    control_tokens: dict[str, int]  # name -> id; no ordinary text makes one of these
    added: AddedTokens  # the tokens that a text is cut at
    encode_part: Callable[[str, bool], list[int]]  # of a text between these; true: it begins the text
    bos_id: int | None
    eos_ids: tuple[int, ...]  # the tokens that end a turn, the file's own EOS first
    add_bos: bool  # a prompt begins with BOS
    add_space: bool  # SentencePiece: `encode` adds a space before a text, `decode` removes it
    entries: dict[str, Any] = field(default_factory=dict)  # the entries of GGUF that it was built from
    source: str = "the vocabulary"  # the file's name, for messages

    def __reduce__(self) -> tuple[Callable[..., "Tokenizer"], tuple[dict[str, Any], str]]:
        return tokenizer_from_gguf, (self.entries, self.source)

    def __copy__(self) -> "Tokenizer":  # a tokenizer never changes
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tokenizer":
        return self

    @property
    def metadata(self) -> dict[str, Any]:
        """The entries of a GGUF file that gives this tokenizer again: `entries`, with merges for ranks."""
        if RANKS not in self.entries:
            return self.entries
        normal = zip(self.tokens, self.entries["tokenizer.ggml.token_type"].tolist(), strict=True)
        known = {text for text, kind in normal if kind == NORMAL}
        merges = [
            f"{text[:i]} {text[i:]}"
            for text in filter(known.__contains__, self.tokens)
            for i in range(1, len(text))
            if text[:i] in known and text[i:] in known
        ]
        return {key: self.entries[key] for key in self.entries if key != RANKS} | {
            "tokenizer.ggml.merges": merges
        }

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    @property
    def n_used(self) -> int:
        """The number of ids up to the last one in use. Later ids only fill the rows of an embedding."""
        used = np.flatnonzero(self.entries["tokenizer.ggml.token_type"] != UNUSED)
        return int(used[-1]) + 1 if len(used) else 0

    def check_rows(self, rows: int) -> None:
        """MismatchError unless an embedding of `rows` rows fits this tokenizer.

        Every id needs a row. An embedding may have unused rows: up to a multiple of 1,024, or 2,400 of
        102,400 (DeepSeek LLM). With 1,024 unused rows that are an eighth of all, the model is another one.
        """
        unused = rows - self.n_used
        if self.vocab_size > rows or unused >= max(PADDING, rows / 8):
            found = f"the tokenizer has {self.n_used} ids, the embedding {rows} rows"
            raise MismatchError(f"{found}; wanted the tokenizer that came with the weights")

    def within(self, rows: int) -> "Tokenizer":
        """This tokenizer without the ids from `rows` on, if nothing needs them.

        Many fine-tunes add a [PAD] token and leave the embedding as it was. Nothing makes such a token: it
        is a control token, and neither BOS nor an end of a turn. Any other id without a row stays, and
        `check_rows` refuses it.
        """
        kinds, n = self.entries["tokenizer.ggml.token_type"], self.vocab_size
        needed = {self.bos_id, *self.eos_ids}.intersection(range(rows, n))
        if needed or not rows < n < rows + PADDING or not np.isin(kinds[rows:], (CONTROL, UNUSED)).all():
            return self

        def kept(key: str, value: Any) -> Any:
            if key.startswith("numpy_llama.") and isinstance(value, np.ndarray):  # ids
                return value[value < rows]
            return value[:rows] if isinstance(value, (list, np.ndarray)) and len(value) == n else value

        entries = {key: kept(key, value) for key, value in self.entries.items()}
        known = {key: value for key, value in entries.items() if not key.endswith("_id") or value < rows}
        return tokenizer_from_gguf(known, self.source)

    @property
    def named_tokens(self) -> dict[str, str]:
        """The special tokens by the names that chat templates have for them: bos_token, pad_token, ..."""
        ids = {name: self.entries.get(f"tokenizer.ggml.{key}_token_id") for name, key in NAMED_TOKENS.items()}
        ids |= {"bos": self.bos_id, "eos": self.eos_ids[0] if self.eos_ids else None}
        return {f"{name}_token": self.tokens[i] for name, i in ids.items() if i is not None}

    @cached_property
    def control_names(self) -> re.Pattern[str]:
        """The pattern of the control tokens' names in a text: the leftmost, and there the longest."""
        return names_pattern(self.control_tokens)

    def encode(self, text: str, bos: bool = False, eos: bool = False, special: bool = False) -> list[int]:
        """The ids of a text; `bos` and `eos` add BOS before and EOS after. TextError: half a surrogate pair.

        `special`: a control token's name in the text is that token. Use it for text that a program wrote,
        never for text from others. A text that begins with BOS does not get a second one.
        """
        bos, eos = check_flag("bos", bos), check_flag("eos", eos)
        before = () if self.bos_id is None else (self.bos_id,)
        if (bos and not before) or (eos and not self.eos_ids):
            raise ParameterError("BOS or EOS is asked for, but the vocabulary has no such token")
        special = check_flag("special", special)
        ids = self.encode_parts(self.cut(text, special))
        if special and ids[:1] == [*before]:
            before = ()
        return [*before[:bos], *ids, *self.eos_ids[:eos]]

    def cut(self, text: str, special: bool = False) -> Parts:
        """`text` cut at its added tokens: texts, and ids between them. `special`: at control tokens too."""
        return self.added.cut(check_text(text), special)

    def encode_parts(self, parts: Parts) -> list[int]:
        """The ids of the parts that `cut` made."""
        encoded = (
            [part] if isinstance(part, int) else self.encode_part(part, n == 0)
            for n, part in enumerate(parts)
        )
        return [i for ids in encoded for i in ids]

    def decode(self, ids: Iterable[int], start_of_text: bool = True) -> str:
        """The text of some ids. Control tokens add nothing; bytes that are not UTF-8 become U+FFFD.

        `start_of_text=False`: the ids continue a text, so a leading space is part of it.
        """
        check_iterable("ids", ids, "a list of token ids")
        stream = StreamDecoder(self, check_flag("start_of_text", start_of_text))
        return "".join(map(stream.push, ids)) + stream.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text: perhaps half a character; none for a control token."""
        if is_whole(token_id) and 0 <= token_id < len(self.tokens):
            return self.meanings[token_id]
        raise TokenizerError(f"token id {escape(token_id)} is no whole number in 0..{len(self.tokens) - 1}")

    def piece(self, token_id: int) -> str:
        """A token in readable form: a control token by its name, half a character as \\xf0."""
        meaning, name = self.token_bytes(token_id), self.tokens[token_id]
        return name if name in self.control_tokens else meaning.decode("utf-8", "backslashreplace")


class StreamDecoder:
    """`decode`, token by token. `push` returns whole characters and keeps the bytes of incomplete ones."""

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
        """The end of the text: a character that is still incomplete becomes U+FFFD."""
        return self._utf8.decode(b"", final=True)


def check_text(text: str) -> str:
    """`text` itself, if it can be written in UTF-8."""
    check_kind("the text", text, str, "a str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        byte = f": byte 0x{code - 0xDC00:02x} of a text that is not UTF-8" if 0xDC80 <= code < 0xDD00 else ""
        half = f"U+{code:04X}, half a surrogate pair{byte}"
        raise TextError(f"character {error.start} of the text is {half}") from None
    return text


def is_control_name(text: str) -> bool:
    return text in END_TOKENS or re.fullmatch(r"<\|.*\|>", text) is not None


def unused(i: int) -> str:
    """The text of an id that no token has, as llama.cpp's converter writes it."""
    return f"[PAD{i}]"


def spelled(data: bytes) -> str:
    """`data` in the spelling of byte-level vocabularies, a character for each byte."""
    return data.decode("latin-1").translate(_CHAR_OF_BYTE)


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata; `source` is the file's name, for messages."""
    read = _Reader(metadata, source)
    model = read.get("model", str)
    if model not in ("gpt2", "llama"):
        read.fail("model", f"is {escape(model)}, we know 'gpt2' and 'llama'", UnsupportedError)
    kinds, meanings = read.vocabulary(model)
    if model == "gpt2":
        add_bos, add_space, normalize, encode_part = _byte_level(read, kinds, meanings)
    else:
        add_bos, add_space, normalize, encode_part = _sentencepiece(read, kinds)
    usual = {}
    if model == "llama":  # as in ggml, LLaMA's own ids for a file without these entries
        names = {"bos": (1, "<s>"), "eos": (2, "</s>")}
        usual = {key: i for key, (i, name) in names.items() if read.tokens[i] == name and kinds[i] == CONTROL}
    bos = read.token_id("bos", usual.get("bos"))
    ends = [read.token_id(name, usual.get(name)) for name in ("eos", "eot", "eom")]
    for name in NAMED_TOKENS.values():
        read.token_id(name, None)
    add_bos = read.get("add_bos_token", bool, add_bos) and bos is not None
    control = {text: i for i, text in enumerate(read.tokens) if kinds[i] in (CONTROL, UNKNOWN)}
    ends += [*read.end_ids(), *(control.get(text) for text in sorted(END_TOKENS))]
    eos_ids = tuple(dict.fromkeys(i for i in ends if i is not None))
    added = read.added(kinds, control, normalize)
    vocabulary = read.tokens, meanings, control, added, encode_part
    return Tokenizer(*vocabulary, bos, eos_ids, add_bos, add_space, read.entries, source)


class _Reader:
    """The entries tokenizer.ggml.* of a file, each checked when it is read; `entries` collects these.

    Entries that GGUF has no name for are called numpy_llama.tokenizer.*: ranks, pattern, whole_words,
    space_if_none, space_at_start, replace_first, double_first, end_token_ids. Others are the ids of tokens
    with an option: added (normal tokens that a text is cut at), symbols (sentencepiece finds them), lstrip,
    rstrip, single_word, normalized.
    """

    def __init__(self, metadata: Mapping[str, Any], source: str):
        self.metadata, self.source = metadata, source
        self.entries: dict[str, Any] = {}
        self.tokens: list[str] = self.get("tokens", list)
        if len(self.tokens) > MAX_TOKENS:
            self.fail("tokens", f"has {len(self.tokens)}, at most {MAX_TOKENS} are read", ResourceLimitError)

    def fail(self, name: str, what: str, error: type[NumpyLlamaError] = FormatError) -> NoReturn:
        raise error(f"{self.source}: tokenizer.ggml.{name} {what}")

    def get(self, name: str, kind: type, default: Any = ..., prefix: str = "tokenizer.ggml") -> Any:
        key = f"{prefix}.{name}"
        value = self.metadata.get(key, default)
        found = value.dtype.type if isinstance(value, np.ndarray) else type(value)
        if value is ...:
            raise TokenizerError(f"{self.source}: {key} is missing")
        if value is default:
            return value
        if found is not kind:
            what = escape(value) if isinstance(value, (str, int, float)) else "an array"
            raise FormatError(
                f"{self.source}: {key} is {what} ({found.__name__}), it must be {kind.__name__}"
            )
        self.entries[key] = value
        return value

    def own(self, name: str, kind: type, default: Any) -> Any:
        """An entry that GGUF has no name for."""
        return self.get(name, kind, default, "numpy_llama.tokenizer")

    def column(self, name: str, kind: type[np.generic]) -> npt.NDArray[Any]:
        """An array with one entry for each token."""
        value: npt.NDArray[Any] = self.get(name, kind)
        n = len(self.tokens)
        if len(value) != n:
            self.fail(name, f"has {len(value)} entries, the vocabulary has {n} tokens", MismatchError)
        return value

    def token_id(self, name: str, default: int | None) -> int | None:
        """A special id. BOS must be a token. Any other that no token has is left out: nothing makes it."""
        token_id: int | None = self.get(f"{name}_token_id", int, default)
        n = len(self.tokens)
        if token_id is None or 0 <= token_id < n:
            return token_id
        if name == "bos":
            what = f"is {token_id}, the vocabulary has {n} tokens; wanted the id of a token, or no such entry"
            self.fail(f"{name}_token_id", what, MismatchError)
        del self.entries[f"tokenizer.ggml.{name}_token_id"]
        return None

    def own_ids(self, name: str) -> frozenset[int]:
        """An array of ids that GGUF has no name for."""
        ids = self.own(name, np.int32, np.zeros(0, np.int32)).tolist()
        n = len(self.tokens)
        if wrong := [i for i in ids if not 0 <= i < n]:
            what = f"numpy_llama.tokenizer.{name} has {wrong[0]}, the vocabulary has {n} tokens"
            raise MismatchError(f"{self.source}: {what}")
        return frozenset(ids)

    def added(
        self, kinds: list[int], control: dict[str, int], normalize: Callable[[str], str]
    ) -> AddedTokens:
        """The tokens that a text is cut at."""
        symbols, normal = self.own_ids("symbols"), self.own_ids("added")
        plain = {
            text: i
            for i, text in enumerate(self.tokens)
            if i in normal or (kinds[i] == USER_DEFINED and i not in symbols)
        }
        if len(plain) > MAX_MATCHED:
            what = f"has {len(plain)} tokens to be found in texts, at most {MAX_MATCHED} are"
            raise ResourceLimitError(f"{self.source} {what}")
        name = self.metadata.get("general.name")
        if isinstance(name, str) and re.search("phi-?3", name, re.IGNORECASE):  # as llama.cpp
            kept = {"<unk>", "<s>", "<|endoftext|>"}
            ids = [i for text, i in (plain | control).items() if text not in kept]
            self.metadata = {"numpy_llama.tokenizer.rstrip": np.array(ids, np.int32), **self.metadata}
        left, right, word = map(self.own_ids, ("lstrip", "rstrip", "single_word"))
        control_ids, normalized = frozenset(control.values()), self.own_ids("normalized")
        return AddedTokens(plain | control, control_ids, left, right, word, normalized, normalize)

    def end_ids(self) -> list[int]:
        """The tokens that generation_config.json lists as ends of a turn."""
        ids: list[int] = self.own("end_token_ids", np.int32, np.zeros(0, np.int32)).tolist()
        return [i for i in ids if 0 <= i < len(self.tokens)]

    def kinds(self, model: str) -> list[int]:
        """The type of each token: from the file, or else from the names that these tokens always have."""
        if "tokenizer.ggml.token_type" not in self.metadata:
            names = {"<s>": CONTROL, "</s>": CONTROL}
            if model == "llama":
                names |= {"<unk>": UNKNOWN} | dict.fromkeys(_BYTE_TOKENS, BYTE)
            known = (names.get(text, CONTROL if is_control_name(text) else NORMAL) for text in self.tokens)
            self.metadata = {**self.metadata, "tokenizer.ggml.token_type": np.fromiter(known, np.int32)}
        kinds: list[int] = self.column("token_type", np.int32).tolist()
        return kinds

    def vocabulary(self, model: str) -> tuple[list[int], list[bytes]]:
        """The type of each token, and the bytes that it adds to a text."""
        tokens, kinds, meanings = self.tokens, self.kinds(model), []
        ids = {text: i for i, text in enumerate(tokens)}
        for i, (text, kind) in enumerate(zip(tokens, kinds, strict=True)):
            # Old converters wrote added control tokens as USER_DEFINED, which a text may spell.
            if kind == USER_DEFINED and is_control_name(text):
                kind = kinds[i] = CONTROL
            try:
                meanings.append(_meaning(text, kind, model))
                fault = "" if ids[text] == i else f"and so is tokens[{ids[text]}]"
            except (ValueError, KeyError):
                fault = f"which no {model} token of type {kind} can be"
            if fault:
                self.fail(f"tokens[{i}]", f"is {escape(text)}, {fault}", TokenizerError)
        return kinds, meanings


def _meaning(text: str, kind: int, model: str) -> bytes:
    """The bytes that a token adds to a text. ValueError or KeyError if its type cannot have this text."""
    if not (0 < len(text) <= MAX_TOKEN_TEXT and NORMAL <= kind <= BYTE):
        raise ValueError
    if kind == NORMAL and model == "gpt2":
        return text.translate(_BYTE_OF_CHAR).encode("latin-1")
    if kind in (CONTROL, UNKNOWN):
        return text.encode()[:0]  # UnicodeEncodeError for half a surrogate pair, which JSON can spell
    if kind == BYTE:
        return _BYTE_TOKENS[text]
    return (text.replace("\u2581", " ") if model == "llama" else text).encode()


# add_bos, add_space, the normalizer, encode_part
_Rules = tuple[bool, bool, Callable[[str], str], Callable[[str, bool], list[int]]]


def _byte_level(read: _Reader, kinds: list[int], meanings: list[bytes]) -> _Rules:
    pre = read.get("pre", str)
    if pre not in WORDS and pre != CUSTOM:
        read.fail("pre", f"is {escape(pre)}, we know {', '.join(WORDS)}", TokenizerError)
    ids = {text: i for i, text in enumerate(read.tokens) if kinds[i] == NORMAL}
    singles = {meanings[i]: i for i in ids.values() if len(meanings[i]) == 1}
    # Real vocabularies lack bytes: SmolLM2 has neither 0x04 nor 0xF1. Hugging Face's BPE leaves such a byte
    # out, and so does this function. A vocabulary without a common ASCII character is an error.
    missing = bytes(b for b in range(256) if bytes([b]) not in singles)
    if lost := bytes(b for b in missing if b in b"\t\n" or 0x20 <= b < 0x7F):
        raise TokenizerError(
            f"{read.source}: the vocabulary is too small, it has no token for {escape(lost)}"
        )

    def merges() -> Iterator[tuple[str, str]]:
        for i, merge in enumerate(read.get("merges", list)):
            left, _, right = merge.partition(" ")
            if left not in ids or right not in ids or left + right not in ids:
                what = f"is {escape(merge)}, it must be two tokens that make a third"
                read.fail(f"merges[{i}]", what, TokenizerError)
            yield left, right

    if read.own("ranks", bool, False):
        id_of_rank = list(ids.values())
    else:
        id_of_rank = [*singles.values(), *(ids[made] for made in order_of_merging(merges(), read.source))]
    ranks = {meanings[i]: rank for rank, i in enumerate(id_of_rank)}
    merger = tiktoken.Encoding(read.source, pat_str=".", mergeable_ranks=ranks, special_tokens={})

    # regex cuts the text into words and tiktoken merges. tiktoken's cutting aborts on long runs of spaces.
    if pre == CUSTOM:
        words = custom_words(read.own("pattern", str, ...), read.source)
        whole_words = read.own("whole_words", bool, False)
    else:
        words, whole_words = regex.compile(WORDS[pre]).findall, WORDS[pre] is LLAMA3
    words = of_older_unicode(words)
    # In Llama 3, a word that is a token is not merged. This matters for a token that no merging makes.
    whole = {meanings[i]: [i] for i in ids.values() if meanings[i] not in ranks} if whole_words else {}
    lengths = [len(meaning) for meaning in meanings]

    def merged(word: bytes) -> list[int]:
        return [id_of_rank[rank] for rank in merger._encode_single_piece(word)]

    def encode_part(part: str, begins: bool) -> list[int]:
        out: list[int] = []
        for word in words(part):
            if data := word.encode().translate(None, missing):
                out += whole.get(data) or in_chunks(merged, data, lengths)
        return out

    return WORDS.get(pre) is LLAMA3, False, unchanged, encode_part


def _sentencepiece(read: _Reader, kinds: list[int]) -> _Rules:
    """sentencepiece takes a vocabulary only as its ModelProto: pieces, trainer_spec, normalizer_spec.

    There are three rules for the space that is put before a text. llama.cpp and Hugging Face's Prepend put it
    before each part. Metaspace leaves it out if the part begins with a space: its scheme "always" puts it
    before the other parts, "first" only before the part that begins the text.
    """
    if "tokenizer.ggml.scores" not in read.metadata:
        what = "is missing, so the order of merging is not certain: convert the original model again"
        read.fail("scores", what, TokenizerError)
    tokens, scores = read.tokens, read.column("scores", np.float32)
    if kinds.count(UNKNOWN) > 1 or kinds.count(BYTE) != 256:
        found = f"{kinds.count(UNKNOWN)} UNKNOWN and {kinds.count(BYTE)} BYTE tokens"
        raise TokenizerError(f"{read.source}: the vocabulary has {found}, it must have at most 1 and 256")
    if len(bad := np.flatnonzero(~np.isfinite(scores))):
        read.fail(f"scores[{bad[0]}]", f"is {scores[bad[0]]}, not finite", TokenizerError)
    # Nothing makes a CONTROL piece. So the only USER_DEFINED ones are those that sentencepiece itself finds.
    symbols = read.own_ids("symbols")
    shown = [CONTROL if kind == USER_DEFINED and i not in symbols else kind for i, kind in enumerate(kinds)]
    rows = [*zip(tokens, scores.tolist(), shown, strict=True)]
    if UNKNOWN not in kinds:  # with all bytes it is never used, but the message must have one
        rows.append(
            (next(text for n in range(len(tokens) + 1) if (text := f"?{n}") not in tokens), 0.0, UNKNOWN)
        )
    pieces = ((1, _message((1, text.encode()), (2, score), (3, kind))) for text, score, kind in rows)
    unknown = next(i for i, row in enumerate(rows) if row[2] == UNKNOWN)
    trainer = _message((3, 2), (35, 1), (40, unknown))  # model_type BPE, byte_fallback, unk_id
    # add_dummy_prefix and remove_extra_whitespaces are off: they are done here. escape_whitespaces is on.
    normalizer = _message((1, b"identity"), (3, 0), (4, 0), (5, 1))
    model = _message(*pieces, (2, trainer), (3, normalizer))
    try:
        encode = sentencepiece.SentencePieceProcessor(model_proto=model).encode
    except (RuntimeError, ValueError) as error:
        raise TokenizerError(
            f"{read.source}: sentencepiece refuses the vocabulary: {escape(error)}"
        ) from None

    add_space = read.get("add_space_prefix", bool, True)
    metaspace = read.own("space_if_none", bool, False)
    only_first = read.own("space_at_start", bool, False)
    # Hugging Face's normalizer, which changes spaces before normalized tokens are looked for.
    replace, double = read.own("replace_first", bool, not metaspace), read.own("double_first", bool, False)
    single_spaces = read.get("remove_extra_whitespaces", bool, False)
    # The characters of a text for each token. If bytes spell a character, the first byte counts 1.
    is_later_byte = {f"<0x{byte:02X}>" for byte in range(0x80, 0xC0)}.__contains__
    lengths = [
        len(text) if kind != BYTE else int(not is_later_byte(text))
        for text, kind in zip(tokens, kinds, strict=True)
    ]

    def normalize(part: str) -> str:
        if single_spaces:
            part = re.sub(" +", " ", part.lstrip(" "))
        if add_space and not metaspace and part:
            part = f" {part}"
        if single_spaces:
            part = part.rstrip(" \u2581")
        part = part.replace(" ", "\u2581") if replace else part
        return f"\u2581{part}" if double and part[:1] == "\u2581" else part

    def encode_part(part: str, begins: bool) -> list[int]:
        if add_space and metaspace and (begins or not only_first) and part[0] not in " \u2581":
            part = f" {part}"
        return in_chunks(encode, part, lengths)

    return True, add_space, normalize, encode_part


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
    # Seven bits a byte, lowest first; the top bit is set if more follow.
    return bytes([n]) if n < 0x80 else bytes([n & 0x7F | 0x80]) + _varint(n >> 7)

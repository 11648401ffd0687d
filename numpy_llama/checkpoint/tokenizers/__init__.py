"""Tokenizer files: one reader for each format, all into GGUF's form, and one constructor for that form.

The first bytes of a file decide its format, never its name: tokenizer.model is the name of two formats.
"""

import codecs
import re
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import MismatchError, TokenizerError, TruncatedError, escape
from ...text.tokenizer import (
    CONTROL,
    NAMED_TOKENS,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    Tokenizer,
    tokenizer_from_gguf,
)
from .. import files
from ..files import MappedFile
from ..gguf.file import GGUFFile
from ..json_file import JsonFile, parse_json
from .json_tokenizer import OPTIONS, json_metadata
from .llama2c_file import llama2c_metadata
from .sentencepiece_file import sentencepiece_metadata
from .tiktoken_file import tiktoken_metadata

# The classes of transformers that put a space only before the first part, unless they are "legacy".
METASPACE_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer")
SPM = "tokenizer.ggml.remove_extra_whitespaces"  # an entry that only a SentencePiece model has
MAX_BYTES = 32 << 20  # of each file of a tokenizer; the largest is Llama 4's tokenizer.json, 28 million bytes
WANTED = "a tokenizer: SentencePiece's or tiktoken's tokenizer.model, tokenizer.json, llama2.c's .bin, GGUF"
# Files that are sometimes in a tokenizer's place, by their first bytes.
MISTAKEN = files.MISTAKEN | {
    b"PK\x03\x04": "a zip archive, perhaps PyTorch's",
    b"\x80": "a Python pickle",
    codecs.BOM_UTF8: "a byte order mark; save the file as UTF-8 without one",
}


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file of any known format."""
    return tokenizer_from_gguf(_metadata(Path(path)), str(path))


def find_tokenizer(folder: Path) -> Path:
    """The tokenizer's file in a folder, or beside the folder: Meta's download puts it there."""
    places = [place / name for place in (folder, folder.absolute().parent) for name in NAMES]
    for path in places:
        if path.is_file():
            return path
    raise TokenizerError(f"there is no tokenizer: neither {' nor '.join(map(str, places))}")


NAMES = ("tokenizer.model", "tokenizer.json")


def tokenizer_path(folder: Path) -> Path:
    """The tokenizer's file in a Hugging Face folder: tokenizer.json, or tokenizer.model, which has less."""
    for path in (folder / "tokenizer.json", folder / "tokenizer.model"):
        if path.is_file():
            return path
    raise TokenizerError(f"the folder {folder} has no tokenizer: neither tokenizer.json nor tokenizer.model")


def tokenizer_of_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, with the special tokens of the files beside it."""
    path = tokenizer_path(folder)
    metadata = _metadata(path)
    _Beside(folder).complete(metadata)
    return tokenizer_from_gguf(metadata, str(path))


def _metadata(path: Path) -> dict[str, Any]:
    """GGUF's form of the tokenizer in a file."""
    try:
        file = MappedFile(path, WANTED)
    except TruncatedError:
        raise TokenizerError(f"{path} has 0 bytes; wanted {WANTED}") from None
    head = file.map[:64]
    if head.startswith(b"GGUF"):
        return dict(GGUFFile(path).metadata)
    if file.size > MAX_BYTES:
        raise TokenizerError(f"{path} has {file.size} bytes, at most {MAX_BYTES} are read; wanted {WANTED}")
    data, source = file.map[:], str(path)
    if head.lstrip().startswith((b"{", b"[")):
        return json_metadata(JsonFile(path, values=parse_json(data, path)))
    if head[8:17] == b"\x05\0\0\0<unk>":
        return llama2c_metadata(data, source)
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?(\n|$)", head):
        return tiktoken_metadata(data, source)
    if head[0] in (0x0A, 0x12, 0x1A, 0x22, 0x2A):  # fields 1 to 5 of a protobuf message
        return sentencepiece_metadata(data, source)
    looks = next((what for start, what in MISTAKEN.items() if head.startswith(start)), None)
    raise TokenizerError(f"{path} begins with {escape(head[:16])}: {looks or 'unknown'}; wanted {WANTED}")


class _Beside:
    """The files beside a tokenizer in a Hugging Face folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config, self.map = self.read("tokenizer_config"), self.read("special_tokens_map")
        self.added, self.generation = self.read("added_tokens"), self.read("generation_config")
        self.model = self.read("config")

    def read(self, name: str) -> JsonFile:
        path = self.folder / f"{name}.json"
        return JsonFile(path, MAX_BYTES) if path.is_file() else JsonFile(path, values={})

    def complete(self, metadata: dict[str, Any]) -> None:
        """Add to GGUF's form the values of these files: added tokens, BOS, and the tokens that end a turn."""
        if SPM in metadata:
            self.spaces(metadata)
        self.add_tokens(metadata)
        ids = {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"])}
        known = {
            file.path.stem: {name: _numbers(file, name, len(ids)) for name in ("bos", "eos")}
            for file in (self.model, self.generation)
        }
        # config.json often has a library's defaults: its ids count only if no other file has any.
        guess = known["config"]
        for name in guess:
            key = f"tokenizer.ggml.{name}_token_id"
            if (text := self.named(f"{name}_token")) in ids:
                metadata[key] = ids[text]
            elif key in metadata:
                guess[name] = []
            elif guess[name]:
                metadata[key] = guess[name][0]
        for name, gguf in NAMED_TOKENS.items():
            if name not in guess and (text := self.named(f"{name}_token")) in ids:
                metadata[f"tokenizer.ggml.{gguf}_token_id"] = ids[text]
        ends = known["generation_config"]["eos"] or guess["eos"]
        if ends:
            metadata["numpy_llama.tokenizer.end_token_ids"] = np.array(ends, np.int32)
        add_bos = self.config.get("add_bos_token", bool)
        if add_bos is not None:
            metadata["tokenizer.ggml.add_bos_token"] = add_bos

    def named(self, key: str) -> str | None:
        """The text of bos_token, for example. The file has it as a text, or as an object with its content."""
        for file in (self.config, self.map):
            value = file.get(key, (str, dict))
            if value is not None:
                return self.content(file, value)
        return None

    def spaces(self, metadata: dict[str, Any]) -> None:
        """How transformers puts a space before the parts of a text, by its class for the tokenizer."""
        prefix, legacy = self.config.get("add_prefix_space", bool), self.config.get("legacy", bool)
        known = self.config.get("tokenizer_class", str, "").removesuffix("Fast") in METASPACE_CLASSES
        if known or legacy is False:
            metadata["numpy_llama.tokenizer.space_if_none"] = True
            metadata["numpy_llama.tokenizer.space_at_start"] = not legacy
        if prefix is not None:
            metadata["tokenizer.ggml.add_space_prefix"] = prefix

    def add_tokens(self, metadata: dict[str, Any]) -> None:
        special = self.special()
        normalized = {"normalized"} if metadata.get("numpy_llama.tokenizer.space_if_none") else set[str]()
        found = {
            text: (i, text in special, set() if text in special else normalized)
            for text, i in self.added.values.items()
        }
        for number, values in self.config.get("added_tokens_decoder", dict, {}).items():
            entry = JsonFile(self.config.path, values=values)
            text = entry.require("content", str)
            i = int(number) if re.fullmatch("[0-9]{1,9}", number) else number
            options = {name for name in OPTIONS if entry.get(name, bool, False)}
            if SPM in metadata:  # transformers looks for these in the text itself
                options -= {"normalized"} - normalized
            found[text] = i, entry.get("special", bool, False) or text in special, options
        tokens = list(metadata["tokenizer.ggml.tokens"])
        kinds = metadata["tokenizer.ggml.token_type"].tolist()
        before, ids = len(tokens), {text: i for i, text in enumerate(tokens)}
        wrong = [text for text, (i, *_) in found.items() if type(i) is not int]
        for text in wrong or sorted(found, key=lambda text: found[text][0]):
            i, is_special, options = found[text]
            if type(i) is not int or not 0 <= i <= len(tokens):
                what = f"added token {escape(text, 60)} has id {escape(i, 60)}"
                raise TokenizerError(f"{self.folder}: {what}, the vocabulary has {len(tokens)} tokens")
            if i == len(tokens):
                tokens.append(text)
                kinds.append(USER_DEFINED)
                ids[text] = i
            elif tokens[i] != text:
                what = f"added token {escape(text, 60)} has id {i}, which is {escape(tokens[i], 60)}"
                raise MismatchError(f"{self.folder}: {what}")
            if is_special and kinds[i] in (NORMAL, USER_DEFINED, UNUSED):
                kinds[i] = CONTROL
            options |= {"added"} if kinds[i] == NORMAL else set()
            for name in (*OPTIONS, "added"):
                key = f"numpy_llama.tokenizer.{name}"
                others = metadata.get(key, np.zeros(0, np.int32))
                if name in options or i in others:
                    chosen = {*others.tolist()} - {i} | ({i} if name in options else set())
                    metadata[key] = np.array(sorted(chosen), np.int32)
        for text in special:
            if text not in ids:  # a token without an id gets the next one
                ids[text] = len(tokens)
                tokens.append(text)
                kinds.append(CONTROL)
            elif kinds[ids[text]] == USER_DEFINED:
                kinds[ids[text]] = CONTROL
        metadata["tokenizer.ggml.tokens"] = tokens
        metadata["tokenizer.ggml.token_type"] = np.array(kinds, np.int32)
        if "tokenizer.ggml.scores" in metadata:
            scores = metadata["tokenizer.ggml.scores"]
            metadata["tokenizer.ggml.scores"] = np.append(scores, np.zeros(len(tokens) - before, np.float32))

    def special(self) -> list[str]:
        """The special tokens that these files name, in the order in which transformers adds them."""
        named = (self.named(f"{name}_token") for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
        found = dict.fromkeys(text for text in named if text is not None)
        for file in (self.config, self.map):
            for key in ("extra_special_tokens", "additional_special_tokens"):
                values = file.get(key, (list, dict), [])
                more = values.values() if isinstance(values, dict) else values
                found |= dict.fromkeys(self.content(file, value) for value in more)
        return list(found)

    def content(self, file: JsonFile, value: Any) -> str:
        """The text of a token, which is a text, or an object with its content."""
        whole = JsonFile(file.path, values={"content": value} if isinstance(value, str) else value)
        text: str = whole.require("content", str)
        return text


def _numbers(file: JsonFile, name: str, n_tokens: int) -> list[int]:
    """The special ids of a file: one, or a list. Null, [] and an absent key are none.

    BOS must be a token. Another id that no token has is left out: nothing makes it.
    """
    key = f"{name}_token_id"
    value = file.get(key, (int, list), [])
    numbers = value if isinstance(value, list) else [value]
    if not all(type(i) is int and (name != "bos" or 0 <= i < n_tokens) for i in numbers):
        wanted = f"wanted ids of tokens, 0 to {n_tokens - 1}"
        raise MismatchError(f"{file.path}: {key} is {escape(value, 60)}, {wanted}")
    return [i for i in numbers if 0 <= i < n_tokens]

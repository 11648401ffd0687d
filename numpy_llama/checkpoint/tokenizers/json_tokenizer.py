"""Hugging Face's tokenizer.json, as LLaMA's come: BPE, byte-level or like SentencePiece's.

    byte-level          pre_tokenizer ByteLevel, with a pattern of its own before it or GPT-2's
    like SentencePiece  model.byte_fallback; spaces become U+2581 by the normalizer or by Metaspace

What this file promises: every part of the file that changes ids is computed, or refused with its name.
"""

from typing import Any, NoReturn

import numpy as np

from ...errors import ConfigError, TokenizerError, UnsupportedError, escape
from ...text.bpe import order_of_merging
from ...text.pretokenizer import CUSTOM, WORDS
from ...text.tokenizer import (
    BYTE,
    CONTROL,
    MAX_TOKENS,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    spelled,
    unused,
)
from ..json_file import JsonFile

SPACE = "\u2581"
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
OPTIONS = ("lstrip", "rstrip", "single_word", "normalized")  # of an added token
# Decoders that a file may have, because they do not change ids.
ANY_DECODER = ("ByteLevel", "Sequence", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace")


def json_metadata(file: JsonFile) -> dict[str, Any]:
    """GGUF's form of a tokenizer.json."""
    try:
        return _TokenizerJson(file).metadata()
    except ConfigError as error:  # a part is of the wrong kind
        raise TokenizerError(str(error)) from None


class _TokenizerJson:
    def __init__(self, file: JsonFile):
        self.source = str(file.path)
        self.file = file
        model = file.part("model")
        if model is None:
            raise TokenizerError(f"{file.path} is JSON, but no tokenizer.json: it has no model")
        self.model = model
        self.options: dict[int, set[str]] = {}  # of each added token
        self.tokens, self.kinds = self.vocabulary()
        self.ids = {text: i for i, text in enumerate(self.tokens)}

    def unsupported(self, what: str) -> NoReturn:
        raise UnsupportedError(f"{self.source}: {what}")

    def steps(self, key: str) -> list[dict[str, Any]]:
        """A part of the file, which may be a sequence of parts."""
        part = self.file.get(key, dict)
        if part is None:
            return []
        if part.get("type") != "Sequence":
            return [part]
        lists = [value for value in part.values() if isinstance(value, list)]
        if len(lists) != 1 or not all(isinstance(step, dict) for step in lists[0]):
            raise TokenizerError(f"{self.source}: {key} is a Sequence without a list of steps")
        return lists[0]

    def metadata(self) -> dict[str, Any]:
        kind = self.model.get("type", str, "BPE")
        if kind != "BPE":
            self.unsupported(f"the model is of type {escape(kind)}; LLaMA's are BPE")
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if self.model.values.get(key):
                self.unsupported(f"the model has {key} = {escape(self.model.values[key], 60)}")
        for step in self.steps("decoder"):
            if step.get("type") not in ANY_DECODER:
                self.unsupported(f"decoder {escape(step.get('type'))} is not understood")
        merges = self.merges()
        made = {merge.replace(" ", "", 1) for merge in merges}
        made |= {text for text in self.model.require("vocab", dict) if len(text) == 1}
        both = [i for i in self.options if self.kinds[i] == USER_DEFINED and self.tokens[i] in made]
        for i in both:  # merging makes it too, where the text is not cut at it
            self.kinds[i] = NORMAL
        steps = self.steps("pre_tokenizer")
        byte_level = any(step.get("type") == "ByteLevel" for step in steps)
        out = self.byte_level(steps, merges) if byte_level else self.like_sentencepiece(steps, merges)
        option_ids = {name: [i for i, found in self.options.items() if name in found] for name in OPTIONS}
        for name, ids in (option_ids | {"added": both}).items():
            if ids:
                out[f"numpy_llama.tokenizer.{name}"] = np.array(ids, np.int32)
        bos = self.bos_of_post_processor()
        out["tokenizer.ggml.add_bos_token"] = bos is not None
        if bos is not None:
            out["tokenizer.ggml.bos_token_id"] = bos
        return out | {
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": np.array(self.kinds, np.int32),
        }

    def vocabulary(self) -> tuple[list[str], list[int]]:
        """The model's tokens and those added to them. An id that no token has is UNUSED."""
        texts: dict[int, str] = {}
        for text, i in self.model.require("vocab", dict).items():
            if type(i) is not int or texts.setdefault(i, text) != text:
                raise TokenizerError(f"{self.source}: token {escape(text, 60)} has id {escape(i, 60)}")
        byte_fallback = self.model.get("byte_fallback", bool, False)
        unknown = self.model.get("unk_token", str, "<unk>") if byte_fallback else None
        kinds = dict.fromkeys(texts, NORMAL)
        if byte_fallback:
            kinds |= {i: BYTE for i, text in texts.items() if text in BYTES}
        n = len(texts)
        for values in self.file.get("added_tokens", list, []):
            entry = JsonFile(self.file.path, values=values)
            i, text = entry.require("id", int), entry.require("content", str)
            known, next_id = i in texts, max([n - 1, *self.options]) + 1  # tokenizers counts by itself
            if not known and i != next_id:
                what = f"added token {escape(text, 60)} has id {i}, tokenizers gives it {next_id}"
                raise TokenizerError(f"{self.source}: {what}; write the id that the model was trained with")
            if i in self.options or texts.setdefault(i, text) != text:
                what = f"added token {escape(text, 60)} has id {i}, which is {escape(texts[i], 60)}"
                raise TokenizerError(f"{self.source}: {what}")
            self.options[i] = {name for name in OPTIONS if entry.get(name, bool, False)}
            kinds[i] = CONTROL if entry.get("special", bool, False) else USER_DEFINED
        kinds |= {i: UNKNOWN for i, text in texts.items() if text == unknown}
        n = max(texts, default=-1) + 1  # there may be gaps in the model's ids
        if min(texts, default=0) < 0 or n > MAX_TOKENS:
            wrong = min(texts) if min(texts) < 0 else n - 1
            what = f"token {escape(texts[wrong], 60)} has id {wrong}, wanted 0 to {MAX_TOKENS - 1}"
            raise TokenizerError(f"{self.source}: {what}")
        return [texts.get(i, unused(i)) for i in range(n)], [kinds.get(i, UNUSED) for i in range(n)]

    def merges(self) -> list[str]:
        """The merges as "a b". Files since 2024 also have the form ["a", "b"]."""
        merges: list[Any] = self.model.require("merges", list)
        for i, merge in enumerate(merges):
            if type(merge) is list and len(merge) == 2 and all(type(part) is str for part in merge):
                merges[i] = merge = f"{merge[0]} {merge[1]}"
            if type(merge) is not str:
                raise TokenizerError(f"{self.source}: merges[{i}] is {escape(merge, 60)}, wanted two tokens")
        return merges

    def bos_of_post_processor(self) -> int | None:
        """The token that is put before every text, or None; UnsupportedError if any other is added."""
        bos = None
        for step in self.steps("post_processor"):
            if step.get("type") == "ByteLevel":  # it moves offsets, not ids
                continue
            if step.get("type") != "TemplateProcessing" or not isinstance(step.get("single"), list):
                self.unsupported(f"post_processor {escape(step.get('type'))} is not understood")
            match step["single"]:
                case [{"SpecialToken": {"id": str(name)}}, {"Sequence": _}]:
                    bos = self.ids.get(name)
                    if bos is None:
                        raise TokenizerError(f"{self.source}: post_processor adds {escape(name)}, no token")
                case [{"Sequence": _}]:
                    pass
                case other:
                    self.unsupported(f"post_processor makes {escape(other, 100)}; LLaMA's adds BOS")
        return bos

    # -------------------------------------------------------------------------------- byte-level

    def byte_level(self, steps: list[dict[str, Any]], merges: list[str]) -> dict[str, Any]:
        if self.steps("normalizer"):
            kinds = [step.get("type") for step in self.steps("normalizer")]
            self.unsupported(f"normalizer {escape(kinds)}; a byte-level LLaMA has none")
        alphabet = {spelled(bytes([byte])) for byte in range(256)}
        if self.model.get("unk_token", str) is not None and not alphabet <= self.ids.keys():
            self.unsupported("the model has no token for some byte, and an unk_token in its place")
        pattern = self.pattern(steps)
        whole_words = self.model.get("ignore_merges", bool, False)
        names = {(WORDS["gpt-2"], False): "gpt-2", (WORDS["smollm"], False): "smollm"}
        names[WORDS["llama-bpe"], True] = "llama-bpe"
        out: dict[str, Any] = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": names.get((pattern, whole_words), CUSTOM),
            "tokenizer.ggml.merges": merges,
        }
        if out["tokenizer.ggml.pre"] == CUSTOM:
            out["numpy_llama.tokenizer.pattern"] = pattern
            out["numpy_llama.tokenizer.whole_words"] = whole_words
        return out

    def pattern(self, steps: list[dict[str, Any]]) -> str:
        """One pattern for all steps. The last step is ByteLevel, with GPT-2's pattern by default."""
        *before, last = steps
        gpt2 = last.get("use_regex", True)
        if last.get("type") == "ByteLevel" and not last.get("add_prefix_space", True):
            match before:
                case [] if gpt2:
                    return WORDS["gpt-2"]
                case [{"type": "Digits", "individual_digits": True}] if gpt2:
                    return WORDS["smollm"]
                case [
                    {
                        "type": "Split",
                        "behavior": "Isolated",
                        "invert": False,
                        "pattern": {"Regex": str(pattern)},
                    }
                ] if not gpt2:
                    return pattern
        self.unsupported(f"pre_tokenizer {escape(steps, 600)} is not understood")

    # -------------------------------------------------------------------------------- like SentencePiece

    def like_sentencepiece(self, steps: list[dict[str, Any]], listed: list[str]) -> dict[str, Any]:
        if not self.model.get("byte_fallback", bool, False):
            self.unsupported("the model has no byte_fallback and no ByteLevel: some texts had no ids")
        if self.model.get("ignore_merges", bool, False):
            self.unsupported("the model has ignore_merges without ByteLevel")
        spaces = self.spaces(steps)
        merges = []
        for i, merge in enumerate(listed):
            left, _, right = merge.partition(" ")
            if left not in self.ids or right not in self.ids or left + right not in self.ids:
                what = f"merges[{i}] is {escape(merge, 60)}, it must be two tokens that make a third"
                raise TokenizerError(f"{self.source}: {what}")
            merges.append((left, right))
        normal = [text for text, kind in zip(self.tokens, self.kinds, strict=True) if kind == NORMAL]
        longer = [text for text in normal if len(text) > 1]
        order = order_of_merging(merges, self.source, longer)
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": np.array(
                [-order.get(text, len(order)) for text in self.tokens], np.float32
            ),
            **spaces,
        }

    def spaces(self, steps: list[dict[str, Any]]) -> dict[str, Any]:
        """The entries for the rule by which a space is put before the parts of a text."""
        normalizer = self.steps("normalizer")
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        double = {"type": "Replace", "pattern": {"Regex": rf"\A{SPACE}"}, "content": SPACE * 2}
        prepend = {"type": "Prepend", "prepend": SPACE}
        if not steps and normalizer in ([replace], [prepend, replace]):
            return {"tokenizer.ggml.add_space_prefix": prepend in normalizer}
        scheme = steps[0].get("prepend_scheme") if len(steps) == 1 else None
        metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
        known = scheme in ("always", "first", "never") and normalizer in ([], [replace], [replace, double])
        if steps == [metaspace] and known:
            return {
                "tokenizer.ggml.add_space_prefix": scheme != "never",
                "numpy_llama.tokenizer.space_if_none": True,
                "numpy_llama.tokenizer.space_at_start": scheme == "first",
                "numpy_llama.tokenizer.replace_first": replace in normalizer,
                "numpy_llama.tokenizer.double_first": double in normalizer,
            }
        found = f"normalizer {escape(normalizer)} with pre_tokenizer {escape(steps)}"
        self.unsupported(f"{found} is not understood")

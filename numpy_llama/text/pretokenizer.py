"""Cutting a text into words, within which a byte-level vocabulary merges bytes.

Each vocabulary was made with a pattern of its own. Those of GPT-2, SmolLM2 and Llama 3 have names in GGUF;
any other comes with its file.
"""

import re
from collections.abc import Callable, Iterable
from itertools import accumulate, pairwise

import regex
import tiktoken

from ..errors import TokenizerError, UnsupportedError, escape

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Each digit alone, then GPT-2's pattern on what lies between: a digit is to it as the end of the text.
_SMOLLM = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# llama.cpp's "default" cuts four times: at punctuation and ASCII signs, by GPT-2's pattern, at numbers, and
# ASCII digits in threes. In one pattern: to a space a sign is as the end of the text.
_SIGN = r"\p{P}$+<=>^~|"
_DEFAULT = (
    rf"[{_SIGN}]+| ?\p{{L}}+|[0-9]{{3}}|\p{{N}}+?(?=[0-9]{{3}}|\P{{N}}|\Z)"
    rf"| ?[^\s\p{{L}}\p{{N}}{_SIGN}]+|\s+(?![^\s{_SIGN}])|\s+"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = {  # by tokenizer.ggml.pre
    "gpt-2": _GPT2, "default": _DEFAULT, "smollm": _SMOLLM,
    "llama-bpe": LLAMA3, "llama3": LLAMA3, "llama-v3": LLAMA3,
}  # fmt: skip
CUSTOM = "custom"  # our own name for a pattern that has none; it stands in numpy_llama.tokenizer.pattern
PATTERN_SECONDS = 10.0  # for a file's own pattern and a million characters: real ones take one

_BYTES_ALONE = {bytes([byte]): byte for byte in range(256)}
_LETTER_OR_NUMBER = r"[\p{L}\p{N}]"
_asked: set[str] = set()
_newer: dict[int, str] = {}  # character -> a stand-in that is neither letter nor number nor space


def of_older_unicode(words: Callable[[str], Iterable[str]]) -> Callable[[str], Iterable[str]]:
    """The same cutting, but a character is a letter or a number only if tiktoken thinks so too.

    Its tables, and those of Hugging Face's tokenizers, are of an older Unicode than regex's. Some 17,000
    characters have become letters since, and a model was trained on what its tokenizer took them for.
    """
    judge = tiktoken.Encoding("", pat_str=_LETTER_OR_NUMBER, mergeable_ranks=_BYTES_ALONE, special_tokens={})

    def cut(text: str) -> Iterable[str]:
        characters = set(text)
        if new := characters - _asked:
            ours = regex.findall(_LETTER_OR_NUMBER, "".join(new))
            theirs = bytes(judge.encode_ordinary("".join(ours))).decode()
            _newer.update((ord(c), "\ufffd") for c in set(ours).difference(theirs))
            _asked.update(new)
        if _newer.keys().isdisjoint(map(ord, characters)):
            return words(text)
        ends = accumulate(map(len, words(text.translate(_newer))), initial=0)
        return [text[begin:end] for begin, end in pairwise(ends)]

    return cut


def custom_words(pattern: str, source: str) -> Callable[[str], Iterable[str]]:
    """What a file's own pattern, written for Oniguruma, finds, and what lies between."""
    what = f"{source}: the pattern {escape(pattern)} cannot be used"
    if found := re.search(r"&&|\[[^\]]*(?<!\\)\[(?!:)", pattern):  # sets within sets
        raise UnsupportedError(f"{what}: {escape(found[0])} means something else here")
    try:
        compiled = regex.compile(f"(?:{pattern})|(?s:.+?)(?=(?:{pattern})|\\Z)")
    except (regex.error, RecursionError, OverflowError) as error:
        raise UnsupportedError(f"{what}: {escape(str(error))}") from None

    def words(text: str) -> list[str]:
        try:
            seconds = PATTERN_SECONDS * (1 + len(text) / 1e6)
            return [match[0] for match in compiled.finditer(text, timeout=seconds)]
        except TimeoutError:
            raise TokenizerError(f"{source}: its pattern takes longer than {seconds:.0f} s") from None

    return words

"""Cutting a text into words, within which a byte-level vocabulary merges bytes.

Each vocabulary was made with a pattern of its own. The patterns of GPT-2, SmolLM2 and Llama 3 have names in
GGUF. Any other pattern comes with its file.
"""

import re
from collections.abc import Callable, Iterable
from functools import cache
from itertools import accumulate, pairwise

import regex
import tiktoken

from ..errors import TokenizerError, UnsupportedError, escape

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Each digit alone, and GPT-2's pattern on the text between. For it, a digit counts as the end of the text.
_SMOLLM = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# llama.cpp's "default" cuts four times: at punctuation and ASCII signs, by GPT-2's pattern, at numbers, and
# into groups of three ASCII digits. This is all in one pattern. After spaces, a sign counts as the end of the
# text.
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
CUSTOM = "custom"  # our name for a pattern without a name, which is the entry numpy_llama.tokenizer.pattern
# The limit for a file's own pattern, and again for each million characters. Real patterns take a second.
PATTERN_SECONDS = 10.0

_BYTES_ALONE = {bytes([byte]): byte for byte in range(256)}
_WORD_CHARACTER = tiktoken.Encoding("", pat_str=r"\w", mergeable_ranks=_BYTES_ALONE, special_tokens={})
_LETTER_OR_NUMBER = r"[\p{L}\p{N}]"
_compared: set[str] = set()  # characters whose class in the two tables has been compared
_newer: dict[int, str] = {}  # newer letter or number -> U+FFFD, which is no letter, number or space


def of_older_unicode(words: Callable[[str], Iterable[str]]) -> Callable[[str], Iterable[str]]:
    """`words`, but a character is a letter or a number only if it is one in tiktoken's tables.

    The tables of tiktoken and of Hugging Face's tokenizers are of an older Unicode than those of regex. Some
    17,000 characters have become letters since. A model was trained with the tables of its tokenizer.
    """
    older = tiktoken.Encoding("", pat_str=_LETTER_OR_NUMBER, mergeable_ranks=_BYTES_ALONE, special_tokens={})

    def cut(text: str) -> Iterable[str]:
        characters = set(text)
        if new := characters - _compared:
            ours = regex.findall(_LETTER_OR_NUMBER, "".join(new))
            theirs = bytes(older.encode_ordinary("".join(ours))).decode()
            _newer.update((ord(c), "\ufffd") for c in set(ours).difference(theirs))
            _compared.update(new)
        if _newer.keys().isdisjoint(map(ord, characters)):
            return words(text)
        ends = accumulate(map(len, words(text.translate(_newer))), initial=0)
        return [text[begin:end] for begin, end in pairwise(ends)]

    return cut


@cache
def is_word_character(character: str) -> bool:
    """Whether a character is one of a word, by tiktoken's tables."""
    return bool(_WORD_CHARACTER.encode_ordinary(character))


def custom_words(pattern: str, source: str) -> Callable[[str], Iterable[str]]:
    """A function that cuts a text into the matches of a pattern, written for Oniguruma, and the rest."""
    what = f"{source}: the pattern {escape(pattern)} cannot be used"
    if found := re.search(r"&&|\[[^\]]*(?<!\\)\[(?!:)", pattern):  # a set within a set
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

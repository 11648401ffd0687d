"""Added tokens: a text is cut at them before its other parts are encoded.

    "the <tool>and"  --cut-->  ["the ", 32000, "and"]  --encode each part-->  ids

The rules are those of Hugging Face's `tokenizers` (added_vocabulary.rs). llama.cpp has the same ones for
tokens that are not normalized. Tokens are looked for in the text, then the normalized ones in each normalized
part. Both times the leftmost token is found first, and there the longest.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import regex

from .pretokenizer import is_word_character

Parts = list[str | int]  # texts, and the ids of the tokens between them


def unchanged(text: str) -> str:
    return text


def names_pattern(names: Iterable[str]) -> re.Pattern[str]:
    """The pattern of one of `names` in a text: the leftmost, and there the longest."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


@dataclass(frozen=True, eq=False)
class AddedTokens:
    """The tokens that a text is cut at."""

    ids: dict[str, int]  # text -> id
    control: frozenset[int] = frozenset()  # of these, only a caller who asks for `special` gets one
    left: frozenset[int] = frozenset()  # lstrip: the token takes the spaces before it
    right: frozenset[int] = frozenset()  # rstrip: and the spaces behind it
    word: frozenset[int] = frozenset()  # single_word: no word may touch it
    normalized: frozenset[int] = frozenset()  # its normalized text is looked for in the normalized text
    normalize: Callable[[str], str] = unchanged

    def cut(self, text: str, special: bool) -> Parts:
        """`text` in normalized parts, with the ids of the tokens between them. No part is empty."""
        pattern, ids = self._raw[special]
        parts: Parts = []
        for part in self._found(text, pattern, ids):
            parts += [part] if isinstance(part, int) else self._cut_normalized(self.normalize(part), special)
        return parts

    def _cut_normalized(self, text: str, special: bool) -> Parts:
        return self._found(text, *self._normalized[special]) if self.normalized else [text]

    @cached_property
    def _raw(self) -> tuple["_Names", "_Names"]:
        """Without the control tokens, and with them."""
        found = {text: i for text, i in self.ids.items() if i not in self.normalized}
        return self._names(found, False), self._names(found, True)

    @cached_property
    def _normalized(self) -> tuple["_Names", "_Names"]:
        found = {self.normalize(text): i for text, i in self.ids.items() if i in self.normalized}
        return self._names(found, False), self._names(found, True)

    def _names(self, ids: dict[str, int], special: bool) -> "_Names":
        ids = {text: i for text, i in ids.items() if special or i not in self.control}
        return names_pattern(ids), ids

    def _found(self, text: str, pattern: re.Pattern[str], ids: dict[str, int]) -> Parts:
        parts: Parts = []
        end = 0  # of the last token, with the spaces that it takes
        for match in pattern.finditer(text) if ids else ():
            i, (start, stop) = ids[match[0]], match.span()
            if i in self.word and any(
                map(is_word_character, (text[start - 1 : start], text[stop : stop + 1]))
            ):
                continue
            while i in self.left and start > end and _SPACE.match(text, start - 1):
                start -= 1
            if i in self.right:
                stop = _SPACES.match(text, stop).end()
            parts += [text[end:start]] if end < start else []
            parts.append(i)
            end = stop
        return [*parts, text[end:]] if end < len(text) else parts


_Names = tuple[re.Pattern[str], dict[str, int]]
_SPACE, _SPACES = regex.compile(r"\s"), regex.compile(r"\s*")

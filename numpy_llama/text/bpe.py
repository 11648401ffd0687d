"""The order in which neighbours are merged: what a list of merges means to who merges by rank.

A list of merges (Hugging Face, ggml) and ranks of tokens (tiktoken, SentencePiece) are different rules. They
agree for real vocabularies; for each one it is proven when it is loaded.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import TypeVar

from ..errors import TokenizerError, UnsupportedError, escape

MAX_MERGED_TEXT = 512  # characters of a token that merging makes; Llama 3 has one of 128 spaces
MAX_BY_HAND = 4096  # tokens whose merging must be acted out to be understood; Llama 3 has 695
CHUNK = 1 << 16  # characters or bytes for one call into C, which Ctrl-C cannot interrupt


def order_of_merging(
    merges: Iterable[tuple[str, str]], source: str, others: Iterable[str] = ()
) -> dict[str, int]:
    """The ranks of what a list of merges makes. UnsupportedError if ranks cannot say what the list says.

    There are two rules. By a list (Hugging Face, ggml), the pair that stands highest in it merges next. By
    rank (tiktoken, SentencePiece), the two neighbours whose union has the lowest rank, whatever they are;
    `others` are unions of which the list says nothing. In both, the leftmost of equals.

    By rank, a token always comes about from the same two parts, whatever stands around it: nothing
    crosses its ends before it is whole. So the rules agree if the list has, for each token, these two
    parts, where it first speaks of that token. This is what is checked here.
    """
    rank: dict[str, int] = {}  # of what the list makes; a single character is there from the start: -1
    parts: dict[str, tuple[str, str]] = {}  # of what is proven
    unclear: dict[str, list[tuple[str, str]]] = {}  # of the others: all that the list says at first

    def come_together(left: str, right: str, limit: int) -> bool:
        """Back through time: did the ends that met between the two ever make something else before?"""
        left_goes = right_goes = limit  # the rank of what takes each of them up
        a, b = rank.get(left, -1), rank.get(right, -1)
        proven = (len(left) == 1 or left in parts) and (len(right) == 1 or right in parts)
        if not proven:
            return False
        while a >= 0 or b >= 0:
            if b >= a:  # made later: of equals, the left one merges first
                right, right_goes = parts[right][0], b
                b = rank.get(right, -1)
            else:
                left, left_goes = parts[left][1], a
                a = rank.get(left, -1)
            if -1 < rank.get(left + right, -1) < left_goes and rank[left + right] <= right_goes:
                return False
        return True

    last = ""
    for pair in merges:
        before, last = last, pair[0] + pair[1]
        if last in parts or (last in rank and last != before):
            continue
        limit = rank.setdefault(last, len(rank))
        if come_together(*pair, limit):
            parts[last] = pair
            unclear.pop(last, None)
        else:
            unclear.setdefault(last, []).append(pair)
    for text in others:
        if text not in rank:
            rank[text], unclear[text] = len(rank), []

    # Tokens that merging never makes, or makes from parts that rank behind them: act it out.
    if len(unclear) > MAX_BY_HAND:
        raise UnsupportedError(f"{source}: {len(unclear)} tokens are not what their merges make")
    if too_long := next((text for text in rank if len(text) > MAX_MERGED_TEXT), None):
        what = f"has more than {MAX_MERGED_TEXT} characters to merge"
        raise TokenizerError(f"{source}: token {escape(too_long)} {what}")
    never = set()
    for made, pairs in unclear.items():
        last_two = merge(made, rank, but=made)
        if len(last_two) > 2:
            never.add(made)
        elif (*last_two,) not in pairs:
            raise UnsupportedError(f"{source}: ranks do not make token {escape(made)} as its merges do")
    return {made: i for i, made in enumerate(made for made in rank if made not in never)}


Data = TypeVar("Data", str, bytes)


def merge(text: Data, rank: Mapping[Data, int], but: Data | None = None) -> list[Data]:
    """Byte pair encoding (Sennrich et al. 2016, section 3.2): b"hugs" -> [b"hug", b"s"].

    Of all neighbours whose union has a rank, those with the lowest are merged, the leftmost of equals, until
    there are none. The union `but` is left apart. tiktoken and sentencepiece do the same, faster.
    """
    parts = [text[i : i + 1] for i in range(len(text))]
    while True:
        unions = (left + right for left, right in pairwise(parts))
        known = [(rank[made], i) for i, made in enumerate(unions) if made in rank and made != but]
        if not known:
            return parts
        _, i = min(known)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def in_chunks(encode: Callable[[Data], list[int]], data: Data, lengths: list[int]) -> list[int]:
    """`encode(data)`, in calls so short that Ctrl-C is heard between them.

    Exact, because merging is local: the ids of a text are those whose neighbours are, two by two, the ids
    of their own text. So the last ids are made again together with what follows, from so far back that the
    first of them stays as it was.
    """
    if len(data) <= CHUNK:
        return encode(data)
    ids: list[int] = []
    for end in range(CHUNK, len(data) + CHUNK, CHUNK):
        back = 2 * max(lengths)
        while True:
            kept, start = len(ids), end - CHUNK
            while kept and end - CHUNK - start < back:
                kept -= 1
                start -= lengths[ids[kept]]
            again = encode(data[start:end])
            if not kept or again[0] == ids[kept]:
                break
            back *= 2
        ids[kept:] = again
    return ids

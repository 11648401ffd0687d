"""Byte pair encoding, and the rank of each token that a list of merges makes.

A list of merges (Hugging Face, ggml) and ranks of tokens (tiktoken, SentencePiece) are different rules. They
agree for real vocabularies. `order_of_merging` proves it for each vocabulary when it is loaded.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import TypeVar

from ..errors import TokenizerError, UnsupportedError, escape

MAX_MERGED_TEXT = 512  # characters of a token that merging makes; Llama 3 has one of 128 spaces
MAX_UNPROVEN = 4096  # tokens that must be merged once to check their last two parts; Llama 3 has 695
CHUNK = 1 << 16  # characters or bytes for one call into C, which Ctrl-C cannot interrupt


def order_of_merging(
    merges: Iterable[tuple[str, str]], source: str, others: Iterable[str] = ()
) -> dict[str, int]:
    """The rank of each token that a list of merges makes. UnsupportedError if no ranks mean the same.

    There are two rules. A list (Hugging Face, ggml) merges the pair that stands highest in it. Ranks
    (tiktoken, SentencePiece) merge the two neighbours whose union has the lowest rank, whatever the two are.
    Both rules take the leftmost of equal pairs. `others` are unions that the list does not have.

    By rank, a token is always made from the same two parts, whatever stands around it: no merge crosses its
    ends before it is whole. So the rules agree if the list has these two parts where it first has the token.
    This function checks that for each token.
    """
    rank: dict[str, int] = {}  # of each token that the list makes; a single character counts as -1
    parts: dict[str, tuple[str, str]] = {}  # the two parts of each token, where they are proven
    unproven: dict[str, list[tuple[str, str]]] = {}  # the pairs where the list first has each other token

    def always_meet(left: str, right: str, limit: int) -> bool:
        """Whether the two parts always meet: no merge across the boundary between them comes first.

        The loop undoes the merges, the last one first, and looks at the two pieces at the boundary.
        """
        left_goes = right_goes = limit  # the rank of the merge that takes in each of the two pieces
        a, b = rank.get(left, -1), rank.get(right, -1)
        proven = (len(left) == 1 or left in parts) and (len(right) == 1 or right in parts)
        if not proven:
            return False
        while a >= 0 or b >= 0:
            if b >= a:  # the right piece was made last; the left one of equal pairs merges first
                right, right_goes = parts[right][0], b
                b = rank.get(right, -1)
            else:
                left, left_goes = parts[left][1], a
                a = rank.get(left, -1)
            if -1 < rank.get(left + right, -1) < left_goes and rank[left + right] <= right_goes:
                return False
        return True

    made = ""
    for pair in merges:
        before, made = made, pair[0] + pair[1]
        if made in parts or (made in rank and made != before):
            continue
        limit = rank.setdefault(made, len(rank))
        if always_meet(*pair, limit):
            parts[made] = pair
            unproven.pop(made, None)
        else:
            unproven.setdefault(made, []).append(pair)
    for text in others:
        if text not in rank:
            rank[text], unproven[text] = len(rank), []

    # These tokens are never made, or their parts have higher ranks than they. Merging each one decides.
    if len(unproven) > MAX_UNPROVEN:
        raise UnsupportedError(f"{source}: {len(unproven)} tokens are not what their merges make")
    if too_long := next((text for text in rank if len(text) > MAX_MERGED_TEXT), None):
        what = f"has more than {MAX_MERGED_TEXT} characters to merge"
        raise TokenizerError(f"{source}: token {escape(too_long)} {what}")
    never = set()
    for made, pairs in unproven.items():
        last_two = merge(made, rank, except_for=made)
        if len(last_two) > 2:
            never.add(made)
        elif (*last_two,) not in pairs:
            raise UnsupportedError(f"{source}: ranks do not make token {escape(made)} as its merges do")
    return {made: i for i, made in enumerate(made for made in rank if made not in never)}


Data = TypeVar("Data", str, bytes)


def merge(text: Data, rank: Mapping[Data, int], except_for: Data | None = None) -> list[Data]:
    """Byte pair encoding (Sennrich et al. 2016, section 3.2): b"hugs" -> [b"hug", b"s"].

    The two neighbours whose union has the lowest rank are merged, the leftmost of equals, until no union has
    a rank. The union `except_for` is never made. tiktoken and sentencepiece compute the same, faster.
    """
    parts = [text[i : i + 1] for i in range(len(text))]
    while True:
        unions = (left + right for left, right in pairwise(parts))
        known = [(rank[made], i) for i, made in enumerate(unions) if made in rank and made != except_for]
        if not known:
            return parts
        _, i = min(known)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def in_chunks(encode: Callable[[Data], list[int]], data: Data, lengths: list[int]) -> list[int]:
    """`encode(data)` in short calls, between which Ctrl-C can interrupt.

    The result is exact, because merging is local. Ids are those of a text if every two neighbours among them
    are the ids of their own text. So each call encodes the last ids again, with the data that follows. It
    starts far enough back that the first id does not change.
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
            new = encode(data[start:end])
            if not kept or new[0] == ids[kept]:
                break
            back *= 2
        ids[kept:] = new
    return ids

"""Byte pair encoding: the merging of neighbours by which a word becomes tokens."""

from itertools import pairwise

import numpy as np
import tiktoken
from hypothesis import strategies as st

from .bounds import assert_same
from .laws import assert_that, law, seeds

words = st.binary(min_size=1, max_size=24).map(lambda data: bytes(b"abc"[byte % 3] for byte in data))


def vocabulary(seed):
    """Ranks as training finds them: all bytes, then unions of two earlier tokens of few letters."""
    rng = np.random.default_rng(seed)
    ranks, letters = {bytes([byte]): byte for byte in range(256)}, [b"a", b"b", b"c"]
    for _ in range(rng.integers(0, 30)):
        made = letters[rng.integers(len(letters))] + letters[rng.integers(len(letters))]
        if made not in ranks:
            ranks[made] = len(ranks)
            letters.append(made)
    return ranks


@law("merge", words, seeds)
def test_nothing_is_lost(ops, word, seed):
    """The parts, one behind the other, are the word."""
    parts = ops.merge(word, vocabulary(seed))
    assert_that(b"".join(parts) == word, f"{parts} are not {word}")


@law("merge", words, seeds)
def test_nothing_is_left_to_merge(ops, word, seed):
    """No two neighbours of the result have a union that is a token."""
    ranks = vocabulary(seed)
    for left, right in pairwise(ops.merge(word, ranks)):
        assert_that(left + right not in ranks, f"{left} and {right} are left, and {left + right} is a token")


@law("merge")
def test_the_lowest_rank_goes_first(ops):
    """The lowest rank is merged first: "abc" with the tokens bc (256), ab (257) gives a bc."""
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"bc": 256, b"ab": 257}
    assert_that(ops.merge(b"abc", ranks) == [b"a", b"bc"], "ab was merged before bc, whose rank is lower")


@law("merge")
def test_the_leftmost_of_equals_goes_first(ops):
    """Equal pairs merge from the left: "aaa" with the token aa gives aa a, not a aa."""
    assert_that(ops.merge(b"aaa", {b"a": 0, b"aa": 256}) == [b"aa", b"a"], "the right pair was merged first")


@law("merge", words, seeds)
def test_as_tiktoken(ops, word, seed):
    """The tokens that the library of Llama 3 makes of the same word with the same ranks."""
    ranks = vocabulary(seed)
    library = tiktoken.Encoding("law", pat_str="(?s).+", mergeable_ranks=ranks, special_tokens={})
    assert_same([ranks[part] for part in ops.merge(word, ranks)], library.encode_ordinary(word.decode()))

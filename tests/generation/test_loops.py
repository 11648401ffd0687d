"""An endless loop is seen, wherever it begins; a text that only repeats itself a little is none."""

import re

from hypothesis import given
from hypothesis import strategies as st

from numpy_llama.generation.loops import LEAST_IDS, LEAST_TIMES, LONGEST_PERIOD, repeated_ids

IDS = st.integers(0, 3)  # few, so that much is repeated by chance


def by_definition(ids: list[int]) -> int:
    """The rule in its plainest words: the end is one piece, again and again, perhaps cut on its left."""
    for p in range(1, LONGEST_PERIOD + 1):
        n = max(LEAST_IDS, LEAST_TIMES * p)
        piece = ids[-p:]
        if len(ids) >= n and (piece * (n // p + 1))[-n:] == ids[-n:]:
            return n - p
    return 0


@given(st.lists(IDS), st.lists(IDS, min_size=1, max_size=12), st.integers(0, 300), st.lists(IDS, max_size=2))
def test_the_rule(before, piece, times, after):
    ids = before + piece * times + after
    assert repeated_ids(ids) == by_definition(ids)


@given(st.lists(st.integers(0, 10**5), max_size=50), st.integers(1, LONGEST_PERIOD), st.data())
def test_a_loop_is_seen_when_it_is_long_enough_and_not_before(before, length, data):
    piece = [10**6 + i for i in range(length)]  # no id twice, and none of those before
    n = max(LEAST_IDS, LEAST_TIMES * length)
    loop = (piece * (n // length + 1))[:n]
    assert repeated_ids(before + loop) == n - length
    assert repeated_ids(before + loop[:-1]) == 0
    loop[data.draw(st.integers(0, n - 1))] = -1
    assert repeated_ids(before + loop) == 0


@given(st.integers(LONGEST_PERIOD + 1, 400))
def test_a_longer_piece_is_no_loop(length):
    assert repeated_ids([*range(length)] * 20) == 0


def words(text: str) -> list[int]:
    """An id for each word and each sign, finer than most tokenizers cut them."""
    found = re.findall(r"\w|\s+|[^\w\s]", text)
    return [{word: i for i, word in enumerate(dict.fromkeys(found))}[word] for word in found]


REPEATING = {
    "laughter": "ha " * 60,
    "a ruler": "-" * 200,
    "a table": "| a | b | c |\n|---|---|---|\n" + "".join(f"| {i} | 0 | 0 |\n" for i in range(200)),
    "an empty grid": "0 0 0 0 0 0 0 0 0\n" * 9,
    "code": "".join(f'    if key == "{i}":\n        return None\n' for i in range(100)),
    "numbers": ", ".join(map(str, range(2000))),
    "a refrain": ("Row, row, row your boat,\ngently down the stream.\n" * 3 + "Merrily, merrily.\n") * 7,
}


def test_tables_code_lists_and_laughter_are_no_loops():
    for name, text in REPEATING.items():
        ids = words(text)
        assert not any(repeated_ids(ids[:n]) for n in range(len(ids) + 1)), name

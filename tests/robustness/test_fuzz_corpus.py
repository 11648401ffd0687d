"""What fuzzing came upon earlier (tests/robustness/instruments/corpus), given to every reader again."""

import pytest
from robustness.instruments.fuzz import FILES, kept
from robustness.instruments.readers import READERS, attempt


@pytest.mark.parametrize("name", READERS)
def test_nothing_but_our_errors_comes_out(name):
    reader = READERS[name]
    for data in [*reader.seeds(), *kept(name)]:
        attempt(reader, data)


def test_every_reader_can_be_named():
    assert {*FILES} == {*READERS}

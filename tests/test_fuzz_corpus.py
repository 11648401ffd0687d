"""What fuzzing came upon earlier (tests/instruments/corpus), given to every reader again."""

import pytest
from instruments.fuzz import FILES, kept
from instruments.readers import READERS, attempt


@pytest.mark.parametrize("name", READERS)
def test_nothing_but_our_errors_comes_out(name):
    reader = READERS[name]
    for data in [*reader.seeds(), *kept(name)]:
        attempt(reader, data)


def test_every_reader_can_be_named():
    assert {*FILES} == {*READERS}

"""The process that tries a grammar: how it is limited, ends and speaks on each system."""

import json
import subprocess
import sys

import pytest
from helpers.other_systems import printed, python

from numpy_llama.generation import structured

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux imitates the others")


@pytest.mark.parametrize("system", ["windows", "macos"])
def test_the_process_that_tries_a_grammar_runs(system):
    asked = [
        json.dumps({"grammars": [{"lark_grammar": source}]}) for source in ('start: "\u00e4"', "start: (")
    ]
    code = f"import runpy; runpy.run_path({str(structured.TRY_GRAMMAR)!r}, run_name='__main__')"
    for source, fault in zip(asked, (False, True), strict=True):
        done = python(system, code, json.dumps([source, [], 0]))
        assert (done.returncode, done.stderr, bool(done.stdout)) == (0, "", fault)


def test_what_is_wrong_with_a_grammar_is_said_where_text_is_not_utf_8():
    """Python of Windows has another encoding for pipes, as Python without a locale has here."""
    code = r"""
from numpy_llama.errors import GrammarError
from numpy_llama.generation.structured import Grammar
try:
    Grammar(grammar='start: "\u65e5" n\u00f6')
except GrammarError as error:
    print(error)
"""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    said = printed("linux", code, **locale)
    assert said == ["grammar cannot be followed: line 1, column 15: lexer error"]


@pytest.mark.parametrize(
    "end, found",
    [
        (-11, structured.TOO_LARGE),
        (0xC00000FD, structured.TOO_LARGE),  # Windows' number for a stack that is full
        (1, "it was not compiled: why"),
        (0, "fault"),
        (None, structured.TOO_LARGE),  # no end at all
    ],
)
def test_how_the_process_that_tries_a_grammar_ends(monkeypatch, end, found):
    def run(command, timeout, **options):
        if end is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, end, "fault", "why")

    monkeypatch.setattr(structured.subprocess, "run", run)
    structured.fault_of.cache_clear()
    assert structured.fault_of("any") == found
    structured.fault_of.cache_clear()

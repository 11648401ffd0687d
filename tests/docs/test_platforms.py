"""The page of platforms names tests that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "platforms.md").read_text(encoding="utf-8")


def test_every_trap_has_a_test_or_a_reason():
    rows = [
        row.split(" | ") for row in re.findall(r"^\| (.*) \|$", PAGE.partition("## Traps")[2], re.MULTILINE)
    ]
    assert len(rows) > 40 and {len(row) for row in rows} == {4} and all(cell for row in rows for cell in row)


def test_every_test_that_is_named_exists():
    there = set()
    for path in [*ROOT.glob("tests/**/test_*.py"), *ROOT.glob("numpy_llama/proof/test_*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        there |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 25 and named <= there

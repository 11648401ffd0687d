"""The page of extras and environment variables lists what the package has."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "environment.md").read_text()
READ = re.compile(r'environ(?:ment)?(?:\.get\(|\.setdefault\(|\[)"([A-Z_]+)"|for name in \(("[A-Z_", ]+")\)')


def test_every_variable_that_the_package_reads_is_listed():
    read = set()
    for path in (ROOT / "numpy_llama").rglob("*.py"):
        if "proof" not in path.parts:  # the variables of its tests
            read |= set(re.findall("[A-Z_]+", " ".join(map("".join, READ.findall(path.read_text())))))
    assert {"NUMPY_LLAMA_HOME", "OMP_STACKSIZE", "NUMPY_LLAMA_ISA"} <= read
    assert sorted(name for name in read if f"`{name}`" not in PAGE) == []


def test_every_extra_is_listed():
    pyproject = (ROOT / "pyproject.toml").read_text()
    table = pyproject.partition("[project.optional-dependencies]")[2].partition("\n[project.")[0]
    extras = re.findall(r"^(\w+) = \[", table, re.MULTILINE)
    assert set(extras) == set(re.findall(r"^\| `([a-z]+)` \|", PAGE, re.MULTILINE))

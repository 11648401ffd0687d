"""benchmarks/formats.py: a row for each file, beside the first."""

import sys

import pytest
from helpers.benchmarks import script
from helpers.generations import LLAMA_31

from numpy_llama.checkpoint.presets import Preset


def test_a_table_of_two_formats(tmp_path, monkeypatch, capsys):
    make, files = script("make_weights"), [str(tmp_path / f"{name}.gguf") for name in ("Q4_0", "F32")]
    monkeypatch.setattr(make, "PRESETS", {"tiny": Preset(LLAMA_31)})
    for file, name in zip(files, ("Q4_0", "F32"), strict=True):
        monkeypatch.setattr(sys, "argv", ["make_weights", "tiny", file, "--format", "gguf", "--dtype", name])
        make.main()
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["formats", *files, "-r", "1", "-p", "4", "-n", "2", "-t", "1"])
    script("formats").main()
    about, head, _, *rows = capsys.readouterr().out.splitlines()
    assert "1 threads, medians of 1" in about and head.startswith("| file | tg2 ")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == files and cells[0][2:4] == ["1.00", "1.00"]
    times = float(cells[1][3]) / float(cells[1][2])  # F32 has 4 bytes a weight, Q4_0 has 18 for 32
    assert times == pytest.approx(4 * 32 / 18, rel=0.2)

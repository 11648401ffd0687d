"""The README is true: its output, its quotations, its line counts, its Python; and the examples run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def run(command: list[str], folder: Path = ROOT, silent: bool = True) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONWARNINGS": "error"}
    asked = "Is this a pipe?\n"  # what `chat` without a question reads
    done = subprocess.run(
        command, input=asked, capture_output=True, text=True, cwd=folder, env=env, timeout=300
    )
    assert done.returncode == 0 and not (silent and done.stderr), done.stderr
    return done.stdout


def test_the_first_command_prints_what_is_shown(smollm2_path):
    install, _, command = blocks("sh")[0].strip().partition(" && ")
    assert install == "pip install -e ."
    assert run(["sh", "-c", command]) == blocks("output")[0]


def test_the_quotations_stand_in_the_source():
    source = (ROOT / "numpy_llama" / "model.py").read_text()
    quoted = [block for block in blocks("python") if block.startswith("    def ")]
    assert len(quoted) == 2 and all(block in source for block in quoted)


def test_the_line_counts_are_right():
    rows = re.findall(r"^\| `([\w/.]+)` \| (\d+) \|", README, re.MULTILINE)
    assert len(rows) > 10
    counted = {name: len((ROOT / name).read_text().splitlines()) for name, _ in rows}
    assert {name: int(lines) for name, lines in rows} == counted


def test_the_python_runs(smollm2_path):
    (code,) = [block for block in blocks("python") if block.startswith("import")]
    lines = run([sys.executable, "-c", code]).splitlines()
    assert lines[-2:] == [" Paris", "(1, 9, 6, 6)"] and len(lines) >= 4


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("numpy-llama ")]


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: line.partition("#")[0].strip())
def test_the_commands_run(line, smollm2_path, tmp_path):
    """Each as it is shown, on files of those names; of the benchmark a little only."""
    for name in ("model.gguf", "Meta-Llama-3-8B"):
        (tmp_path / name).symlink_to(smollm2_path)
    shutil.copy(ROOT / "docs" / "course" / "wikitext.txt", tmp_path / "wiki.test.raw")
    less = " -p 16 -n 2 -r 1" if line.startswith("numpy-llama bench") else ""
    told = run(["sh", "-c", line.partition("#")[0] + less], tmp_path, silent=" convert " not in line)
    assert told or (tmp_path / "llama-3-8b-q8.gguf").exists()


def test_the_speed_is_told_with_its_command():
    section = README.partition("## How fast it is")[2].partition("\n## ")[0]
    assert "benchmarks/c_against_numpy.py" in section and re.search(r"\| C \|.*\d", section)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("example", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_the_examples_run_and_are_listed(example, smollm2_path):
    assert run([sys.executable, f"examples/{example}"])
    assert f"`{example}`" in (ROOT / "examples" / "README.md").read_text()


def test_the_benchmark_runs(smollm2_path):
    told = run([sys.executable, "benchmarks/c_against_numpy.py", "-p", "8", "-n", "2", "-r", "1"])
    assert re.search(r"^C +[\d.]+ +[\d.]+$", told, re.MULTILINE)

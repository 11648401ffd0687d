"""The README and the pages of the guide are true: output, quotations, counts, commands, Python, links."""

import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.checkpoint.adapters import write_peft
from numpy_llama.checkpoint.names import expected_shape, tensor_names
from numpy_llama.lora import LowRank

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()

WORKFLOW = ROOT / ".github" / "workflows" / "tests.yml"
FRONT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
GUIDE = sorted((ROOT / "docs" / "guide").glob("*.md"))
REFERENCE = sorted((ROOT / "docs" / "reference").glob("*.md"))
BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
FOUR = ["config", "functional", "cache", "model"]


def blocks(path: Path, language: str) -> list[str]:
    return [block for found, block in BLOCK.findall(path.read_text()) if found == language]


def programs() -> list:
    """Each Python program of a page, and the output that is shown behind it, or None."""
    found = []
    for path in [ROOT / "README.md", *GUIDE, *REFERENCE]:
        shown = [*BLOCK.findall(path.read_text()), ("", "")]
        for (language, code), (behind, output) in pairwise(shown):
            if language == "python" and code.startswith("import "):
                name = f"{path.stem}-{len(found)}"
                found.append(pytest.param(code, output if behind == "output" else None, id=name))
    return found


def shell_lines(path: Path) -> list[str]:
    """The lines of a page for the shell. A line that `&& \\` continues is one with the next."""
    return "\n".join(blocks(path, "sh")).replace(" && \\\n", " && ").splitlines()


def commands() -> list[str]:
    """Each line of a page that calls the program."""
    lines = [line for path in [ROOT / "README.md", *GUIDE, *REFERENCE] for line in shell_lines(path)]
    return [line for line in lines if line.startswith("numpy-llama ")]


def lessons() -> list[str]:
    """The lines of the README that make data and train on them."""
    return [line for line in shell_lines(ROOT / "README.md") if line.startswith("python examples/make_")]


def run(command: list[str], folder: Path = ROOT, silent: bool = True) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONWARNINGS": "error"}
    asked = "Is this a pipe?\n"  # the question that `chat` reads when it is given none
    done = subprocess.run(
        command, input=asked, capture_output=True, text=True, cwd=folder, env=env, timeout=300
    )
    assert done.returncode == 0 and not (silent and done.stderr), done.stderr
    return done.stdout


def test_the_first_command_prints_what_is_shown(smollm2_path):
    install, _, command = blocks(ROOT / "README.md", "sh")[0].strip().partition(" && ")
    assert install == "pip install -e ."
    assert run(["sh", "-c", command]) == blocks(ROOT / "README.md", "output")[0]


def test_the_quotation_stands_in_the_source():
    source = (ROOT / "numpy_llama" / "model.py").read_text()
    (quoted,) = blocks(ROOT / "README.md", "python")
    assert quoted.startswith("    def __call__") and quoted in source


def test_the_budgets_are_kept():
    """CONTRIBUTING.md, "How much a change may cost"."""
    counted = {name: len((ROOT / "numpy_llama" / f"{name}.py").read_text().splitlines()) for name in FOUR}
    assert counted["model"] < 200 and sum(counted.values()) <= 470
    assert len(README.splitlines()) <= 120


def test_the_line_counts_are_right():
    rows = re.findall(r"^\| `numpy_llama/(\w+)\.py` \| (\d+) \|", README, re.MULTILINE)
    counted = [(name, len((ROOT / "numpy_llama" / f"{name}.py").read_text().splitlines())) for name in FOUR]
    assert [(name, int(lines)) for name, lines in rows] == counted


def test_every_room_is_on_the_map():
    shown = re.findall(r"^\| `numpy_llama/(\w+)/` \|", README, re.MULTILINE)
    assert sorted(shown) == sorted(path.parent.name for path in (ROOT / "numpy_llama").glob("*/__init__.py"))


@pytest.mark.parametrize("code, output", programs())
def test_the_python_runs(code, output, smollm2_path):
    printed = run([sys.executable, "-c", code])
    assert printed if output is None else printed == output


@pytest.mark.parametrize("line", commands(), ids=lambda line: line.partition("#")[0].strip())
def test_the_commands_run(line, smollm2_path, tmp_path):
    """Each as it is shown, on files of those names; the benchmark on little input."""
    for name in ("model.gguf", "Meta-Llama-3-8B"):
        (tmp_path / name).symlink_to(smollm2_path)
    if "my-adapter" in line:
        write_adapter(tmp_path / "my-adapter", smollm2_path)
    shutil.copy(ROOT / "docs" / "course" / "wikitext.txt", tmp_path / "wiki.test.raw")
    shutil.copy(ROOT / "docs" / "course" / "wikitext.txt", tmp_path / "corpus.txt")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "Who wrote Faust?", "completion": "Goethe."}')
    (tmp_path / "person.json").write_text(blocks(ROOT / "docs" / "guide" / "use.md", "json")[0])
    (tmp_path / "questions.jsonl").write_text('{"query": "Ice is", "choices": ["cold", "blue"], "gold": 0}')
    if "-m run1" in line:
        (tmp_path / "run1").symlink_to(smollm2_path)
    less = {"bench": " -p 16 -n 2 -r 1", "train": " --iters 1", "finetune": " --iters 1"}
    writes = re.match(r"numpy-llama (convert \S+|(?:merge|train|finetune) .*--out) (\S+)", line)
    command = line.partition("#")[0] + less.get(line.split()[1], "")
    printed = run(["sh", "-c", command], tmp_path, silent=not writes)
    assert printed or (tmp_path / writes[2]).exists()


@pytest.mark.parametrize("line", lessons(), ids=lambda line: line.split()[1])
def test_the_lines_that_train_run(line, smollm2_path, tmp_path):
    """Data, a run and an answer, as they are shown; the run has one step."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    one_step, n = re.subn(
        r"(numpy-llama (?:train|finetune) [^&]*?) &&", r"\1 --iters 1 --seq-len 64 &&", line
    )
    printed = run(["sh", "-c", one_step], tmp_path, silent=False)
    assert n == 1 and printed.count("\n        sample: ") == 1
    assert len(list(tmp_path.glob("*/log.csv"))) == 1


def write_adapter(folder: Path, base: Path) -> None:
    """A small random adapter of the default model."""
    args, rng = open_checkpoint(base).args, np.random.default_rng(0)
    sizes = {name: expected_shape(name, args) for name in tensor_names(args, "ours") if "wq" in name}
    updates = {
        name: LowRank(*(0.02 * rng.normal(size=size).astype("f4") for size in ((4, IN), (OUT, 4))), 1.0)
        for name, (OUT, IN) in sizes.items()
    }
    write_peft(folder, updates, args, "HuggingFaceTB/SmolLM2-135M-Instruct")


def test_the_numbers_of_the_readme_are_those_of_the_benchmarks():
    page = (ROOT / "docs" / "reference" / "benchmarks.md").read_text()
    text = " ".join(README.split())
    decode = re.search(r"decode at ([\d.]+) tokens a second, llama.cpp decodes at (\d+\.\d+)", text)
    prefill = re.search(r"Prefill: (\d+) against (\d+)", text)
    row = re.search(r"^\| Q4_0 \|.*$", page, re.MULTILINE)[0]  # of the first table
    cells = [cell.strip() for cell in row.split("|")]
    assert decode and (cells[2], cells[3]) == decode.groups()
    assert prefill and (cells[6], cells[7]) == prefill.groups()
    found = re.search(
        r"perplexity on WikiText is ([\d.]+) .* ([\d.]+) with the fast .* ([\d.]+) in llama", text
    )
    (row,) = re.findall(r"^\| Q4_1, its own \|.*$", page, re.MULTILINE)
    cells = [cell.strip() for cell in row.split("|")]
    assert found and (cells[2], cells[3], cells[5]) == found.groups()


def test_the_readme_counts_the_laws():
    chapters = sorted((ROOT / "numpy_llama" / "proof").glob("test_*.py"))
    laws = sum(len(re.findall(r"^@(?:law|whole)\(", path.read_text(), re.MULTILINE)) for path in chapters)
    assert f"held equal by {laws} property tests" in " ".join(README.split())


@pytest.mark.parametrize("path", FRONT + GUIDE, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    """Those to files; Sphinx checks those within the site."""
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", [*FRONT, *GUIDE, WORKFLOW], ids=lambda path: path.name)
def test_the_files_that_are_named_exist(path):
    """Wherever a page names a path of this repository; NAME and NN stand for what the reader chooses."""
    rooms = r"(?:numpy_llama|csrc|tests|docs|exercises|examples|benchmarks|\.ci|\.github)"
    named = re.findall(rf"(?<![\w/.~-]){rooms}/[\w./-]*[\w/]", path.read_text())
    built = ("docs/_build",)
    missing = [name for name in named if not (ROOT / name).exists() and "NAME" not in name]
    assert [name for name in missing if not name.startswith(built)] == []


@pytest.mark.parametrize("example", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_the_examples_run_and_are_listed(example, smollm2_path):
    assert run([sys.executable, f"examples/{example}"])
    assert f"`{example}`" in (ROOT / "examples" / "README.md").read_text()


def test_the_benchmark_runs(smollm2_path):
    printed = run([sys.executable, "benchmarks/c_against_numpy.py", "-p", "8", "-n", "2", "-r", "1"])
    assert re.search(r"^C +[\d.]+ +[\d.]+$", printed, re.MULTILINE)

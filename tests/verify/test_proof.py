"""The proof as its users run it: it tests a file of operations, and its message names each fault."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from numpy_llama.proof import plugin

RIGHT = """
from numpy_llama.functional import softmax, silu, rms_norm
"""

WRONG = """
import numpy as np

def rms_norm(x, weight, eps):
    return x / (np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) + eps) * weight

def repeat_kv(x, n_rep):
    return np.tile(x, (1, 1, n_rep, 1))

def silu(x):
    return x / (1 + math.exp(-x))
"""

REPORT = """\
repeat_kv does not keep this law:
  Query head h gets key head h // n_rep: a a b b, not a b a b.

The smallest input found that breaks it:
  repeat_kv(
      x = [[[[6.],
             [2.]]]], float64 of shape (1, 1, 2, 1),
      n_rep = 2,)
  gave   [[[[6.],
            [2.],
            [6.],
            [2.]]]], float64 of shape (1, 1, 4, 1)
  wanted [[[[6.],
            [6.],
            [2.],
            [2.]]]], float64 of shape (1, 1, 4, 1)
  2 of 4 numbers are not the same to the last bit
"""
README = Path(__file__).parents[2] / "README.md"


def hold(folder: Path, ops: str | None, *more: str) -> subprocess.CompletedProcess:
    """`pytest --pyargs numpy_llama.proof --ops my_ops.py` in a folder of its own."""
    if ops is not None:
        (folder / "my_ops.py").write_text(ops)
    command = [sys.executable, "-m", "pytest", "--pyargs", "numpy_llama.proof", "--ops", "my_ops.py", *more]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert "INTERNALERROR" not in done.stdout + done.stderr
    return done


def test_a_right_file_keeps_all_laws(tmp_path):
    done = hold(tmp_path, RIGHT)
    assert done.returncode == 0, done.stdout
    assert "on trial: my_ops.py: rms_norm, softmax, silu" in done.stdout
    rows = [line.split() for line in done.stdout.split("laws that hold")[1].splitlines()[1:4]]
    assert {name for name, *_ in rows} == {"rms_norm", "softmax", "silu"}
    assert all(held == whole and int(held) > 5 for _, held, _, whole in rows)


def test_what_is_wrong_is_said_in_plain_words(tmp_path):
    done = hold(tmp_path, WRONG)
    assert done.returncode == 1
    assert REPORT in done.stdout
    assert REPORT.rpartition("  2 of")[0] in (README.parent / "docs" / "guide" / "proof.md").read_text()
    assert "For x near 0 the norm is x / sqrt(eps), not x / eps." in done.stdout
    assert "raised NameError: name 'math' is not defined\n  in my_ops.py, line 11" in done.stdout
    assert "Traceback" not in done.stdout and "numpy_llama/proof/laws.py" not in done.stdout
    table = done.stdout.split("laws that hold")[1]
    assert re.search(r"^repeat_kv +\d of \d+   <--$", table, re.MULTILINE)
    assert re.search(r"^rms_norm +1\d of \d+   <--$", table, re.MULTILINE)


def test_a_chapter_may_be_chosen(tmp_path):
    done = hold(tmp_path, RIGHT, "-k", "softmax")
    assert done.returncode == 0 and "rms_norm  " not in done.stdout.split("laws that hold")[1]


@pytest.mark.parametrize(
    "ops, message",
    [
        (None, "--ops: my_ops.py does not exist; wanted a Python file"),
        ("def f(:", "--ops: my_ops.py, line 1: SyntaxError: invalid syntax (my_ops.py, line 1)"),
        ("import sys\nsys.exit('no')", "--ops: my_ops.py, line 2: SystemExit: no"),
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("x = 1", "--ops: my_ops.py defines no operation that there is a law about: merge, embedding,"),
    ],
)
def test_a_file_that_cannot_be_tried_is_refused_in_one_line(tmp_path, ops, message):
    done = hold(tmp_path, ops)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stdout == "" and done.stderr.strip().count("\n") == 0
    assert message in done.stderr


def test_other_projects_are_left_alone(tmp_path):
    """A project may have an option and a mark of these names."""
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--ops')\n"
        "def pytest_configure(config):\n    config.addinivalue_line('markers', 'law(x): theirs')\n"
    )
    (tmp_path / "test_theirs.py").write_text(
        "import pytest\n@pytest.mark.law('gravity')\ndef test_it(request):\n"
        "    assert request.config.getoption('--ops') == 'theirs'\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "--ops", "theirs"]
    theirs = {key: value for key, value in os.environ.items() if key != plugin.ASKED}
    done = subprocess.run(command, cwd=tmp_path, env=theirs, capture_output=True, text=True)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


REPORTED = {
    "in place": (
        "def softmax(x):\n    x -= x.max()\n    return x\n",
        ["softmax(x = [[6.]", "it wrote into x", "wanted"],
    ),
    "float32": (
        "import numpy as np\ndef silu(x):\n    x = x.astype(np.float32)\n    return x / (1 + np.exp(-x))\n",
        ["float64 went in, float32 came out"],
    ),
    "no return": (
        "def silu(x):\n    x / 2\n",
        ["silu gave nothing (is a return missing?)"],
    ),
    "a list": ("def silu(x):\n    return [0.0]\n", ["silu gave a list, an array is wanted"]),
    "other parameters": (
        "from numpy_llama import cache\n"
        "class KVCache(cache.KVCache):\n    def update(self, layer, xk, xv):\n        return xk, xv\n"
        "def silu(x, beta):\n    return x\n",
        [
            "silu() missing 1 required positional argument: 'beta'\n  it is called as silu(x)\n",
            "\n  it is called as KVCache.update(layer, start_pos, xk, xv)\n",
        ],
    ),
    "overflow": (
        "import numpy as np\ndef softmax(x):\n    e = np.exp(x)\n    return e / e.sum(-1, keepdims=True)\n",
        ["softmax(x = [[    0.,  1000., -1000.]], float32 of shape (1, 3))", "gave   [[ 0., nan,  0.]]"],
    ),
    "a gradient": (
        "import numpy as np\n"
        "def embedding_backward(dx, tokens, vocab_size):\n"
        "    dweight = np.zeros((vocab_size, dx.shape[-1]), dx.dtype)\n"
        "    dweight[tokens] += dx\n"
        "    return dweight\n"
        "def rms_norm_backward(dy, x, weight, eps):\n"
        "    r = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)\n"
        "    return dy * weight * r, (dy * x * r).reshape(-1, x.shape[-1]).sum(axis=0)\n"
        "def swiglu_backward(ds, gate, up):\n    return ds * up\n",
        [
            "embedding_backward does not keep this law:\n  Each gradient is (loss(x + e) - loss(x - e)) / 2e",
            "vocab_size = 1,)\n  gave ",
            " allowed in result 1 of 2\n",
            "swiglu_backward gave one array, 2 arrays are wanted",
        ],
    ),
    "leaving": (
        "import sys\ndef silu(x):\n    sys.exit(1)\n",
        ["raised SystemExit: 1", "my_ops.py, line 3"],
    ),
}


@pytest.mark.parametrize("fault", REPORTED)
def test_what_is_shown_is_what_was_given(tmp_path, fault):
    ops, messages = REPORTED[fault]
    done = hold(tmp_path, ops, "-k", "formula or as_pytorch or comes_back or overflow or slope")
    assert done.returncode == 1
    for words in messages:
        assert words in done.stdout


def test_what_a_function_prints_hides_no_law(tmp_path):
    ops = "def silu(x):\n    for i in range(100):\n        print('line', i)\n    return x\n"
    done = hold(tmp_path, ops, "-k", "test_swiglu and formula")
    assert done.returncode == 1 and "silu does not keep this law" in done.stdout
    printed = [line for line in done.stdout.splitlines() if line.startswith("line")]
    assert printed == [f"line {i}" for i in range(90, 100)]

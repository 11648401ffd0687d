"""The bits of each kernel are the same with every compiler, system and CPU that has its instruction set.

NEON has the bits of AVX2: its vectors have as many lanes, and its sums the same order.

golden.c prints a hash of the results of each kernel, and golden.txt has them. This file, run as a program,
writes golden.txt anew: after a change that is meant to change bits.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy_llama.backend._kernels as module
import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
GOLDEN = HERE / "golden.txt"
INCLUDED = "linear_gemm.c", "linear_gemv.c"  # by the files of the instruction sets
FLAGS = "-std=c11", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"
ZIG = sys.executable, "-m", "ziglang", "cc", "-target"
CC = os.environ.get("CC", "cc").split()
# How to build, and the prefix that runs the program. Scalar kernels take seconds, all of them a minute.
SCALAR = {
    "cc": ([*CC, "-DSCALAR_ONLY"], []),
    "musl": (["musl-gcc", "-DSCALAR_ONLY", "-static"], []),
    "mingw": (["x86_64-w64-mingw32-gcc", "-DSCALAR_ONLY"], ["wine"]),
}
ALL = {
    "clang": (["clang"], []),
    "aarch64": (["aarch64-linux-gnu-gcc", "-static"], ["qemu-aarch64"]),
    "zig musl": ([*ZIG, "x86_64-linux-musl"], []),
    "zig windows": ([*ZIG, "x86_64-windows-gnu"], ["wine"]),
}
# Run inside the process that has the module: so the hashes are those of the kernels that are installed.
NATIVE = """
import ctypes, sys
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
ctypes.CDLL(sys.argv[2]).main()
"""


def installed(build: tuple[list[str], list[str]]) -> bool:
    compiler, runner = build
    if compiler[:3] == list(ZIG[:3]):
        try:
            import ziglang  # noqa: F401
        except ImportError:
            return False
    return all(shutil.which(name) for name in [compiler[0], *runner[:1]])


def lines_of(out: str) -> dict[str, str]:
    """-> the hash of each kernel, by instruction set, name and format."""
    return dict(line.rsplit(" ", 1) for line in out.splitlines())


def of_module(folder: Path) -> dict[str, str]:
    library = folder / "golden.so"
    build = [*CC, "-shared", "-fPIC", *FLAGS, f"-I{CSRC}", str(HERE / "golden.c"), "-o", str(library)]
    subprocess.run(build, check=True)
    command = [sys.executable, "-c", NATIVE, module.__file__, str(library)]
    return lines_of(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def built(folder: Path, build: tuple[list[str], list[str]]) -> dict[str, str]:
    compiler, runner = build
    sources = [path for path in CSRC.glob("*.c") if path.name not in INCLUDED]
    program = folder / "golden.exe"
    command = [*compiler, *FLAGS, f"-I{CSRC}", *sources, HERE / "golden.c", "-lm", "-o", program]
    subprocess.run([*map(str, command)], check=True)
    quiet = os.environ | {"WINEDEBUG": "-all"}
    return lines_of(
        subprocess.run([*runner, program], check=True, capture_output=True, text=True, env=quiet).stdout
    )


def assert_golden(found: dict[str, str]) -> None:
    golden = lines_of(GOLDEN.read_text())
    golden |= {
        name.replace("avx2", "neon"): value for name, value in golden.items() if name.startswith("avx2 ")
    }
    assert any(name.startswith("scalar ") for name in found)
    assert {name: value for name, value in found.items() if golden.get(name, value) != value} == {}
    for isa in {name.split()[0] for name in golden.keys() & found.keys()}:  # none is missing
        assert {name for name in golden if name.startswith(isa)} == {n for n in found if n.startswith(isa)}


@pytest.mark.skipif(sys.platform != "linux", reason="the module's functions are exported on Linux only")
def test_the_installed_kernels_have_the_golden_bits(tmp_path):
    found = of_module(tmp_path)
    assert_golden(found)
    assert len(found) >= len(lines_of(GOLDEN.read_text())) // 4


@pytest.mark.parametrize("name", [name for name, build in SCALAR.items() if installed(build)])
def test_scalar_kernels_have_the_golden_bits(name, tmp_path):
    assert_golden(built(tmp_path, SCALAR[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, build in ALL.items() if installed(build)])
def test_kernels_of_other_compilers_and_systems_have_the_golden_bits(name, tmp_path):
    """Each that is installed: `apt install clang gcc-aarch64-linux-gnu qemu-user`, `pip install ziglang`."""
    assert_golden(built(tmp_path, ALL[name]))


if __name__ == "__main__":
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        made = lines_of(GOLDEN.read_text() if GOLDEN.exists() else "") | of_module(Path(folder))
    GOLDEN.write_text("".join(f"{name} {value}\n" for name, value in sorted(made.items())))

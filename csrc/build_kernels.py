"""Builds numpy_llama.backend._kernels from the C files beside this one, through cffi (API mode, out of line).

setup.py calls `make_ffi`. `kernels.h` is both the C header and cffi's declaration.
"""

import os
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
SOURCES = ["avx512.c", "avx2.c", "avx_vnni.c", "neon.c", "dispatch.c"]  # first what takes longest to compile
SOURCES += ["pack.c", "linear.c", "linear_backward.c", "quantized_activations.c", "attention.c"]
SOURCES += ["attention_backward.c", "layer.c", "lora.c", "training.c", "probe.c", "formats.c", "quantize.c"]
SOURCES += ["watch.c", "team.c", "cpu.c"]

COMPILE = [
    "-std=c11",
    "-O3",
    # An FMA is only where the source has one: otherwise the compiler would decide the last bit.
    "-ffp-contract=off",
    # Vectors are written by hand. With this pass gcc replaces integer arithmetic and stores beside them by
    # shuffles, and a CPU has one unit for those.
    "-fno-tree-slp-vectorize",
    # Debug information, which Python asks for, takes 40% of the compile time.
    "-g0",
    "-Wall",
    "-Wextra",
]
# Some flags are left out on purpose. The flags -ffast-math and -Ofast also switch the loading thread to
# flush-to-zero. The flag -march=native is not needed: dispatch.c chooses the instruction set when the module
# is loaded.


POOL = ["-DNL_POOL", f"-I{HERE / 'pool'}"]


def links(*arguments: str) -> bool:
    """Whether this compiler makes a program with a parallel region."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "test.c")
        region = "#pragma omp parallel num_threads(n)\n    n = omp_get_num_threads();\n    return n;"
        source.write_text(f"#include <omp.h>\nint main(int n, char **v) {{\n{region}\n}}\n", encoding="utf-8")
        command = [*compiler, str(source), *arguments, "-o", str(Path(folder, "test"))]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            return False  # no compiler at all: the build itself prints the error


def openmp_flags() -> list[str]:
    """The flags for OpenMP if this compiler has its library, else none."""
    return ["-fopenmp"] if links("-fopenmp") else []


def pool_flags() -> list[str]:
    """The flags for pool.c if the compiler knows OpenMP without its library, as Apple's clang and zig do."""
    for flags in (["-fopenmp"], ["-Xclang", "-fopenmp"]):
        if links(*flags, *POOL, f"-I{HERE}", str(HERE / "pool" / "pool.c"), "-pthread"):
            return [*flags, *POOL]
    return []


def make_ffi(
    module: str = "numpy_llama.backend._kernels",
    openmp: list[str] | None = None,
    pool: list[str] | None = None,
) -> FFI:
    """The builder. Threads come from OpenMP, else from pool.c; with neither, the kernels run on one thread.

    Tests choose by giving the flags of one of them, and build under another name.
    """
    if openmp is None and pool is None:
        openmp, pool = openmp_flags(), []
        pool = [] if openmp else pool_flags()
    compile_with = [*(openmp or []), *(pool or [])] or ["-Wno-unknown-pragmas"]
    link_with = ["-pthread"] if pool else openmp or []
    ffi = FFI()
    declarations = (HERE / "kernels.h").read_text(encoding="utf-8")
    ffi.cdef(declarations.replace("#pragma once", ""))  # cffi reads no directives
    # abi3: one compiled module serves every Python from 3.10 on; the free-threaded build has no such ABI.
    limited = not sysconfig.get_config_var("Py_GIL_DISABLED")
    ffi.set_source(
        module,
        '#include <stdint.h>\n#include "kernels.h"',
        sources=[os.path.relpath(HERE / name) for name in [*SOURCES, *(["pool/pool.c"] if pool else [])]],
        depends=[os.path.relpath(path) for path in HERE.rglob("*.[ch]")],
        include_dirs=[str(HERE)],
        extra_compile_args=[*COMPILE, *compile_with],
        extra_link_args=link_with,
        py_limited_api=limited,
    )
    return ffi

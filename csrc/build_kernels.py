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
SOURCES = ["linear.c", "quantized_activations.c", "attention.c", "layer.c", "probe.c"]
SOURCES += ["avx2.c", "avx512.c", "dispatch.c"]  # their vector forms, and the choice among them
SOURCES += ["formats.c", "quantize.c", "watch.c"]

COMPILE = [
    "-std=c11",
    "-O3",
    # Only an FMA that is written is one: otherwise the compiler's choice would decide the last bit.
    "-ffp-contract=off",
    # Vectors are written by hand: of what is put together in whole numbers beside them, and of what is stored
    # to be loaded into all lanes, gcc makes shuffles, for which a CPU has one unit.
    "-fno-tree-slp-vectorize",
    "-Wall",
    "-Wextra",
]
# Not here, on purpose: -ffast-math and -Ofast (they also switch the loading thread to flush-to-zero), and
# -march=native (the choice of an instruction set is made when the module is loaded, by dispatch.c).


def openmp_flags() -> list[str]:
    """The flags for OpenMP if this compiler has it, else none: then the kernels run on one thread."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "test.c")
        source.write_text("#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n")
        command = [*compiler, str(source), "-fopenmp", "-o", str(Path(folder, "test"))]
        try:
            found = subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            found = False  # no compiler at all: the build itself will say so
    return ["-fopenmp"] if found else []


def make_ffi(module: str = "numpy_llama.backend._kernels", openmp: list[str] | None = None) -> FFI:
    """The builder; tests call it to build without OpenMP under another name."""
    openmp = openmp_flags() if openmp is None else openmp
    ffi = FFI()
    ffi.cdef((HERE / "kernels.h").read_text().replace("#pragma once", ""))  # cffi knows no directives
    # abi3: one compiled module serves every Python from 3.10 on; the free-threaded build has no such ABI.
    limited = not sysconfig.get_config_var("Py_GIL_DISABLED")
    ffi.set_source(
        module,
        '#include <stdint.h>\n#include "kernels.h"',
        sources=[os.path.relpath(HERE / name) for name in SOURCES],
        depends=[os.path.relpath(path) for path in HERE.glob("*.[ch]")],
        include_dirs=[str(HERE)],
        extra_compile_args=[*COMPILE, *openmp],
        extra_link_args=openmp,
        py_limited_api=limited,
    )
    return ffi

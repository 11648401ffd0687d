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
            found = False  # no compiler at all: the build itself prints the error
    return ["-fopenmp"] if found else []


def make_ffi(module: str = "numpy_llama.backend._kernels", openmp: list[str] | None = None) -> FFI:
    """The builder; tests call it to build without OpenMP under another name."""
    openmp = openmp_flags() if openmp is None else openmp
    without = [] if openmp else ["-Wno-unknown-pragmas"]
    ffi = FFI()
    ffi.cdef((HERE / "kernels.h").read_text().replace("#pragma once", ""))  # cffi reads no directives
    # abi3: one compiled module serves every Python from 3.10 on; the free-threaded build has no such ABI.
    limited = not sysconfig.get_config_var("Py_GIL_DISABLED")
    ffi.set_source(
        module,
        '#include <stdint.h>\n#include "kernels.h"',
        sources=[os.path.relpath(HERE / name) for name in SOURCES],
        depends=[os.path.relpath(path) for path in HERE.glob("*.[ch]")],
        include_dirs=[str(HERE)],
        extra_compile_args=[*COMPILE, *openmp, *without],
        extra_link_args=openmp,
        py_limited_api=limited,
    )
    return ffi

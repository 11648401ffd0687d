"""Show the settings of this machine and this installation, for when something is slow or missing."""

import argparse
import os
import platform
import shutil
import sys

import numpy as np

from .. import __version__, system
from ..backend import limits
from ..checkpoint.download import DEFAULT_MODEL, cache_folder, model_path
from ..errors import NumpyLlamaError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> None:
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    _line("numpy_llama", __version__)
    _line("Python", f"{platform.python_version()}, {sys.executable}")
    _line("machine", f"{platform.machine()}, {system.cpu_name() or 'unknown CPU'}, {os.cpu_count()} CPUs")
    try:
        from ..backend import kernels
    except NumpyLlamaError as error:
        _line("C kernels", f"NOT USABLE: {error}")
    else:
        openmp = kernels.openmp_version()
        _line("C kernels", f"built by compiler {kernels.compiler()}")
        others = {
            0: "NOT BUILT IN: the kernels run on one thread",
            1: "no library; csrc/pool makes the threads",
        }
        _line("OpenMP", others.get(openmp, f"version {openmp}"))
        _line("instructions", f"{kernels.isa()}, of {', '.join(kernels.available_isas())}")
        _line("threads", f"{limits.available_cpus()}{_quota()} (choose with -t)")
    _line("compiler", compiler or "none on the PATH (needed only to build)")
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    pool = {name: value for name, value in os.environ.items() if name.endswith("_NUM_THREADS")}
    settings = ", ".join(f"{name}={value}" for name, value in pool.items()) or "threads not limited"
    _line("NumPy", f"{np.__version__}, BLAS {blas.get('name')} {blas.get('version')}, {settings}")
    _line("models", f"{cache_folder()}")
    _line(
        "default model",
        f"{DEFAULT_MODEL}, {'there' if model_path(DEFAULT_MODEL).exists() else 'not fetched yet'}",
    )


def _line(what: str, value: str) -> None:
    print(f"{what:<14} {value}")


def _quota() -> str:
    """The CPU quota of the control group, if there are fewer threads than CPUs because of it."""
    quota, cpus = limits.cpu_quota(), limits.affinity()
    return "" if quota is None or quota >= cpus else f" of {cpus} CPUs, for the quota is {quota:g} CPUs"

"""Shared by all tests: the profiles, what the shortest leaves out, the real model, the instruction sets."""

import os
import signal
from pathlib import Path

# The processes of a run share the CPUs, so no thread may spin while it waits. OpenBLAS' threads always do.
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy reads it when it is imported

import numpy as np
import pytest
from hypothesis import settings

from numpy_llama import system
from numpy_llama.backend import kernels
from numpy_llama.checkpoint.download import pull
from numpy_llama.proof import laws
from numpy_llama.text import sandbox

# A busy machine or Python's garbage collector can take longer than a template has, even of CPU time. A test
# of the deadline sets its own.
sandbox.MAX_SECONDS = 600.0

pytest.register_assert_rewrite("helpers")

for _name, _profile in laws.PROFILES.items():
    settings.register_profile(_name, _profile)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "dev")
settings.load_profile(PROFILE)
LEFT_OUT = pytest.StashKey[int]()


def pytest_configure(config) -> None:
    """pytest-xdist would begin with the files of most tests; but those of few are the ones that take long."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config, items) -> None:
    """The profile `dev` leaves out what is marked slow; all others run everything."""
    slow = [item for item in items if PROFILE == "dev" and item.get_closest_marker("slow")]
    items[:] = [item for item in items if item not in set(slow)]
    config.hook.pytest_deselected(items=slow)
    config.stash[LEFT_OUT] = len(slow)
    if hasattr(config, "workeroutput"):  # in a process of pytest-xdist
        config.workeroutput["left out"] = len(slow)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Every process of pytest-xdist collects all tests, and leaves out the same."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left out", 0)


def pytest_terminal_summary(terminalreporter, config) -> None:
    if n := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{n} slow tests were left out; HYPOTHESIS_PROFILE=ci runs them")


# A shell's background job is deaf to Ctrl-C, and so would be the programs that are started here to hear it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# tests/with_data needs a folder of further real files, golden outputs and texts (helpers/data.py).
collect_ignore = [] if "NUMPY_LLAMA_TEST_DATA" in os.environ else ["with_data"]


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, the default model: fetched once, then taken from the cache."""
    return pull("smollm2-135m-instruct")


@pytest.fixture
def main():
    """The command line in this process; the signals that it listens to are put back."""
    from numpy_llama import cli

    listened = (signal.SIGINT, *system.ENDING)
    before = [signal.getsignal(number) for number in listened]
    yield cli.main
    for number, handler in zip(listened, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# Only with quantized activations avx_vnni has functions of its own, and these files test them. All its other
# functions are those of avx2.
QUANTIZING = {"test_quantized_activations", "test_micro_kernel", "test_formats_table", "test_layer"}


def pytest_generate_tests(metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        quantizes = metafunc.definition.path.stem in QUANTIZING
        isas = [isa for isa in kernels.available_isas() if quantizes or isa != "avx_vnni"]
        metafunc.parametrize("isa", isas, indirect=True, scope="module")


@pytest.fixture(scope="module")
def isa(request):
    """Each instruction set that this machine has, in turn."""
    before = kernels.isa()
    kernels.use_isa(request.param)
    yield request.param
    kernels.use_isa(before)


@pytest.fixture(scope="module")
def threads_even_for_little_work():
    before, kernels.WORK_FOR_THREADS = kernels.WORK_FOR_THREADS, 0
    yield
    kernels.WORK_FOR_THREADS = before

"""Shared by all tests: the profiles, the real model, the instruction sets."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from numpy_llama.backend import kernels
from numpy_llama.checkpoint.download import pull
from numpy_llama.proof import laws

pytest.register_assert_rewrite("helpers")

for _name, _profile in laws.PROFILES.items():
    settings.register_profile(_name, _profile)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_configure(config) -> None:
    """pytest-xdist would begin with the files of most tests; but those of few are the ones that take long."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


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
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(params=kernels.available_isas(), scope="module")
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

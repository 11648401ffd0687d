"""The saved state of a run: the same numbers again, and the old file whenever a new one cannot be written."""

import errno
import os
import resource

import numpy as np
import pytest

from numpy_llama.errors import FormatError, MismatchError, NumpyLlamaError, ResourceLimitError
from numpy_llama.training.optimizer import AdamW, Hyperparameters
from numpy_llama.training.state import State, arrays, save_state

OPTIONS = {"lr": 0.1, "targets": ["wq"], "data": "abc"}


def optimizer(seed: int = 0, steps: int = 3) -> AdamW:
    rng = np.random.default_rng(seed)
    parameters = {"a": rng.standard_normal((5, 3)), "b.weight": rng.standard_normal(4)}
    made = AdamW({name: p.astype(np.float32) for name, p in parameters.items()}, Hyperparameters(0.1))
    for _ in range(steps):
        made.step({name: rng.standard_normal(p.shape, np.float32) for name, p in parameters.items()}, 0.1)
    return made


def same(left: AdamW, right: AdamW) -> bool:
    pairs = zip(arrays(left), arrays(right), strict=True)
    return left.t == right.t and all(a[0] == b[0] and a[1].tobytes() == b[1].tobytes() for a, b in pairs)


def test_a_state_comes_back_with_the_same_bits(tmp_path):
    saved, restored = optimizer(), optimizer(seed=1, steps=0)
    save_state(tmp_path / "state", saved, OPTIONS)
    state = State(tmp_path / "state")
    assert state.step == 3 and state.options == OPTIONS
    state.restore(restored)
    assert same(saved, restored)


def test_a_state_fits_its_own_run_only(tmp_path):
    save_state(tmp_path / "state", optimizer(), OPTIONS)
    other = AdamW({"a": np.zeros((3, 5), np.float32)}, Hyperparameters(0.1))
    with pytest.raises(MismatchError, match=r"has F32 of shape \(5, 3\) .*wanted F32 of shape \(3, 5\)"):
        State(tmp_path / "state").restore(other)
    other = AdamW({"c": np.zeros((3, 5), np.float32)}, Hyperparameters(0.1))
    with pytest.raises(MismatchError, match="has nothing as 'parameter/c'"):
        State(tmp_path / "state").restore(other)


@pytest.mark.parametrize("name, value", [("lr", 0.2), ("targets", None), ("seed", 1)])
def test_a_run_is_resumed_with_its_own_options(name, value, tmp_path):
    save_state(tmp_path / "state", optimizer(), OPTIONS)
    state = State(tmp_path / "state")
    state.check_options(OPTIONS, ())
    state.check_options(OPTIONS | {name: value}, (name,))
    with pytest.raises(MismatchError, match=f"begun with {name} .*{value}"):
        state.check_options(OPTIONS | {name: value}, ())


def test_what_is_no_state_is_refused(tmp_path):
    (tmp_path / "state").write_bytes(b"x" * 100)
    with pytest.raises(NumpyLlamaError, match="state"):
        State(tmp_path / "state")
    with pytest.raises(FormatError, match="is not there"):
        State(tmp_path / "none")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_when_writing_fails_the_old_state_stands(function, number, tmp_path, monkeypatch):
    path, old = tmp_path / "state", optimizer()
    save_state(path, old, OPTIONS)

    def fail(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(NumpyLlamaError, match=os.strerror(number)):
        save_state(path, optimizer(seed=1), OPTIONS)
    monkeypatch.undo()
    restored = optimizer(seed=2)
    State(path).restore(restored)
    assert same(old, restored) and os.listdir(tmp_path) == ["state"]


def test_a_full_disk_is_named_and_the_old_state_stands(tmp_path):
    path, old = tmp_path / "state", optimizer()
    save_state(path, old, OPTIONS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(ResourceLimitError, match="nothing was changed"):
            save_state(path, optimizer(seed=1), OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    restored = optimizer(seed=2)
    State(path).restore(restored)
    assert same(old, restored) and os.listdir(tmp_path) == ["state"]

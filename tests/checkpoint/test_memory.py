"""The memory plan: its numbers, held against what a process really takes, and its refusals."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers.command_line import PROGRAM, assert_refused
from helpers.gguf_writer import write_llama
from helpers.tiny_models import float_weights, stored

import numpy_llama as nl
from numpy_llama.backend import limits
from numpy_llama.backend.formats import StoredTensor
from numpy_llama.backend.kernels import KernelWeight
from numpy_llama.checkpoint import memory, open_checkpoint
from numpy_llama.checkpoint.convert import target_format
from numpy_llama.errors import ResourceLimitError
from numpy_llama.proof.tiny import TINY_BLOCKS

ARGS = replace(TINY_BLOCKS, max_seq_len=4096)
PEAK_ERROR = 1.05  # how far beyond the plan a process may go
PEAK_SLACK = 24 << 20  # and what a plan may leave out: pages of libraries, the allocator's reserves


def plan_of(weights, backend="c", dtype=None, args=ARGS):
    return memory.memory_plan(args, weights, backend, dtype)


def weights_in(format="Q8_0", args=ARGS):
    return stored(float_weights(args), format)


def test_weights_in_place_take_what_they_take_in_the_file():
    weights = weights_in("BF16")
    plan = plan_of(weights)
    assert (plan.mapped, plan.made) == (sum(w.nbytes for w in weights.values()), 0)
    assert plan.parameters == sum(w.dequantize().size for w in weights.values())
    assert plan.kv_per_position == 2 * 2 * 2 * 16 * 2  # float16
    assert plan.peak(1000) - plan.peak(0) == 1000 * plan.kv_per_position


@pytest.mark.parametrize("tied", [False, True])
def test_packed_rows_are_counted_apart(tied):
    """Of the embedding only rows are used, in place, unless it is the output's weight too."""
    weights = weights_in("Q8_0", replace(ARGS, vocab_size=ARGS.vocab_size + 1))
    embedding = weights["tok_embeddings.weight"]
    if tied:
        weights["output.weight"] = embedding
    plan = plan_of(weights)
    different = {id(w): w for w in weights.values()}.values()
    packed = [w for w in different if len(w.shape) == 2 and (tied or w is not embedding)]
    assert plan.made == sum(KernelWeight(w).rows.nbytes for w in packed)
    assert plan.mapped == sum(w.nbytes for w in different) - sum(w.nbytes for w in packed)


def test_weights_that_must_be_made_are_counted_apart():
    weights = weights_in("BF16")
    name = "layers.0.attention.wo.weight"
    weights[name] = StoredTensor(
        weights[name].format, weights[name].shape, lambda rows: np.empty(0, np.uint8)
    )
    plan = plan_of(weights)
    assert plan.made == weights[name].nbytes
    assert plan.mapped == sum(w.nbytes for w in weights.values()) - plan.made


@pytest.mark.parametrize("dtype, itemsize", [(None, 4), (np.float64, 8)])
def test_the_numpy_path_expands_weights(dtype, itemsize):
    plan = plan_of(weights_in(), "numpy", dtype)
    vectors = sum(w.nbytes for w in weights_in().values() if len(w.shape) == 1)
    in_place = vectors if itemsize == 4 else 0
    assert (plan.mapped, plan.made) == (in_place, plan.parameters * itemsize - in_place)


def test_a_tied_embedding_counts_once():
    weights = weights_in()
    weights["output.weight"] = weights["tok_embeddings.weight"]
    assert plan_of(weights).parameters == plan_of(weights_in()).parameters - ARGS.vocab_size * ARGS.dim


def test_narrow_rows_are_padded_copies():
    args = replace(ARGS, hidden_dim=72)
    weights = weights_in("F32", args)
    w_down = [w for name, w in weights.items() if name.endswith("w_down.weight")]
    assert plan_of(weights, args=args).made == 2 * w_down[0].shape[0] * 96 * 4


def test_room_for_a_context():
    plan = plan_of(weights_in())
    for positions in (0, 1, 512, 4096):
        assert plan.context_within(plan.peak(positions)) == positions
        assert plan.context_within(plan.peak(positions) - 1) == max(0, positions - 1)
    assert plan.context_within(plan.peak(9999)) == 4096


def test_what_does_not_fit_is_refused_with_what_would():
    instead = {"bf16": 16 << 30, "q8": 9 << 30, "q4": 5 << 30}
    plan = memory.MemoryPlan(16 << 30, 0, 1 << 18, 1 << 28, 8192, 8192, 8 << 30, instead)
    plan.check(plan.peak(512), "m")
    with pytest.raises(ResourceLimitError) as caught:
        plan.check(12 << 30, "m.gguf")
    message = str(caught.value)
    for word in ("m.gguf", "weights 16.0 GiB", "128.0 MiB for 512 tokens", "scratch 256.0 MiB", "16.4 GiB"):
        assert word in message
    assert "12.0 GiB are available" in message and message.endswith(
        "what would fit: q8 (9.4 GiB), q4 (5.4 GiB)"
    )
    with pytest.raises(ResourceLimitError, match=r"no other format would fit, the smallest takes 5\.4 GiB"):
        plan.check(4 << 30, "m")


def test_the_sizes_after_converting(tmp_path):
    path = write_llama(tmp_path / "x.gguf", ARGS, float_weights(ARGS), "F32")
    opened = open_checkpoint(path)
    sizes = plan_of(opened.weights()).instead
    assert plan_of(opened.weights(), "numpy").instead == sizes | {
        "`--backend c`": plan_of(opened.weights()).mapped
    }
    for dtype in ("bf16", "q8", "q4"):
        converted = {n: target_format(n, w.shape, dtype) for n, w in opened.weights().items()}
        assert converted["norm.weight"].name == "F32"
        wanted = 0
        for name, w in opened.weights().items():
            wanted += np.prod(w.shape) // converted[name].block * converted[name].block_bytes
        assert sizes[f"a file by `numpy-llama convert --dtype {dtype}`"] == wanted


def test_available_memory_is_the_least_of_the_limits(monkeypatch):
    monkeypatch.setattr(memory.system, "free_memory", lambda: 7)
    monkeypatch.setattr(memory, "_container", lambda: None)
    monkeypatch.setattr(memory, "_own_limit", lambda: None)
    assert memory.available_memory() == 7
    monkeypatch.setattr(memory, "_container", lambda: 5)
    assert memory.available_memory() == 5
    monkeypatch.setattr(memory, "_own_limit", lambda: 3)
    assert memory.available_memory() == 3
    assert memory.available_memory(mapped=1) == 4


def test_a_container_has_a_limit_and_gives_back_what_only_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "CGROUP", tmp_path)
    monkeypatch.setattr(limits, "PROC", tmp_path)
    assert memory._container() is None
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._container() is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._container() == 300
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 250\n")
    assert memory._container() == 550
    version_1 = tmp_path / "memory"
    version_1.mkdir()
    (version_1 / "memory.limit_in_bytes").write_text("900\n")
    (version_1 / "memory.usage_in_bytes").write_text("800\n")
    assert memory._left_in(version_1) == 100


MEASURE = """
import json, sys
from pathlib import Path
import numpy_llama as nl
from numpy_llama import system
from numpy_llama.checkpoint import memory
from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.checkpoint.convert import target_format
path, backend = sys.argv[1:]
opened = open_checkpoint(Path(path))
plan = memory.memory_plan(opened.args, opened.weights(), backend)
llama = nl.load(path, backend=backend)
prompt = [1 + i % 100 for i in range(600)]
llama.generate(prompt, max_tokens=4)
peak = system.peak_memory()
print(json.dumps({"planned": plan.peak(604), "peak": peak}))
"""


@pytest.mark.parametrize("backend", ["c", pytest.param("numpy", marks=pytest.mark.slow)])
def test_a_real_run_stays_within_its_plan(backend, smollm2_path):
    command = [sys.executable, "-c", MEASURE, str(smollm2_path), backend]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    if backend == "numpy":  # the file was read too; its pages count as ours until somebody wants them
        found["planned"] += smollm2_path.stat().st_size
    assert found["peak"] < PEAK_ERROR * found["planned"] + PEAK_SLACK
    assert found["peak"] > 0.6 * found["planned"]  # nor does the plan frighten for nothing


def test_loading_beyond_a_limit_is_refused_in_one_line(smollm2_path):
    limit = ["bash", "-c", 'ulimit -v 700000; exec "$@"', "-"]  # kB of address space
    command = [*limit, PROGRAM, "generate", "-m", str(smollm2_path)]
    done = subprocess.run([*command, "--backend", "numpy", "hello"], capture_output=True)
    assert_refused(done, 1, "does not fit", "weights 513", "available", "would fit: `--backend c`")


def test_the_context_is_cut_to_what_fits(tmp_path, monkeypatch):
    path = write_llama(tmp_path / "x.gguf", ARGS, float_weights(ARGS), "F32")
    opened = open_checkpoint(path)
    plan = memory.memory_plan(opened.args, opened.weights(), "c")
    monkeypatch.setattr(opened.__class__, "tokenizer", lambda self: Vocabulary())
    monkeypatch.setattr("numpy_llama.llama.available_memory", lambda mapped: plan.peak(600))
    llama = nl.load(path)
    assert llama.max_context == llama.new_session().cache.max_seq_len == 600
    with pytest.raises(ResourceLimitError, match="601 tokens was asked for, memory has room for 600"):
        llama.new_session(601)
    assert llama.new_session(10).cache.max_seq_len == 10


class Vocabulary:
    vocab_size = n_used = 40

    def check_rows(self, rows):
        """Any embedding will do."""

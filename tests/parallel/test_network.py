"""The speed to expect of several machines, against numbers by hand, and the plan that `info` prints."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.command_line import assert_refused, run
from helpers.tiny_models import SPEAKER, write_speaker

from numpy_llama.backend import kernels
from numpy_llama.backend.formats import FORMATS
from numpy_llama.checkpoint.presets import PRESETS
from numpy_llama.cli.info import numbered
from numpy_llama.parallel import network
from numpy_llama.parallel.cut import Plan
from numpy_llama.parallel.load import in_eighths
from numpy_llama.parallel.network import (
    FLOAT32,
    NETWORKS,
    ROUNDED,
    bytes_sent,
    decode_seconds,
    measured_bandwidth,
    prefill_limit,
    received,
)
from numpy_llama.proof.tiny import TINY_BLOCKS

MODELS = {"70B": "llama-3-70b", "405B": "llama-3.1-405b"}


def speed(model, format, N, over) -> float:
    """Tokens a second on N machines of 60 GB/s, as chapter 21 counts."""
    preset, of = PRESETS[MODELS[model]], FORMATS[format]
    n = preset.n_parameters - preset.args.vocab_size * preset.args.dim
    plan = Plan.of(preset.args, [1] * N)
    read = [n * of.block_bytes / of.block / N] * N
    return 1 / decode_seconds(plan, read, 60e9, over, ROUNDED)


@pytest.mark.parametrize("format, alone, speeds", [
    ("Q4_0", 1.53, [[2.6, 4.0, 5.5], [2.8, 4.8, 7.5], [2.9, 5.6, 10.1], [3.0, 5.9, 11.2]]),
    ("Q8_0", 0.81, [[1.5, 2.5, 3.9], [1.5, 2.8, 4.9], [1.6, 3.1, 5.8], [1.6, 3.2, 6.2]]),
])  # fmt: skip
def test_a_70b_on_several_machines(format, alone, speeds):
    assert round(speed("70B", format, 1, NETWORKS[0]), 2) == alone
    for over, wanted in zip(NETWORKS, speeds, strict=True):
        assert [round(speed("70B", format, N, over), 1) for N in (2, 4, 8)] == wanted, over


def test_a_405b_on_several_machines():
    found = [speed("405B", "Q4_0", N, NETWORKS[i]) for N, i in ((1, 0), (8, 0), (8, 2))]
    assert np.round(found, 2).tolist()[0] == 0.26 and np.round(found[1:], 1).tolist() == [1.3, 1.9]


def test_a_network_bounds_the_prompt():
    plan = Plan.of(PRESETS["llama-3-70b"].args, [1] * 4)
    assert [round(prefill_limit(plan, NETWORKS[i], ROUNDED)) for i in (0, 2)] == [14, 137]


@pytest.mark.parametrize("name, one, many", [
    ("Q4_0", ROUNDED, ROUNDED), ("NF4", ROUNDED, ROUNDED),
    ("BF16", FLOAT32, ROUNDED), ("F32", FLOAT32, FLOAT32),
])  # fmt: skip
def test_what_c_rounds_is_sent_rounded(name, one, many):
    format = FORMATS[name]
    assert (bytes_sent(format, 1), bytes_sent(format, 512)) == (one, many)
    rounds = [kernels.quantizes_activations(format, tokens) for tokens in (1, 512)]
    assert rounds == [one == ROUNDED, many == ROUNDED]


def test_a_rank_receives_what_the_others_have():
    args = replace(TINY_BLOCKS, dim=128, n_heads=4, n_kv_heads=4, head_dim=16, hidden_dim=256)
    plan = Plan.of(args, [3, 1])
    assert received(plan, 0, FLOAT32) == 4 * (64 // 4 + 256 // 4 + 2 * 128 // 4)
    assert received(plan, 0) == ROUNDED * (64 // 4 + 256 // 4) + 4 * (2 * 128 // 4)
    assert received(plan, 1) == 3 * received(plan, 0)
    assert received(Plan.of(args, [1]), 0) == 0


def test_the_slowest_rank_sets_the_pace():
    plan = Plan.of(TINY_BLOCKS, [1, 1])
    one, other = (decode_seconds(plan, read, 1e9, NETWORKS[0]) for read in ([4e9, 1e9], [2e9, 3e9]))
    assert one - other == pytest.approx(1)


def test_this_machine_reads_from_its_memory():
    assert 1e8 < measured_bandwidth(1) < 1e13


@pytest.mark.parametrize("available, ranks, wanted", [
    (8 << 30, 1, 1 << 29), (1 << 30, 1, 1 << 28), (1 << 30, 4, 1 << 26), (0, 2, 1 << 20),
])  # fmt: skip
def test_a_measurement_leaves_memory_to_others(available, ranks, wanted, monkeypatch):
    taken = []
    monkeypatch.setattr(network, "available_memory", lambda: available)
    monkeypatch.setattr(kernels, "read_probe", lambda pieces, threads: taken.append(pieces[0].nbytes))
    measured_bandwidth(1, ranks)
    assert set(taken) == {wanted}


@pytest.mark.parametrize("bandwidths, shares", [
    ([60e9, 57e9, 58e9], [8, 8, 8]),
    ([60e9, 20e9], [8, 3]),
    ([1e9, 100e9], [1, 8]),
    ([5.0], [8]),
])  # fmt: skip
def test_shares_by_speed(bandwidths, shares):
    """Each within a sixteenth of the fastest; equal machines have equal shares."""
    assert in_eighths(bandwidths) == shares


def test_info_prints_the_plan(tmp_path):
    path = write_speaker(tmp_path / "m.gguf")
    done = run("info", str(path), "--ranks", "4", "--bandwidth", "60")
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 0 and done.stderr == b""
    begin = lines.index(f"Each rank, with a context of {SPEAKER.max_seq_len} tokens:")
    ranks, speeds = lines[begin + 1 : begin + 4], lines[-6:]
    assert ranks[0].split()[:2] == ["ranks", "heads"] and ranks[1].split()[1] == "1"
    assert speeds[0].split() == ["network", "latency", "decode", "prompt"]
    assert [line.rsplit(maxsplit=4)[0] for line in speeds[1:5]] == [one.name for one in NETWORKS]
    assert speeds[5].startswith("one machine")
    assert len({len(line) for line in speeds}) == 1  # aligned
    uneven = run("info", str(path), "--ranks", "2", "--shares", "3,1").stdout.decode()
    assert "measured here" in uneven and "\n0          3" not in uneven


@pytest.mark.parametrize("options, code, words", [
    (["--ranks", "5"], 1, "5 ranks, but the model has 4 query heads"),
    (["--ranks", "3", "--shares", "1,2"], 2, "shares are [1.0, 2.0], they must be 3 numbers above 0"),
    (["--ranks", "2", "--shares", "auto"], 2, "shares are 'auto', they must be 2 numbers above 0"),
    (["--shares", "1,2"], 2, "--shares and --bandwidth are for a plan: give --ranks too"),
    (["--bandwidth", "60"], 2, "--shares and --bandwidth are for a plan: give --ranks too"),
    (["--ranks", "2", "--bandwidth", "nan"], 2, "--bandwidth is nan, it must be a number of GB/s above 0"),
])  # fmt: skip
def test_an_impossible_plan_is_one_line(options, code, words, tmp_path):
    assert_refused(run("info", str(write_speaker(tmp_path / "m.gguf")), *options), code, words)


@pytest.mark.parametrize("ranks, text", [([3], "3"), ([0, 1, 2], "0-2"), ([0, 2, 3, 7], "0,2-3,7")])
def test_equal_ranks_are_one_line(ranks, text):
    assert numbered(ranks) == text

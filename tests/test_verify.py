"""`verify`: a healthy model passes, every sabotaged copy is named, with another copy beside it and without."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from gguf_writer import llama_metadata, random_weights, write_llama
from test_cli import PROGRAM, run
from test_convert import byte_vocabulary
from test_tokenizer import pre_tokenizer
from tokenizers import models

from numpy_llama import cli, kernels, verify
from numpy_llama.checkpoint import Checkpoint, open_checkpoint
from numpy_llama.checkpoint.names import interleaved_rows, tensor_names
from numpy_llama.config import ModelArgs, RopeScaling
from numpy_llama.presets import PRESETS
from numpy_llama.quantize import FORMATS, StoredTensor
from numpy_llama.verify import compare, operations, weights
from numpy_llama.verify.diagnosis import published

TINY = ModelArgs(
    dim=64,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
    hidden_dim=96,
    vocab_size=300,
    norm_eps=1e-5,
    rope_theta=1e4,
    max_seq_len=512,
)


# --- sabotage ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(smollm2_path) -> Checkpoint:
    return open_checkpoint(smollm2_path)


@pytest.fixture
def only_look(monkeypatch):
    """All but the operations, which other tests look at: they take most of the time."""

    def look_at_all(opened, ids, threads, progress, look):
        for name, weight in opened.weights().items():
            if name not in ("tok_embeddings.weight", "output.weight"):
                layer, _, short = name.removeprefix("layers.").removesuffix(".weight").partition(".")
                look(int(layer), short, weight.dequantize()) if short else look(None, layer, weight.dequantize())
        return []

    monkeypatch.setattr(verify, "operation_errors", look_at_all)


class Copy:
    """The bytes of a GGUF file, to be spoilt: `copy[name]` are the rows of a weight under our name."""

    def __init__(self, opened: Checkpoint):
        self.data = np.fromfile(opened.path, np.uint8)
        self.tensors, self.names = opened.tensors, tensor_names(opened.args, "gguf")
        self.layers = range(opened.args.n_layers)

    def __getitem__(self, name: str) -> np.ndarray:
        info = self.tensors[self.names[f"{name}.weight"]]
        return self.data[info.offset : info.offset + info.nbytes].reshape(info.shape[0], -1)


def half_split(copy: Copy) -> None:
    for i in copy.layers:
        for name, n in (("wq", 9), ("wk", 3)):
            rows = copy[f"layers.{i}.attention.{name}"]
            rows[:] = rows[np.argsort(interleaved_rows(n, 64))]


def twice(copy: Copy) -> None:
    for i in copy.layers:
        for name, n in (("wq", 9), ("wk", 3)):
            rows = copy[f"layers.{i}.attention.{name}"]
            rows[:] = rows[interleaved_rows(n, 64)]


def theta(copy: Copy) -> None:
    key = b"llama.rope.freq_base"
    at = copy.data.tobytes().index(key) + len(key) + 4
    (value,) = copy.data[at : at + 4].view("<f4")
    assert value == 100000
    copy.data[at : at + 4].view("<f4")[:] = 10000


def exchanged(copy: Copy) -> None:
    for i in copy.layers:
        gate, up = (copy[f"layers.{i}.feed_forward.{name}"] for name in ("w_gate", "w_up"))
        gate[:], up[:] = up.copy(), gate.copy()


def bit(number: int, at: int = 100) -> Callable[[Copy], None]:
    def flip(copy: Copy) -> None:
        copy["layers.12.ffn_norm"][at, number // 8] ^= 1 << number % 8

    return flip


def bit_of_a_matrix(copy: Copy) -> None:
    copy["layers.5.feed_forward.w_up"][700, 40] ^= 4


NORM = r"layers\.12\.ffn_norm\.weight\[100\] is"
SPLIT = r"are in Hugging Face's order \(half-split\), not in pairs"
# What is done to a copy of SmolLM2, and what the verdict must say: of the file alone, and beside the original.
SABOTAGE = {
    "permutation": (half_split, f"the rows of wq and wk {SPLIT}", f"wq, .*wk of layers 0..29: the rows {SPLIT}"),
    "permutation twice": (twice, "the rows of wq and wk were un-permuted twice", "the rows were un-permuted twice"),
    "theta": (theta, "rope_theta is 10000, it should be 100000", "rope_theta is 10000, the reference has 100000"),
    "w1 and w3": (exchanged, "w_gate and w_up .* are exchanged", "w_gate, .*w_up of layers 0..29: exchanged"),
    "sign": (bit(31), f"{NORM} -0.03.*: bit 31, the sign, is flipped", f"{NORM} -0.03.*wanted 0.03.*bit 31, the sign"),
    "exponent": (bit(30), rf"{NORM} .*e\+37.*bit 30 flipped", f"{NORM} .*wanted 0.03.*bit 30"),
    "mantissa": (bit(4), f"{NORM} 0.034912169, all others .* bfloat16 numbers: bit 4", f"{NORM} .*: bit 4 of its 32"),
    "bit of a block": (bit_of_a_matrix, None, r"layers\.5.*w_up\.weight\[700, 64\] .*: bit 2 of byte 0 of its block"),
}  # fmt: skip


def verdict(capsys, code: int, *arguments: object) -> str:
    """The last line that the command prints; it ends with `code`."""
    assert cli.main(["verify", *map(str, arguments)]) == code
    out, err = capsys.readouterr()
    *_, last = out.splitlines()
    assert last.startswith("verdict: ") and err == "" and out.count("verdict") == 1
    return last


def test_a_healthy_model_passes(smollm2_path):
    done = run("verify", "-m", str(smollm2_path))
    told = done.stdout.decode()
    assert (done.returncode, done.stderr) == (0, b"")
    lines = told.splitlines()
    assert lines[-1] == "verdict: nothing wrong found" and "wrong  " not in told and "!" not in lines[4]
    assert max(map(len, lines)) <= 110
    for name in ("C, exact", "C, default", "PyTorch", "sample text 2.5"):
        assert sum(line.startswith(name) for line in lines) == 1
    assert [line.split()[0] for line in lines[3:34]] == [*map(str, range(30)), "end"]


@pytest.mark.parametrize("what", SABOTAGE)
def test_a_sabotaged_copy_is_named(what, smollm2, only_look, tmp_path, capsys):
    spoil, alone, beside = SABOTAGE[what]
    copy, path = Copy(smollm2), tmp_path / "sabotaged.gguf"
    spoil(copy)
    copy.data.tofile(path)
    if alone is not None:
        assert_found(alone, verdict(capsys, 3, "-m", path))
    assert_found(beside, verdict(capsys, 3, "-m", path, "--against", smollm2.path))


def assert_found(pattern: str, text: str) -> None:
    import re

    assert re.search(pattern, text), text


# --- shards -----------------------------------------------------------------------------------------------


def write_shards(opened: Checkpoint, folder: Path, n: int, shuffled: range = range(0)) -> None:
    """A Hugging Face folder in float16. Layers of `shuffled` are another model's: the channels of the
    residual stream, as they know them, in another order."""
    folder.mkdir()
    args, names = opened.args, tensor_names(opened.args, "hf")
    del names["output.weight"]
    order = np.random.default_rng(1).permutation(args.dim)
    files: list[dict[str, np.ndarray]] = [{} for _ in range(n)]
    for ours, theirs in names.items():
        w = opened.weights()[ours].dequantize()
        layer = int(ours.split(".")[1]) if ours.startswith("layers.") else None
        if "wq" in ours or "wk" in ours:
            w = w[np.argsort(interleaved_rows(len(w) // args.head_dim, args.head_dim))]
        if layer in shuffled:
            w = w[order] if ours.endswith(("wo.weight", "w_down.weight")) else w[..., order]
        files[0 if layer is None else layer * n // args.n_layers][theirs] = w.astype("<f2")
    weight_map = {}
    for i, tensors in enumerate(files):
        name, end, header = f"model-{i + 1:05}-of-{n:05}.safetensors", 0, {}
        for theirs, w in tensors.items():
            header[theirs] = {"dtype": "F16", "shape": w.shape, "data_offsets": [end, end := end + w.nbytes]}
            weight_map[theirs] = name
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for w in tensors.values():
                file.write(np.ascontiguousarray(w).data)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "intermediate_size": args.hidden_dim,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "max_position_embeddings": args.max_seq_len,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    metadata = opened.tokenizer().metadata
    texts = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE({text: i for i, text in enumerate(texts)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizer("smollm")
    types = metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens([text for text, type in zip(texts, types, strict=True) if type == 3])
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_shard_of_another_model_is_named(smollm2, only_look, tmp_path, capsys):
    folder = tmp_path / "model"
    write_shards(smollm2, folder, 4, range(15, 23))  # the third shard
    told = verdict(capsys, 3, "-m", folder)
    assert_found(r"weights of model-00003-of-00004.safetensors \(layers 15..22\) do not belong to this model", told)
    told = verdict(capsys, 3, "-m", folder, "--against", smollm2.path)
    assert_found("model-00003-of-00004.safetensors belongs to another model: all weights of layers 15..22", told)


# --- faults of the kernels --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    return write_tiny(path)


def write_tiny(path: Path, format: str = "Q8_0", change=lambda weights: None, args: ModelArgs = TINY) -> Path:
    weights = random_weights(args, np.random.default_rng(0))
    change(weights)
    return write_llama(path, args, weights, format, **byte_vocabulary(args.vocab_size))


def test_of_an_untrained_model_nothing_is_said(tiny, capsys):
    assert cli.main(["verify", "-m", str(tiny)]) == 0
    out, _ = capsys.readouterr()
    assert "the sample text says nothing" in out and out.endswith("verdict: nothing wrong found\n")


@pytest.mark.parametrize("operation", ["wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_wrong_product_is_named_by_layer_and_operation(operation, exact, tiny, monkeypatch, capsys):
    group = "attention" if len(operation) == 2 else "feed_forward"
    spoilt = open_checkpoint(tiny).weights()[f"layers.1.{group}.{operation}.weight"]
    right = kernels.Kernels.linear

    def linear(self, x, w):
        y = right(self, x, w)
        if self.exact == exact and np.array_equal(w.tensor.data, spoilt.data):
            y[..., 5] *= np.float32(1.001)  # one row of the weights, a thousandth
        return y

    monkeypatch.setattr(kernels.Kernels, "linear", linear)
    told = verdict(capsys, 3, "-m", tiny)
    who = "C, exact" if exact else "C, default"
    assert f"the error starts in layer 1, at {operation} ({who} against NumPy" in told and "1 places" in told


def test_a_wrong_attention_and_a_wrong_layer_are_named(tiny, monkeypatch, capsys):
    attention, layer = kernels.Kernels.attention, kernels.Kernels.layer

    def wrong(self, q, k, v):
        return attention(self, q, k, v) * np.float32(1 - 1e-3 * (q.shape[1] == 1))  # of one token only

    with monkeypatch.context() as patch:
        patch.setattr(kernels.Kernels, "attention", wrong)
        assert "in layer 0, at attention (C, exact, C, default" in verdict(capsys, 3, "-m", tiny)

    def wrong_layer(self, w, x, starts, *rest):
        return layer(self, w, x, starts, *rest) * np.float32(1 + 1e-2 * (self.exact and starts[0] > 0))

    monkeypatch.setattr(kernels.Kernels, "layer", wrong_layer)
    assert "in layer 0, at layer (C, exact against" in verdict(capsys, 3, "-m", tiny)


@pytest.mark.parametrize("function", ["rms_norm", "apply_rotary_emb", "silu", "attention", "linear"])
def test_pytorch_sees_what_numpy_does_wrong(function, tiny, monkeypatch, capsys):
    right = getattr(operations.F, function)
    monkeypatch.setattr(operations.F, function, lambda *given: right(*given) * np.float32(1 + 1e-3))
    places = {"rms_norm": "attention_norm", "apply_rotary_emb": "rope", "silu": "swiglu", "linear": "wq"}
    told = verdict(capsys, 3, "-m", tiny)
    assert f"starts in layer 0, at {places.get(function, function)} (" in told and "PyTorch" in told


def test_a_wrong_end_is_named(tiny, monkeypatch, capsys):
    right = kernels.Kernels.linear

    def linear(self, x, w):
        y = right(self, x, w)
        return y + np.float32(1e-3) if len(w) == TINY.vocab_size else y

    monkeypatch.setattr(operations, "OUTPUT_ROWS", 1 << 20)
    monkeypatch.setattr(kernels.Kernels, "linear", linear)
    assert "the error starts after the last layer, at output" in verdict(capsys, 3, "-m", tiny)


def test_without_pytorch_it_says_so(tiny, monkeypatch, capsys):
    monkeypatch.setattr(operations, "pytorch", lambda: None)
    assert cli.main(["verify", "-m", str(tiny)]) == 0
    out, _ = capsys.readouterr()
    assert sum(line.startswith("PyTorch     is not installed") for line in out.splitlines()) == 1


def test_json_tells_all(tiny, capsys):
    assert cli.main(["verify", "-m", str(tiny), "-t", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["verdict"] == "nothing wrong found" and told["faults"] == []
    places = {(e["layer"], e["operation"], e["implementation"]) for e in told["errors"]}
    assert len(places) == TINY.n_layers * (13 + 8 * 2) + 2 + 2 + 1 - TINY.n_layers
    assert all(0 <= e["share"] < 1 for e in told["errors"])
    assert told["sample"]["tokens"] > 100 and told["seconds"] > 0


@pytest.mark.parametrize("format", [name for name, f in FORMATS.items() if f.quantize])
@pytest.mark.parametrize("scaling", [None, RopeScaling(8.0, original_max_seq_len=16), RopeScaling(4.0, type="linear")])
def test_every_format_passes(format, scaling, tmp_path, monkeypatch):
    """Through GGUF, where there is a place for it."""
    args = replace(TINY, rope_scaling=scaling)
    opened = open_checkpoint(write_tiny(tmp_path / "model.gguf", format))
    monkeypatch.setattr(type(opened), "args", args)
    errors = list(operations.operation_errors(opened, range(24)))
    assert {e.implementation for e in errors} == {"C, exact", "C, default", "PyTorch"}
    assert max(e.share for e in errors) < 1

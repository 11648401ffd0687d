"""`verify`: a healthy model passes, a sabotaged one is named, with another copy beside it and without."""

import json
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from helpers.command_line import run
from helpers.tiny_models import LOOKED_INTO, write_tiny
from helpers.tokenizers import pre_tokenizer
from tokenizers import models

from numpy_llama import cli, verify
from numpy_llama.backend import kernels
from numpy_llama.backend.formats import FORMATS, StoredTensor
from numpy_llama.checkpoint import Checkpoint, open_checkpoint
from numpy_llama.checkpoint.names import interleaved_rows, tensor_names
from numpy_llama.checkpoint.presets import PRESETS
from numpy_llama.rope import LinearScaling, Llama3Scaling
from numpy_llama.verify import operations
from numpy_llama.verify.compare import arguments, compare
from numpy_llama.verify.diagnosis import orders, published
from numpy_llama.verify.weights import Census

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
                look(int(layer), short, weight.dequantize()) if short else look(
                    None, layer, weight.dequantize()
                )
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
# What is done to a copy of SmolLM2; what the verdict must say of the file alone, and beside the original.
SABOTAGE = {
    "permutation": (
        half_split,
        f"the rows of wq and wk {SPLIT}",
        f"wq, attention.wk of layers 0..29: the rows {SPLIT}",
    ),
    "theta": (
        theta,
        "rope_theta is 10000, it should be 100000",
        "rope_theta is 10000, the reference has 100000",
    ),
    "w1 and w3": (
        exchanged,
        "w_gate and w_up .* are exchanged",
        r"w_gate, feed_forward.w_up of layers 0..29: exchanged",
    ),
    "sign": (
        bit(31),
        f"{NORM} -0.03.*: bit 31, the sign, is flipped",
        f"{NORM} -0.03.*wanted 0.03.*bit 31, the sign",
    ),
    "exponent": (bit(30), rf"{NORM} .*e\+37.*bit 30 flipped", f"{NORM} .*wanted 0.03.*bit 30"),
    "mantissa": (
        bit(4),
        f"{NORM} 0.034912169, all others .* bfloat16 numbers: bit 4 is flipped",
        f"{NORM} 0.034912169, wanted .*: bit 4 of its 32 is flipped",
    ),
    "bit of a block": (
        bit_of_a_matrix,
        None,
        r"layers\.5.*w_up\.weight\[700, 64\] .*: bit 2 of byte 0 of its block",
    ),
}


def verdict(capsys, code: int, *arguments: object) -> str:
    """The last line that the command prints; it ends with `code`."""
    assert cli.main(["verify", *map(str, arguments)]) == code
    out, err = capsys.readouterr()
    *_, last = out.splitlines()
    assert last.startswith("verdict: ") and err == "" and out.count("verdict") == 1
    return last


def test_a_healthy_model_passes(smollm2_path):
    done = run("verify", "-m", str(smollm2_path))
    report = done.stdout.decode()
    assert (done.returncode, done.stderr) == (0, b"")
    lines = report.splitlines()
    assert lines[-1] == "verdict: nothing wrong found" and "wrong  " not in report and "!" not in lines[4]
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
    assert re.search(pattern, text), text


# --- shards -----------------------------------------------------------------------------------------------


def write_shards(opened: Checkpoint, folder: Path, n: int, shuffled: range = range(0)) -> None:
    """A Hugging Face folder in float16. Layers of `shuffled` are another model's: they use the channels of
    the residual stream in another order."""
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


@pytest.mark.slow
def test_a_last_shard_of_another_model_is_named(smollm2, only_look, tmp_path, capsys):
    """Without the last layers the model writes no text to test; but those layers use other channels."""
    folder = tmp_path / "model"
    write_shards(smollm2, folder, 4, range(23, 30))
    report = verdict(capsys, 3, "-m", folder)
    assert_found(r"model-00004-of-00004.safetensors \(layers 23..29\) are unlike the others", report)


@pytest.mark.slow
def test_a_shard_of_another_model_is_named(smollm2, only_look, tmp_path, capsys):
    folder = tmp_path / "model"
    write_shards(smollm2, folder, 4, range(15, 23))  # the third shard
    report = verdict(capsys, 3, "-m", folder)
    assert_found(
        r"weights of model-00003-of-00004.safetensors \(layers 15..22\) do not belong to this model", report
    )
    report = verdict(capsys, 3, "-m", folder, "--against", smollm2.path)
    assert_found(
        "model-00003-of-00004.safetensors belongs to another model: all weights of layers 15..22", report
    )


# --- faults of the kernels --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    return write_tiny(path)


def test_of_an_untrained_model_nothing_is_said(tiny, capsys):
    assert cli.main(["verify", "-m", str(tiny)]) == 0
    out, _ = capsys.readouterr()
    assert "the sample text shows nothing" in out and out.endswith("verdict: nothing wrong found\n")


@pytest.mark.parametrize("operation", ["wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_wrong_product_is_named_by_layer_and_operation(operation, exact, tiny, monkeypatch, capsys):
    group = "attention" if len(operation) == 2 else "feed_forward"
    spoilt = open_checkpoint(tiny).weights()[f"layers.1.{group}.{operation}.weight"]
    right = kernels.Kernels.linear

    def linear(self, x, w):
        y = right(self, x, w)
        prompt = x.shape[1] > 1  # exact: of a prompt only; else of a single token only
        if self.exact == exact == prompt and np.array_equal(w.tensor.data, spoilt.data):
            row = np.abs(y).reshape(-1, y.shape[-1]).max(axis=0).argmax()
            y[..., row] *= np.float32(1.001)  # one row of the weights, a thousandth
        return y

    monkeypatch.setattr(kernels.Kernels, "linear", linear)
    report = verdict(capsys, 3, "-m", tiny)
    who = "C, exact" if exact else "C, default"
    assert f"the error starts in layer 1, at {operation} ({who} against NumPy" in report
    assert "1 places" in report


def test_a_wrong_attention_and_a_wrong_layer_are_named(tiny, monkeypatch, capsys):
    attention, layer = kernels.Kernels.attention, kernels.Kernels.layers

    def wrong(self, q, k, v):
        return attention(self, q, k, v) * np.float32(1 - 1e-3 * (q.shape[1] == 1))  # of one token only

    with monkeypatch.context() as patch:
        patch.setattr(kernels.Kernels, "attention", wrong)
        assert "in layer 0, at attention (C, exact, C, default" in verdict(capsys, 3, "-m", tiny)

    def wrong_layer(self, w, x, starts, *rest):
        return layer(self, w, x, starts, *rest) * np.float32(1 + 1e-2 * (self.exact and starts[0] > 0))

    monkeypatch.setattr(kernels.Kernels, "layers", wrong_layer)
    assert "in layer 0, at layer (C, exact against" in verdict(capsys, 3, "-m", tiny)


@pytest.mark.parametrize("function", ["rms_norm", "apply_rotary_emb", "silu", "attention", "linear"])
def test_pytorch_sees_what_numpy_does_wrong(function, tiny, monkeypatch, capsys):
    right = getattr(operations.F, function)
    monkeypatch.setattr(operations.F, function, lambda *given: right(*given) * np.float32(1 + 1e-3))
    places = {"rms_norm": "attention_norm", "apply_rotary_emb": "rope", "silu": "swiglu", "linear": "wq"}
    report = verdict(capsys, 3, "-m", tiny)
    assert f"starts in layer 0, at {places.get(function, function)} (" in report and "PyTorch" in report


def test_a_wrong_end_is_named(tiny, monkeypatch, capsys):
    right = kernels.Kernels.linear

    def linear(self, x, w):
        y = right(self, x, w)
        return y + np.float32(1e-3) if len(w) == LOOKED_INTO.vocab_size else y

    monkeypatch.setattr(operations, "OUTPUT_ROWS", 1 << 20)
    monkeypatch.setattr(kernels.Kernels, "linear", linear)
    assert "the error starts after the last layer, at output" in verdict(capsys, 3, "-m", tiny)


def test_without_pytorch_it_says_so(tiny, monkeypatch, capsys):
    monkeypatch.setattr(operations, "pytorch", lambda args, T: [])
    assert cli.main(["verify", "-m", str(tiny)]) == 0
    out, _ = capsys.readouterr()
    assert sum(line.startswith("PyTorch     is not installed") for line in out.splitlines()) == 1


def test_json_has_everything(tiny, capsys):
    assert cli.main(["verify", "-m", str(tiny), "-t", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "nothing wrong found" and report["faults"] == []
    places = {(e["layer"], e["operation"], e["implementation"]) for e in report["errors"]}
    assert (
        len(places) == LOOKED_INTO.n_layers * (7 * 3 + 3 + 2 + 2 + 1 + 1) + 3 + 1
    )  # matrices, attention, layer, norms, rope, swiglu
    assert all(0 <= e["share"] < 1 for e in report["errors"])
    assert report["sample"]["tokens"] > 100 and report["seconds"] > 0


@pytest.mark.parametrize("format", [name for name, f in FORMATS.items() if f.quantize])
@pytest.mark.parametrize("scaling", [None, Llama3Scaling(8.0, original_max_seq_len=16), LinearScaling(4.0)])
def test_every_format_passes(format, scaling, tmp_path, monkeypatch):
    args = replace(LOOKED_INTO, rope_scaling=scaling)
    opened = open_checkpoint(write_tiny(tmp_path / "model.gguf", format))
    monkeypatch.setattr(type(opened), "args", args)
    errors = list(operations.operation_errors(opened, range(24)))
    assert {e.implementation for e in errors} == {"C, exact", "C, default", "PyTorch"}
    assert max(e.share for e in errors) < 1


# --- what weights and arguments show by themselves --------------------------------------------------------


def findings(stored: dict[str, StoredTensor]) -> list[str]:
    census = Census(stored)
    for name, w in stored.items():
        if name.startswith("layers."):
            _, layer, short = name.removesuffix(".weight").split(".", 2)
            census.look(int(layer), short, w.dequantize())
    census.end()
    return census.findings


@pytest.fixture
def trained(rng) -> dict[str, StoredTensor]:
    """Norms as training leaves them: nearly the same from layer to layer, in bfloat16."""
    channels = rng.lognormal(-1, 0.5, 256)
    made = {}
    for i in range(5):
        vector = (channels * rng.lognormal(0, 0.1, 256)).astype(np.float32)
        rounded = StoredTensor.quantize(vector[None], "BF16").dequantize()[0]
        made[f"layers.{i}.ffn_norm.weight"] = StoredTensor.quantize(rounded, "F32")
        matrix = rng.normal(size=(64, 256)).astype(np.float32) * channels.astype(np.float32)
        made[f"layers.{i}.feed_forward.w_up.weight"] = StoredTensor.quantize(matrix, "F32")
    return made


def flip(stored: dict[str, StoredTensor], name: str, at: tuple[int, ...], number: int) -> None:
    w = stored[name].dequantize().copy()
    w.view(np.uint32)[at] ^= np.uint32(1 << number)
    stored[name] = StoredTensor.quantize(w, "F32")


@pytest.mark.parametrize("number", [31, 30, 28, 27, *range(16)])
def test_a_flipped_bit_of_a_norm(number, trained):
    """A lower bit of the exponent, and bits that bfloat16 has too, cannot be found without another copy."""
    assert findings(trained) == []
    flip(trained, "layers.2.ffn_norm.weight", (77,), number)
    (found,) = findings(trained)
    assert found.startswith("layers.2.ffn_norm.weight[77] is ") and f"bit {number}" in found


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(value, trained):
    w = trained["layers.1.feed_forward.w_up.weight"].dequantize().copy()
    w[3, 200] = value
    trained["layers.1.feed_forward.w_up.weight"] = StoredTensor.quantize(w, "F32")
    (found,) = findings(trained)
    assert found.startswith(f"layers.1.feed_forward.w_up.weight[3, 200] is {value}")


def test_rows_that_are_huge_or_were_never_written(trained):
    name = "layers.1.feed_forward.w_up.weight"
    w = trained[name].dequantize()
    huge, hole = w.copy(), w.copy()
    huge[9] *= np.float32(1e4)
    hole[20:50] = 0
    for spoilt, message in ((huge, "row 9 is "), (hole, "30 of 64 rows are zero")):
        trained[name] = StoredTensor.quantize(spoilt, "F32")
        (found,) = findings(trained)
        assert found.startswith(f"{name}: {message}")


def test_layers_of_another_model_are_unlike_the_others(trained, rng):
    for order in (None, rng.permutation(256)):
        census = Census(trained)
        for i in range(5):
            w = trained[f"layers.{i}.feed_forward.w_up.weight"].dequantize()
            census.look(i, "feed_forward.w_up", w[:, order] if order is not None and i == 1 else w)
        assert census.runs() == ([] if order is None else [range(0, 1), range(1, 2)])


def test_the_factor_and_eps_of_published_models_are_checked():
    assert all(published(preset.args) is None for preset in PRESETS.values())
    llama = PRESETS["llama-3.2-1b"].args
    found = published(replace(llama, rope_scaling=Llama3Scaling(8.0)))
    assert found is not None and "factor 8, llama-3.2-1b, which has this shape, was published with" in found
    assert "factor 32" in found and "none" in str(published(replace(llama, rope_scaling=None)))
    assert "norm_eps is 1e-06" in str(published(replace(llama, norm_eps=1e-6)))
    for harmless in ({"max_seq_len": 4096}, {"rope_theta": 1e7}):
        assert published(replace(llama, **harmless)) is None
    assert published(replace(PRESETS["llama-2-7b"].args, rope_scaling=LinearScaling(4.0))) is None
    assert published(LOOKED_INTO) is None


def test_every_wrong_order_is_put_right(rng):
    """From Hugging Face's order, un-permuted not, twice, or with n_heads; -> Meta's, which is 0, 1, 2, ..."""
    args = replace(LOOKED_INTO, n_heads=8, n_kv_heads=4, head_dim=16)
    q, k = interleaved_rows(8, 16), interleaved_rows(4, 16)
    huggingface = {"q": np.argsort(q), "k": np.argsort(k)}  # its row i is Meta's row [i]
    spoilt = {
        "are in": huggingface,
        "were un-permuted twice": {"q": q, "k": k},
        "were un-permuted with n_heads": {"k": huggingface["k"][interleaved_rows(8, 8)]},
    }
    seen = set()
    for which, fault, *rows in orders(args):
        (found,) = [orders for start, orders in spoilt.items() if fault.startswith(start)]
        for letter, put in zip("qk", rows, strict=True):
            assert (put is not None) == (f"w{letter}" in which)
            if put is not None:
                assert (found[letter][put] == np.arange(len(put))).all()
        seen.add((which, fault))
    assert len(seen) == 7


# --- beside another copy ----------------------------------------------------------------------------------


def compared(
    tmp_path, format: str, change, reference: str = "F32", args=LOOKED_INTO
) -> tuple[list[str], list[str]]:
    a = write_tiny(tmp_path / "a.gguf", format, change, args)
    return compare(open_checkpoint(a), open_checkpoint(write_tiny(tmp_path / "b.gguf", reference)))


@pytest.mark.parametrize("reference", ["F32", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("format", [name for name, f in FORMATS.items() if f.quantize])
def test_rounding_is_no_fault(format, reference, tmp_path):
    faults, lines = compared(tmp_path, format, lambda w: None, reference)
    n = 9 * LOOKED_INTO.n_layers + 3
    assert faults == []
    if format == reference:
        assert lines == [f"{n} of {n} weights are equal"]
    else:
        assert lines[0].startswith(f"{2 * LOOKED_INTO.n_layers + 1} of {n} weights are equal")
        assert f"differ by rounding: {format} against {reference}" in lines[1]


@pytest.mark.parametrize("name", ["attention.wo", "attention_norm"])
@pytest.mark.parametrize("number", [0, 15, 16, 22, 24, 30, 31])
def test_one_bit_is_named(name, number, tmp_path):
    at = (7, 11) if name.endswith("wo") else (11,)

    def change(weights):
        weights[f"layers.1.{name}.weight"].view(np.uint32)[at] ^= np.uint32(1 << number)

    (fault,), _ = compared(tmp_path, "F32", change)
    assert fault.startswith(f"layers.1.{name}.weight[{', '.join(map(str, at))}] is ")
    assert re.search(rf"wanted .*: bit {number}(, the sign,)? of its 32 is flipped$", fault)


def test_a_number_that_rounding_cannot_explain_is_named(tmp_path):
    def change(weights):
        weights["layers.1.attention.wo.weight"][7, 11] = 40

    (fault,), _ = compared(tmp_path, "BF16", change)
    assert (
        fault.startswith("layers.1.attention.wo.weight[7, 11] is 40, wanted ") and "beyond rounding" in fault
    )


@pytest.mark.parametrize("format", ["F32", "Q8_0", "Q4_0"])
def test_weights_in_the_wrong_place_are_named(format, tmp_path):
    def change(weights):
        a, b = (f"layers.{i}.attention.wo.weight" for i in (0, 2))
        weights[a], weights[b] = weights[b], weights[a]
        gate, up = (f"layers.1.feed_forward.{name}.weight" for name in ("w_gate", "w_up"))
        weights[gate], weights[up] = weights[up], weights[gate]
        q = weights["layers.1.attention.wq.weight"]
        q[:] = q[np.random.default_rng(1).permutation(len(q))]
        v = weights["layers.2.attention.wv.weight"]
        v[:] = np.random.default_rng(2).normal(size=v.shape)

    faults, _ = compared(tmp_path, format, change)
    assert faults == [
        "attention.wo of layer 0: the reference has these weights as layers.2.attention.wo.weight",
        "attention.wq of layer 1: the rows are in another order",
        "feed_forward.w_gate, feed_forward.w_up of layer 1: exchanged with each other (w1 and w3)",
        "attention.wv of layer 2: not the weights of this model",
        "attention.wo of layer 2: the reference has these weights as layers.0.attention.wo.weight",
    ]


def test_arguments_that_differ_are_listed():
    wanted = replace(LOOKED_INTO, norm_eps=1e-6, rope_scaling=Llama3Scaling(8.0), max_seq_len=256)
    differences = dict(arguments(replace(LOOKED_INTO, rope_theta=5e5), wanted))
    assert list(differences) == ["norm_eps", "rope_theta", "max_seq_len", "rope_scaling"]
    assert differences["rope_scaling"] == "rope_scaling is none, the reference has llama3, factor 8"
    near = replace(wanted, norm_eps=1e-6 * (1 + 1e-8))
    assert list(arguments(near, wanted)) == []


@pytest.mark.parametrize("name, number", [("hidden_dim", 128), ("n_layers", 2), ("n_layers", 4)])
def test_another_model_is_not_compared(name, number, tmp_path):
    faults, lines = compared(tmp_path, "F32", lambda w: None, args=replace(LOOKED_INTO, **{name: number}))
    assert faults == [
        f"it is another model: {name} is {number}, the reference has {getattr(LOOKED_INTO, name)}"
    ]
    assert lines == []


def test_a_reference_that_is_written_to_meanwhile_is_no_reference(tmp_path, monkeypatch, capsys):
    a, b = (write_tiny(tmp_path / name, "F32") for name in ("a.gguf", "b.gguf"))

    def examine(opened, reference, *rest):
        with open(reference.path, "r+b") as file:
            file.truncate(1000)
        return verify.Report()

    monkeypatch.setattr(verify, "examine", examine)
    assert cli.main(["verify", "-m", str(a), "--against", str(b)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "b.gguf" in err and "changed" in err


@pytest.mark.parametrize("format", ["BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_one_large_weight_makes_its_block_coarse_and_that_is_no_fault(format, tmp_path):
    def change(weights):
        weights["layers.1.attention.wo.weight"][7, 11] = 40

    a, b = tmp_path / "a.gguf", tmp_path / "b.gguf"
    pair = [open_checkpoint(write_tiny(path, to, change)) for path, to in ((a, format), (b, "F32"))]
    faults, _ = compare(*pair)
    assert faults == []

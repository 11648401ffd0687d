"""LoRA adapters: the same logits as in PEFT, beside every format, on every backend, read and written."""

import errno
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from helpers import adapters
from helpers.gguf_writer import byte_vocabulary, write_llama
from helpers.tiny_models import stored
from helpers.updates import ARGS, IDS, SOME, base, every_matrix, random_updates

import numpy_llama as nl
from numpy_llama.backend import build
from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.checkpoint.adapters import open_adapter, scaled, write_gguf, write_peft
from numpy_llama.errors import FormatError, ParameterError, ResourceLimitError
from numpy_llama.lora import LowRank, by_weight

# Logits of two programs in float32, relative to the largest. Each layer's sums are rounded in another order.
NEAR = 5e-5

KINDS = {
    "default": {},
    "r 3": {"r": 3, "lora_alpha": 5},
    "rslora": {"r": 4, "lora_alpha": 4, "use_rslora": True},
    "rank_pattern": {
        "r": 4,
        "rank_pattern": {"q_proj": 7, r"layers\.1.*down_proj": 2},
        "alpha_pattern": {"model.layers.0.self_attn.v_proj": 32, "^model.layers.1.mlp.up_proj": 3},
    },
    "q and k of layer 1": {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1]},
    "head": {"target_modules": ["v_proj", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


def found(weights, folder, **options) -> np.ndarray:
    """The logits of our model with the adapter."""
    opened = open_adapter(folder)
    stored_weights = stored(weights, "F32")
    if weights["output.weight"] is weights["tok_embeddings.weight"]:
        stored_weights["output.weight"] = stored_weights["tok_embeddings.weight"]
    opened.check_copies(stored_weights)
    return build(ARGS, stored_weights, adapters=[opened.low_ranks(ARGS)], **options)(IDS)


def assert_near(found: np.ndarray, expected: np.ndarray, near: float = NEAR) -> None:
    distance = np.abs(found - expected).max() / np.abs(expected).max()
    assert distance < near, distance


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_those_of_peft(kind, tied, tmp_path):
    weights = base(tied)
    model = adapters.peft_model(ARGS, weights, **KINDS[kind])
    expected, folder = adapters.logits(model, IDS), adapters.write(model, tmp_path / "adapter")
    with model.disable_adapter():
        assert np.abs(adapters.logits(model, IDS) - expected).max() > 0.05 * np.abs(expected).max()
    assert_near(found(weights, folder, backend="numpy"), expected)
    assert_near(found(weights, folder, exact=True), expected)
    assert_near(found(weights, folder), expected, 2e-3)  # keys and values are in float16


def test_an_old_file_of_torch_is_read(tmp_path):
    model = adapters.peft_model(ARGS, base())
    with_bin = tmp_path / "adapter"
    adapters.write(model, with_bin)
    updates = open_adapter(with_bin).low_ranks(ARGS)
    tensors = safetensors.torch.load_file(with_bin / "adapter_model.safetensors")
    torch.save(tensors, with_bin / "adapter_model.bin")
    (with_bin / "adapter_model.safetensors").unlink()
    assert_same(open_adapter(with_bin).low_ranks(ARGS), updates)


def assert_same(found: dict[str, LowRank], wanted: dict[str, LowRank]) -> None:
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        np.testing.assert_allclose(found[name].delta(), one.delta(), rtol=0, atol=1e-6)


WRITTEN = {"every matrix": every_matrix(4), "some": SOME}


@pytest.mark.parametrize("names", WRITTEN)
def test_what_is_written_loads_in_peft(names, tmp_path):
    weights, updates = base(), random_updates(5, WRITTEN[names])
    write_peft(tmp_path, updates, ARGS, "base/model")
    assert_same(open_adapter(tmp_path).low_ranks(ARGS), updates)
    assert open_adapter(tmp_path).base == "base/model"
    if "tok_embeddings.weight" in updates:  # PEFT misses the base's embedding, which it would write too
        updates = {name: one for name, one in updates.items() if name != "tok_embeddings.weight"}
        write_peft(tmp_path, updates, ARGS)
    expected = adapters.logits(adapters.read(ARGS, weights, tmp_path), IDS)
    assert_near(found(weights, tmp_path, backend="numpy"), expected)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_config_never_stands_beside_the_weights_of_another_adapter(tmp_path, monkeypatch):
    """Wherever writing ends, the folder is one adapter or none.

    A config that stays the same always stands.
    """
    first, second = random_updates(5, SOME), random_updates(6, every_matrix(4))
    write_peft(tmp_path, first, ARGS)

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(ResourceLimitError, match=r"adapter_model\.safetensors was not written"):
        write_peft(tmp_path, first, ARGS)
    assert_same(open_adapter(tmp_path).low_ranks(ARGS), first)
    with pytest.raises(ResourceLimitError):
        write_peft(tmp_path, second, ARGS)
    with pytest.raises(FormatError, match=r"has no adapter_config\.json"):
        open_adapter(tmp_path)
    monkeypatch.undo()
    write_peft(tmp_path, second, ARGS)
    assert_same(open_adapter(tmp_path).low_ranks(ARGS), second)


@pytest.mark.parametrize("fused", [False, True])
def test_an_adapter_takes_its_own_memory(fused, tmp_path):
    """While it is read, one tensor is there twice at most. What is kept has no rows of another weight."""
    args, r, rng = replace(ARGS, n_layers=16), 64, np.random.default_rng(0)
    q, kv, layers = (
        args.n_heads * args.head_dim,
        args.n_kv_heads * args.head_dim,
        "base_model.model.model.layers",
    )
    rows = {"qkv_proj": q + 2 * kv} if fused else {"q_proj": q, "k_proj": kv}
    tensors = {
        f"{layers}.{i}.self_attn.{name}.lora_{half}.weight": rng.normal(size=shape).astype(np.float32)
        for i in range(args.n_layers)
        for name, n in rows.items()
        for half, shape in (("A", (r, args.dim)), ("B", (n, r)))
    }
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": r, "lora_alpha": r, "target_modules": list(rows)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter, size = open_adapter(tmp_path), sum(x.nbytes for x in tensors.values())
    adapter.low_ranks(args)  # the first call also imports
    tracemalloc.start()
    try:
        kept = adapter.low_ranks(args)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept and held < 1.1 * size and peak < 1.3 * size, (held / size, peak / size)


@pytest.mark.parametrize("names", WRITTEN)
def test_an_adapter_in_gguf_comes_back(names, tmp_path):
    updates, path = random_updates(6, WRITTEN[names]), tmp_path / "lora.gguf"
    write_gguf(path, updates, ARGS)
    assert_same(open_adapter(path).low_ranks(ARGS), updates)
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.lora.alpha"].types == [gguf.GGUFValueType.FLOAT32]
    assert len(reader.tensors) == 2 * len(updates)


def test_a_gguf_of_the_library_is_read(tmp_path):
    """In the layout of llama.cpp's converter: Meta's order of rows, and the embedding's A transposed."""
    rng, path = np.random.default_rng(0), tmp_path / "lora.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 6.0)
    q = rng.normal(size=(4, ARGS.dim)), rng.normal(size=(ARGS.dim, 4))
    table = rng.normal(size=(ARGS.vocab_size, 3)), rng.normal(size=(ARGS.dim, 3))
    for name, (a, b) in {"blk.1.attn_q": q, "token_embd": table}.items():
        writer.add_tensor(f"{name}.weight.lora_a", a.astype(np.float16))
        writer.add_tensor(f"{name}.weight.lora_b", b.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    updates = open_adapter(path).low_ranks(ARGS)
    near = {"rtol": 0, "atol": 2e-2}  # A is in float16
    np.testing.assert_allclose(updates["layers.1.attention.wq.weight"].delta(), 1.5 * q[1] @ q[0], **near)
    np.testing.assert_allclose(updates["tok_embeddings.weight"].delta(), 2 * table[0] @ table[1].T, **near)


@pytest.mark.parametrize("options", [{"backend": "numpy"}, {"activation_bits": 15}, {"exact": True}], ids=str)
@pytest.mark.parametrize("format", ["F32", "BF16", "Q8_0", "Q4_0"])
def test_beside_every_format_it_is_the_sum(format, options):
    """base + adapters = the model whose weights are the sums, in float32; the adapters are added."""
    weights, two = base(), [random_updates(7, every_matrix(3), 0.1), random_updates(8, SOME, 0.3)]
    kept = stored(weights, format)
    found = build(ARGS, kept, adapters=two, **options)(IDS)
    sums = {name: w.dequantize() for name, w in kept.items()}
    for name, update in by_weight(two).items():
        sums[name] = sums[name] + update.delta()
    expected = build(ARGS, stored(sums, "F32"), backend="numpy")(IDS)
    # With 15 bits activations, keys and values are rounded too.
    assert_near(found, expected, 1e-2 if "activation_bits" in options else 1e-4)


def test_an_adapter_beside_a_folder_of_hugging_face(tmp_path):
    """Its rows of q and k lie in another order; the adapter's come into the same."""
    weights = base()
    model = adapters.peft_model(ARGS, weights)
    expected, folder = adapters.logits(model, IDS), adapters.write(model, tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    opened = open_checkpoint(tmp_path / "base")
    updates = open_adapter(folder).low_ranks(opened.args)
    for options in ({"backend": "numpy"}, {"exact": True}):
        assert_near(build(opened.args, opened.weights(), adapters=[updates], **options)(IDS), expected)


# ---------------------------------------------------------------- through both faces


@pytest.fixture
def model_path(tmp_path):
    return write_llama(tmp_path / "m.gguf", ARGS, base(), **byte_vocabulary(512))


def test_load_takes_one_or_several(model_path, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two:1"  # a path may have a colon
    write_peft(one, random_updates(1, every_matrix(2), 0.05), ARGS)
    write_gguf(two, random_updates(2, SOME), ARGS)

    def logits(adapter=None):
        return nl.load(model_path, exact=True, adapter=adapter).model(IDS)

    plain, both = logits(), logits([one, two])
    assert np.abs(both - plain).max() > 0.1 * np.abs(plain).max()
    for same in ([f"{one}:1", two], [f"{one}:0.5", f"{one}:0.5", f"{two}:1.0"]):
        assert_near(logits(same), both)
    assert_near(logits([f"{one}:0", f"{two}:-0"]), plain)


@pytest.mark.parametrize(
    "text, path, factor",
    [
        ("C:\\new\\lora", "C:\\new\\lora", 1.0),
        ("C:\\new\\lora:0.5", "C:\\new\\lora", 0.5),
        ("C:/new/lora.gguf:-2", "C:/new/lora.gguf", -2.0),
        ("C:lora:1e-1", "C:lora", 0.1),
    ],
)
def test_the_letter_of_a_drive_is_no_adapter(text, path, factor):
    assert scaled(text) == (Path(path), factor)


@pytest.mark.parametrize("adapter", [3, [3], b"x", {"a": 1}, [None]])
def test_other_things_are_no_adapter(adapter, model_path):
    with pytest.raises(ParameterError, match=r"adapter is .*, it must be a path or a list of paths"):
        nl.load(model_path, adapter=adapter)


def test_the_command_line_takes_adapters(main, model_path, tmp_path, capsys):
    folder = tmp_path / "a"
    write_peft(folder, random_updates(1, every_matrix(2)), ARGS)
    texts = []
    for options in (
        [],
        ["--adapter", str(folder)],
        ["--adapter", f"{folder}:0.5", "--adapter", f"{folder}:0.5"],
    ):
        assert main(["generate", "-m", str(model_path), "-n", "20", "--json", "Once", *options]) == 0
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[0] != texts[1] == texts[2]
    assert main(["generate", "-m", str(model_path), "x", "--adapter", "no/such"]) == 1
    assert "no/such" in capsys.readouterr().err
    assert main(["generate", "-m", str(model_path), "x", "--adapter", f"{folder}:nan"]) == 2
    assert "the factor is nan, it must be a finite number" in capsys.readouterr().err

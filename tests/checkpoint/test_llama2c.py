"""llama2.c's .bin files, versions 0, 1 and 2: written here as its exporter writes them, and read back."""

import struct
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_models import float_weights
from hypothesis import given
from hypothesis import strategies as st

from numpy_llama import errors
from numpy_llama.backend import build
from numpy_llama.backend.formats import FORMATS
from numpy_llama.checkpoint.llama2c import Llama2cCheckpoint, looks_like_llama2c
from numpy_llama.config import ModelArgs
from numpy_llama.model import Transformer
from numpy_llama.proof.tiny import TINY

ARGS = replace(TINY, max_seq_len=32)
VERSIONS = (0, 1, 2)


def quantized(x: np.ndarray, group: int) -> tuple[bytes, np.ndarray]:
    """As the exporter does it: -> the int8 numbers and their scales, and what they stand for."""
    groups = x.reshape(-1, group)
    scale = np.abs(groups).max(axis=1, keepdims=True) / np.float32(127)
    q = np.round(groups / scale).astype(np.int8)
    return q.tobytes() + scale.tobytes(), (q * scale).reshape(x.shape)


def file_of(
    args: ModelArgs, weights: dict, version: int, tied: bool, group: int = 8
) -> tuple[bytes, dict[str, np.ndarray]]:
    """The bytes of a file, and the weights that it holds."""
    vocab_size = args.vocab_size if tied or version else -args.vocab_size
    numbers = (args.dim, args.hidden_dim, args.n_layers, args.n_heads, args.n_kv_heads, vocab_size)
    header = struct.pack("<7i", *numbers, args.max_seq_len)
    angles = bytes(4 * args.max_seq_len * args.head_dim)
    attention = [f"attention.{name}" for name in ("wq", "wk", "wv", "wo")]
    feed_forward = [f"feed_forward.{name}" for name in ("w_gate", "w_down", "w_up")]  # w1, w2, w3
    if version == 0:
        kinds = ["tok_embeddings", "attention_norm", *attention, "ffn_norm", *feed_forward, "norm", angles]
    else:
        header = b"24ka" + struct.pack("<i", version) + header + bytes([tied])
        header = (header + (struct.pack("<i", group) if version == 2 else b"")).ljust(256, b"\0")
        kinds = ["attention_norm", "ffn_norm", "norm", "tok_embeddings", *attention, *feed_forward]
    out, held = [header], {}
    for kind in kinds if tied else [*kinds, "output"]:
        if isinstance(kind, bytes):
            out.append(kind)
            continue
        once = kind in ("tok_embeddings", "norm", "output")
        for name in [kind] if once else [f"layers.{i}.{kind}" for i in range(args.n_layers)]:
            x = weights[f"{name}.weight"]
            data = x.tobytes()
            if version == 2 and x.ndim == 2:
                data, x = quantized(x, group)
            out.append(data)
            held[f"{name}.weight"] = x
    if tied:
        held["output.weight"] = held["tok_embeddings.weight"]
    return b"".join(out), held


def opened(data: bytes, use=lambda checkpoint: checkpoint):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.bin"
        path.write_bytes(data)
        return use(Llama2cCheckpoint(path))


@given(
    version=st.sampled_from(VERSIONS),
    tied=st.booleans(),
    n_kv_heads=st.integers(1, 3),
    n_rep=st.integers(1, 3),
    head_dim=st.sampled_from([2, 6, 8]),
    n_layers=st.integers(1, 3),
    sizes=st.tuples(st.integers(1, 50), st.integers(1, 50), st.integers(1, 50)),
    group=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_written_is_read(version, tied, n_kv_heads, n_rep, head_dim, n_layers, sizes, group, seed):
    heads = {"n_heads": n_kv_heads * n_rep, "n_kv_heads": n_kv_heads, "head_dim": head_dim}
    more = dict(zip(("hidden_dim", "vocab_size", "max_seq_len"), sizes, strict=True))
    args = replace(ARGS, dim=n_kv_heads * n_rep * head_dim, n_layers=n_layers, **heads, **more)
    data, held = file_of(args, float_weights(args, seed, tied=tied), version, tied, group)
    assert looks_like_llama2c(data[:256], len(data))
    checkpoint = opened(data)
    weights = checkpoint.weights()
    assert checkpoint.args == args
    assert weights.keys() == held.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(weight.dequantize(), held[name])
        assert weight.shape == held[name].shape and weight.format is FORMATS["F32"]
        assert weight.in_place == (version < 2 or "norm" in name)
        assert not weight.in_place or not weight.data.flags.owndata  # the map itself
    assert (weights["output.weight"] is weights["tok_embeddings.weight"]) == tied
    last = list(checkpoint.tensors.values())[-1]
    assert last.offset + last.nbytes == len(data)


@pytest.mark.parametrize("backend", ["numpy", "c"])
@pytest.mark.parametrize("version", VERSIONS)
def test_logits(version, backend, rng):
    """The order of rows is Meta's: the same weights, handed to the model directly, give the same logits."""
    data, held = file_of(ARGS, float_weights(ARGS), version, False)
    checkpoint = opened(data)
    tokens = rng.integers(ARGS.vocab_size, size=(1, 20))
    logits = build(checkpoint.args, checkpoint.weights(), backend=backend, exact=True)(tokens)
    np.testing.assert_allclose(logits, Transformer(ARGS, held)(tokens), atol=1e-5)


def test_groups_run_on_over_the_ends_of_rows():
    """40 is no multiple of 16, 24 * 40 is."""
    args = replace(ARGS, vocab_size=48, dim=32, head_dim=8, n_heads=4)
    data, held = file_of(args, float_weights(args, tied=True), 2, True, 16)
    name = "layers.1.feed_forward.w_down.weight"
    np.testing.assert_array_equal(opened(data).weights()[name].dequantize(), held[name])


# --- broken files -----------------------------------------------------------------------------------------

FILES = {version: file_of(ARGS, float_weights(ARGS, tied=True), version, True)[0] for version in VERSIONS}
FIELDS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")


def changed(version: int, at: int, *numbers: int) -> bytes:
    """A file with other numbers from byte `at` on."""
    data = bytearray(FILES[version])
    struct.pack_into(f"<{len(numbers)}i", data, at, *numbers)
    return bytes(data)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [0, -1, 2**31 - 1, -(2**31)])
def test_numbers_that_no_model_has(version, field, value):
    data = changed(version, (8 if version else 0) + 4 * FIELDS.index(field), value)
    wanted = errors.ConfigError
    if field == "vocab_size" and version == 0 and value == -1:
        wanted = errors.FormatError  # one token, and an output matrix
    with pytest.raises(wanted, match=r"x\.bin: "):
        opened(data)
    assert looks_like_llama2c(data[:256], len(data)) == bool(version)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("field", FIELDS)
def test_numbers_that_the_size_denies(version, field):
    value = getattr(ARGS, field)
    more = {"dim": 2 * value, "n_heads": 2, "n_kv_heads": 4}.get(field, value + 8)
    data = changed(version, (8 if version else 0) + 4 * FIELDS.index(field), more)
    if field == "max_seq_len" and version:  # no byte of the file depends on it
        assert opened(data).args.max_seq_len == more
        return
    with pytest.raises(
        errors.TruncatedError if field != "n_heads" else errors.FormatError, match=r"x\.bin: "
    ):
        opened(data)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_size_is_exact(version):
    data = FILES[version]
    for wrong in (data[:-1], data[:300]):
        with pytest.raises(errors.TruncatedError, match="incomplete copy or download"):
            opened(wrong)
        assert looks_like_llama2c(wrong[:256], len(wrong)) == bool(version)
    with pytest.raises(errors.FormatError, match=rf"the weights end at byte {len(data)}, the file has"):
        opened(data + b"\0")
    for n in (1, 4, 8, 27, 30, 100, 255):
        with pytest.raises(errors.TruncatedError):
            opened(data[:n])
    with pytest.raises(errors.TruncatedError, match="0 bytes, need 28"):
        opened(b"")


@pytest.mark.parametrize(
    "error, message, data",
    [
        (errors.UnsupportedError, "version 3 of llama2.c's format", changed(1, 4, 3)),
        (errors.UnsupportedError, "version 0 of llama2.c's format", changed(1, 4, 0)),
        (errors.FormatError, "byte 36 is 2", FILES[1][:36] + b"\2" + FILES[1][37:]),
        (errors.TruncatedError, "output.weight", FILES[1][:36] + b"\0" + FILES[1][37:]),
        *((errors.FormatError, "group size at byte 37", changed(2, 37, n)) for n in (0, -8, -(2**31))),
        *((errors.FormatError, f"multiple of the group size {n}", changed(2, 37, n)) for n in (5, 2**31 - 1)),
        (errors.TruncatedError, "incomplete", changed(2, 37, 4)),
        (errors.FormatError, "the weights end at byte", changed(2, 37, 24)),
        (errors.ConfigError, "dim 24 cannot be divided among 5 heads", changed(0, 12, 5)),
        (errors.ConfigError, "head_dim is 3", changed(0, 12, 8)),
    ],
)
def test_headers_that_are_wrong(error, message, data):
    with pytest.raises(errors.NumpyLlamaError, match=message) as caught:
        opened(data)
    assert type(caught.value) is error
    assert str(caught.value).count("x.bin") == 1


def test_scales_that_are_none():
    """The first exporter of version 2 wrote all int8 numbers, and then all scales."""
    weights = float_weights(ARGS, tied=True)
    data = FILES[2]
    norms = 256 + 4 * ARGS.dim * (2 * ARGS.n_layers + 1)
    n = ARGS.vocab_size * ARGS.dim
    pairs = {
        name: quantized(x, 8)[0] for name, x in weights.items() if x.ndim == 2 and name != "output.weight"
    }
    ordered = sorted(pairs.values(), key=data.index)
    early = b"".join(p[: len(p) * 2 // 3] for p in ordered) + b"".join(p[len(p) * 2 // 3 :] for p in ordered)
    early = data[:norms] + early
    assert len(early) == len(data) and early != data
    embedding = opened(early).weights()["tok_embeddings.weight"]
    with pytest.raises(errors.FormatError, match=f"at byte {norms + n}, are no scales; written by an early"):
        embedding.dequantize()


@given(st.sampled_from(VERSIONS), st.data())
def test_any_header_gives_a_model_or_our_own_error(version, data):
    changed = bytearray(FILES[version])
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, 44))] = data.draw(st.integers(0, 255))
    try:
        checkpoint = opened(bytes(changed))
    except errors.NumpyLlamaError:
        return
    assert looks_like_llama2c(bytes(changed[:256]), len(changed))
    assert checkpoint.args.dim == 24


def test_what_is_no_llama2c_file():
    for head in (b"GGUF" + bytes(252), b"PK\3\4" + bytes(252), b'{"a": 1}', b"", b"\0" * 256, b"\xff" * 256):
        assert not looks_like_llama2c(head, 5_000_000)
    assert not looks_like_llama2c(FILES[0][:256], len(FILES[0]) + 1)


def test_where_a_tokenizer_may_be(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(FILES[0])
    names = "tok53.bin, tokenizer.bin, tokenizer.model"
    with pytest.raises(errors.TokenizerError, match=rf"model\.bin: .* looked beside it for {names}"):
        Llama2cCheckpoint(path).tokenizer()
    # What is found is opened: the name of the file is in the message that it is none.
    for name in ("tokenizer.model", "tokenizer.bin", "tok53.bin"):
        (tmp_path / name).write_bytes(b"\xff\xff")
        with pytest.raises(errors.NumpyLlamaError, match=name):
            Llama2cCheckpoint(path).tokenizer()

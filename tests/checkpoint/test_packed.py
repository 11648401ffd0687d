"""A packed file: the model of the ordinary file, used in place, and refused by other readers."""

from dataclasses import replace

import gguf
import numpy as np
import pytest
from helpers.gguf_writer import (
    byte_vocabulary,
    gguf_bytes,
    header,
    llama_metadata,
    tensor_info,
    write_llama,
)
from helpers.kernels import real_weight
from helpers.tiny_models import float_weights

from numpy_llama import cli
from numpy_llama.backend import build
from numpy_llama.backend.formats import FORMATS, PACKED, Format, PackedTensor, StoredTensor, pack_rows
from numpy_llama.backend.kernels import KernelWeight
from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.checkpoint.convert import convert
from numpy_llama.checkpoint.gguf.file import GGUFFile
from numpy_llama.checkpoint.memory import memory_plan
from numpy_llama.checkpoint.names import tensor_names
from numpy_llama.errors import FormatError, ParameterError, TruncatedError, UnsupportedError
from numpy_llama.proof.tiny import TINY_BLOCKS
from numpy_llama.verify import operations
from numpy_llama.verify.compare import compare

# 301 and 24 rows are no whole groups.
ARGS = replace(TINY_BLOCKS, n_kv_heads=1, head_dim=24, vocab_size=301, max_seq_len=64)
IDS = np.random.default_rng(2).integers(0, 301, (2, 20))


def write_source(folder, tied=False):
    weights = float_weights(ARGS)
    if tied:
        del weights["output.weight"]
    return open_checkpoint(
        write_llama(folder / "source.gguf", ARGS, weights, **byte_vocabulary(ARGS.vocab_size))
    )


def write_k_quants(folder, other: StoredTensor | None = None):
    """Matrices in formats that --dtype cannot write; `other` is one of the last layer."""
    args, rng = replace(ARGS, dim=256, head_dim=64, hidden_dim=256), np.random.default_rng(3)
    formats = ["Q4_K", "Q6_K", "Q5_K", "Q5_0", "Q4_K", "BF16", "Q4_1"]
    tensors = {}
    for i, (ours, w) in enumerate(float_weights(args).items()):
        format = FORMATS[formats[i % len(formats)]]
        plain = StoredTensor.quantize(w, "F32") if w.ndim == 1 else real_weight(rng, format, *w.shape)
        tensors[tensor_names(args, "gguf")[ours]] = plain
    tensors["output_norm.weight"] = StoredTensor.quantize(float_weights(args)["norm.weight"], "Q8_0")
    if other is not None:
        tensors["blk.1.ffn_up.weight"] = other
    metadata = llama_metadata(args) | {f"tokenizer.ggml.{k}": v for k, v in byte_vocabulary(301).items()}
    (folder / "k.gguf").write_bytes(gguf_bytes(metadata, tensors))
    return open_checkpoint(folder / "k.gguf")


def logits(opened, backend):
    """Of a prompt, and of one more token."""
    model = build(opened.args, opened.weights(), backend=backend)
    cache = model.new_cache(batch=len(IDS), max_seq_len=32)
    return model(IDS, start_pos=0, cache=cache), model(IDS[:, :1], start_pos=IDS.shape[1], cache=cache)


def assert_same_model(packed, plain, tied=False):
    """One is the other with its rows packed: the same bytes, the same logits, and nothing is copied."""
    weights, wanted = packed.weights(), plain.weights()
    assert packed.args == plain.args and weights.keys() == wanted.keys()
    assert (weights["output.weight"] is weights["tok_embeddings.weight"]) == tied
    for name, w in weights.items():
        other = wanted[name]
        only_rows = name == "tok_embeddings.weight" and not tied
        if len(w.shape) == 1:
            assert w.format.name == "F32"
            np.testing.assert_array_equal(w.dequantize(), other.dequantize())
            continue
        assert isinstance(w, PackedTensor) == (other.format.block > 1 and not only_rows)
        assert (w.format, w.shape) == (other.format, other.shape)
        np.testing.assert_array_equal(w.data, other.data)
        if isinstance(w, PackedTensor):
            np.testing.assert_array_equal(w.packed, pack_rows(other.data, other.format))
            rows = KernelWeight(w).rows
            assert rows is w.packed and not rows.flags.writeable and rows.ctypes.data % 64 == 0
    for backend in ("c", "numpy"):
        for one, other in zip(logits(packed, backend), logits(plain, backend), strict=True):
            assert np.isfinite(one).all()
            np.testing.assert_array_equal(one, other)
    text = "Hello, wörld!"
    assert packed.tokenizer().encode(text) == plain.tokenizer().encode(text)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["q8", "q4"])
def test_it_is_the_same_model(dtype, tied, tmp_path):
    source = write_source(tmp_path, tied)
    plain = open_checkpoint(convert(source, tmp_path / "plain.gguf", dtype))
    packed = open_checkpoint(convert(source, tmp_path / "packed.gguf", dtype, packed=True))
    assert_same_model(packed, plain, tied)
    assert compare(packed, plain)[0] == compare(plain, packed)[0] == []
    again = [convert(opened, tmp_path / "f32.gguf", "f32").read_bytes() for opened in (packed, plain)]
    assert again[0] == again[1]


def test_every_format_may_be_kept(tmp_path, monkeypatch):
    plain = write_k_quants(tmp_path)
    packed = open_checkpoint(convert(plain, tmp_path / "packed.gguf", None, packed=True))
    assert_same_model(packed, plain)
    kept = {w.format.name for w in packed.weights().values() if isinstance(w, PackedTensor)}
    assert kept == {"Q4_K", "Q6_K", "Q5_K", "Q5_0", "Q4_1"}
    monkeypatch.setattr(operations, "pytorch", lambda args, T: [])  # it takes seconds to import
    errors = [list(operations.operation_errors(opened, [1, 2, 3], 1)) for opened in (packed, plain)]
    assert errors[0] == errors[1] != []
    again = convert(packed, tmp_path / "again.gguf", None, packed=True)
    assert again.read_bytes() == packed.path.read_bytes()


def test_a_mapped_row_needs_no_more_memory(tmp_path):
    """All of it is in the file. NumPy's path expands the weights, as always."""
    source = write_source(tmp_path)
    plain = open_checkpoint(convert(source, tmp_path / "plain.gguf", "q8"))
    packed = open_checkpoint(convert(source, tmp_path / "packed.gguf", "q8", packed=True))
    plans = [memory_plan(ARGS, opened.weights(), "c") for opened in (packed, plain)]
    assert plans[0].made == 0 and plans[1].made > 0
    assert plans[0].mapped == sum(info.nbytes for info in packed.tensors.values())
    assert plans[0].fixed == plans[1].fixed
    plans = [memory_plan(ARGS, opened.weights(), "numpy") for opened in (packed, plain)]
    assert plans[0] == plans[1]


def test_the_reference_reader_refuses_it(tmp_path):
    path = convert(write_source(tmp_path), tmp_path / "packed.gguf", "q4", packed=True)
    with pytest.raises(ValueError, match="is not a valid GGMLQuantizationType"):
        gguf.GGUFReader(path)
    ggml = {type.value for type in gguf.GGMLQuantizationType}
    assert (
        not {f.packed.code for f in PACKED.values()} & ggml
        and min(f.packed.code for f in PACKED.values()) > 1 << 16
    )


Q8_0 = 8


@pytest.mark.parametrize(
    "dims, type, rows, error, message",
    [
        (
            [32, 3],
            32 << 16 | Q8_0,
            32,
            UnsupportedError,
            "groups of 32 packed rows, .* reads groups of 16; conv",
        ),
        ([32, 3], 16 << 16 | 30, 16, UnsupportedError, "unknown type 1048606"),  # BF16 is never packed
        ([32, 3], 16 << 16 | 77, 16, UnsupportedError, "unknown type 1048653"),
        ([40, 3], 16 << 16 | Q8_0, 16, FormatError, "row not a multiple of block: 40, Q8_0 packed 32"),
        ([32], 16 << 16 | Q8_0, 16, FormatError, "is Q8_0 packed and has 1 axes, wanted 2"),
        ([32, 2, 3], 16 << 16 | Q8_0, 16, FormatError, "is Q8_0 packed and has 3 axes, wanted 2"),
        ([32, 3], 16 << 16 | Q8_0, 15, TruncatedError, "incomplete copy or download"),
        ([32, 17], 16 << 16 | Q8_0, 31, TruncatedError, "incomplete copy or download"),
    ],
)
def test_what_cannot_be_read_is_refused(dims, type, rows, error, message, tmp_path):
    head = header(1, 0) + tensor_info("x", dims, type, 0)
    path = tmp_path / "x.gguf"
    path.write_bytes(head + bytes(-len(head) % 32 + rows * 34))
    with pytest.raises(error, match=message):
        GGUFFile(path)


def test_nothing_to_pack_and_nothing_to_keep_are_refused(tmp_path):
    source, out = write_source(tmp_path), tmp_path / "out.gguf"
    for dtype, found in [("f32", "F32"), ("bf16", "BF16, F32"), (None, "F32")]:
        with pytest.raises(ParameterError, match=f"nothing to pack: .*{found}.*; choose dtype q8 or q4"):
            convert(source, out, dtype, packed=True)
    with pytest.raises(ParameterError, match="--dtype is missing, it must be one of f32"):
        convert(source, out, None)
    q2_k = Format("Q2_K", 10, 256, 84, FORMATS["Q4_K"].dequantize)
    expanded = write_k_quants(tmp_path, StoredTensor(q2_k, (256, 256), np.zeros(256 * 84, np.uint8)))
    with pytest.raises(ParameterError, match=r"layers\.1\.feed_forward\.w_up\.weight: .* cannot be kept"):
        convert(expanded, out, None, packed=True)
    assert not out.exists()


def test_the_command_line(tmp_path, capsys):
    source, out = str(write_k_quants(tmp_path).path), str(tmp_path / "out.gguf")
    assert cli.main(["convert", source, out, "--packed", "--dtype", "f16"]) == 2
    assert "nothing to pack" in capsys.readouterr().err
    assert cli.main(["convert", source, out]) == 0
    assert capsys.readouterr().err.endswith(" MiB, every weight in its format\n")
    assert cli.main(["convert", source, out, "--packed"]) == 0
    assert capsys.readouterr().err.endswith(" MiB, packed\n")
    assert cli.main(["info", out]) == 0
    shown = capsys.readouterr().out
    assert "256 x 256      Q4_K packed " in shown and "weights made" not in shown

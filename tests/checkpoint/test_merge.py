"""`merge`: the new model is the base with its adapters, in the base's formats where they hold the update."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from helpers.full_disk import fill_disk
from helpers.gguf_writer import byte_vocabulary, write_llama
from helpers.tiny_models import stored
from helpers.tokenizers import byte_level_metadata, hugging_face
from helpers.updates import ARGS, IDS, SOME, base, every_matrix, random_updates

from numpy_llama.backend import build
from numpy_llama.backend.formats import FORMATS, StoredTensor
from numpy_llama.checkpoint import merge as merging
from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.checkpoint.adapters import write_gguf, write_peft
from numpy_llama.checkpoint.convert import target_format
from numpy_llama.checkpoint.files import part_beside, write_bytes
from numpy_llama.checkpoint.merge import measured, merge
from numpy_llama.checkpoint.names import tensor_names
from numpy_llama.errors import MismatchError, ParameterError, ResourceLimitError
from numpy_llama.lora import LowRank
from numpy_llama.proof.oracle import half_split

LARGE, SMALL = 0.3, 0.005  # the size of an update, relative to its weight


def updates(size: float, names: dict[str, int] = SOME) -> dict[str, LowRank]:
    """Random updates of this size."""
    weights, found = base(), random_updates(2, names)
    for name, one in found.items():
        scale = size * np.linalg.norm(weights[name]) / np.linalg.norm(one.b @ one.a)
        found[name] = one._replace(scale=float(scale))
    return found


def gguf_base(folder, format: str):
    return write_llama(folder / "base.gguf", ARGS, base(), format, **byte_vocabulary(512))


def hf_base(folder, tied: bool = False):
    """A folder of Hugging Face, with a tokenizer."""
    folder.mkdir()
    weights, tensors = base(tied), {}
    for ours, theirs in tensor_names(ARGS, "hf").items():
        heads = {"wq": ARGS.n_heads, "wk": ARGS.n_kv_heads}.get(ours.split(".")[-2])
        if not (tied and ours == "output.weight"):
            tensors[theirs] = weights[ours] if heads is None else half_split(weights[ours], heads)
    tensors = {name: np.ascontiguousarray(w) for name, w in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": ARGS.dim,
        "intermediate_size": ARGS.hidden_dim,
        "num_hidden_layers": ARGS.n_layers,
        "num_attention_heads": ARGS.n_heads,
        "num_key_value_heads": ARGS.n_kv_heads,
        "head_dim": ARGS.head_dim,
        "vocab_size": ARGS.vocab_size,
        "rms_norm_eps": ARGS.norm_eps,
        "rope_theta": ARGS.rope_theta,
        "max_position_embeddings": ARGS.max_seq_len,
        "tie_word_embeddings": tied,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(hugging_face(byte_level_metadata()).to_str())
    return folder


def logits(checkpoint, adapters=()) -> np.ndarray:
    return build(checkpoint.args, checkpoint.weights(), backend="numpy", adapters=adapters)(IDS)


def assert_near(found: np.ndarray, expected: np.ndarray, near: float) -> None:
    assert np.abs(found - expected).max() < near * np.abs(expected).max()


@pytest.mark.parametrize("names", [SOME, every_matrix(3)], ids=["some", "every matrix"])
@pytest.mark.parametrize("format", ["F32", "BF16", "F16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_merged_is_beside(format, names, tmp_path):
    """A large update stays in every format. All other weights keep their bytes."""
    source = open_checkpoint(gguf_base(tmp_path, format))
    found = merge(source, updates(LARGE, names), tmp_path / "out.gguf")
    merged = open_checkpoint(tmp_path / "out.gguf")
    assert merged.args == source.args and [one.name for one in found] == [*names]
    for name, w in source.weights().items():
        new = merged.weights()[name]
        assert new.format.name == w.format.name
        assert np.array_equal(new.data, w.data) == (name not in names), name
    rounded = {"F32": 1e-5, "BF16": 0.02, "F16": 0.005, "Q8_0": 0.03}.get(format, 0.5)
    assert_near(logits(merged), logits(source, [updates(LARGE, names)]), rounded)
    print(*found, sep="\n")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_a_folder_becomes_a_folder(dtype, tied, tmp_path):
    """Rows of q and k keep their order. A tied head that only one of the two updates is tied no more."""
    folder, added = hf_base(tmp_path / "base", tied), updates(LARGE)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    source = open_checkpoint(folder)
    merge(source, added, tmp_path / "out", dtype)
    merged = open_checkpoint(tmp_path / "out")
    assert (merged.chat_template(), merged.chat_template("tool_use")) == ("{{ messages }}", "{{ tools }}")
    assert_near(logits(merged), logits(source, [added]), 1e-5 if dtype is None else 0.02)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["dtype"] == ("float32" if dtype is None else "bfloat16")
    assert merged.tokenizer().encode("abc") == source.tokenizer().encode("abc")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}
    few = {name: one for name, one in added.items() if name != "output.weight"}
    merge(source, few, tmp_path / "few", dtype)
    few_weights = open_checkpoint(tmp_path / "few").weights()
    assert (few_weights["output.weight"] is few_weights["tok_embeddings.weight"]) == tied


def test_a_folder_becomes_a_gguf(tmp_path):
    source, added = open_checkpoint(hf_base(tmp_path / "base")), updates(LARGE)
    for dtype, near in ((None, 1e-5), ("q8", 0.05)):
        merge(source, added, tmp_path / f"{dtype}.gguf", dtype)
        assert_near(logits(open_checkpoint(tmp_path / f"{dtype}.gguf")), logits(source, [added]), near)


# ---------------------------------------------------------------- what rounding would erase


def test_four_bits_lose_a_small_update(tmp_path):
    """The message has the worst weight, three numbers, and the way out; nothing is written."""
    source, out = open_checkpoint(gguf_base(tmp_path, "Q4_0")), tmp_path / "out.gguf"
    with pytest.raises(ParameterError) as refused:
        merge(source, updates(SMALL), out)
    print(refused.value)
    found = re.search(
        r"out\.gguf was not written: rounding would erase the update of 3 of 3 weights; (\S+): "
        r"the update is (\S+)% of the weight, rounding to Q4_0 changes it by (\S+)%, and (\d+)% of the "
        r"update would be left; --dtype q8 keeps (\d+)%",
        str(refused.value),
    )
    name, size, rounding, left, kept = found.groups()
    assert name in SOME and abs(float(size) - 100 * SMALL) < 20 * SMALL and 0.1 < float(rounding) < 10
    assert int(left) < 25 < 50 <= int(kept)
    assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]
    merge(source, updates(SMALL), out, "bf16")
    assert_near(logits(open_checkpoint(out)), logits(source, [updates(SMALL)]), 0.02)


def test_the_ways_out_are_formats_that_the_new_file_can_have(tmp_path):
    """Safetensors have no Q8_0."""
    merge(open_checkpoint(hf_base(tmp_path / "base")), updates(LARGE), tmp_path / "bf16", "bf16")
    ways = {}
    for out in ("out", "out.gguf"):
        with pytest.raises(ParameterError, match="rounding would erase") as caught:
            merge(open_checkpoint(tmp_path / "bf16"), updates(1e-3), tmp_path / out)
        ways[out] = re.findall(r"--dtype (\w+) keeps", str(caught.value))
    assert ways["out"] and "q8" not in ways["out"] and "q8" in ways["out.gguf"]


def test_a_format_that_is_only_read_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (64, 144), dtype=np.uint8)
    blocks[:, 1:4:2] &= 0x1F  # float16 scales that are small
    w = StoredTensor(FORMATS["Q4_K"], (64, 256), blocks)
    a, b = rng.normal(size=(2, 256)).astype(np.float32), rng.normal(size=(64, 2)).astype(np.float32)
    one = measured("w", w, LowRank(a, b, 1e-3), FORMATS["Q4_K"])
    assert one.kept == 0 and str(one).endswith("Q4_K can be read but not written")


@pytest.mark.parametrize("size", [0.001, 0.003, 0.01, 0.03, 0.1])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "q8", "q4"])
def test_the_share_is_measured(dtype, size):
    """As defined, for a whole weight. A weight off the grid keeps its update in any format."""
    name = "layers.0.feed_forward.w_gate.weight"
    update, dense = updates(size, {name: 8})[name], stored(base(), "F32")[name]
    format = target_format(name, dense.shape, dtype)
    off_grid = measured(name, dense, update, format)
    assert abs(off_grid.kept - 1) < 3 * off_grid.rounding / (size * dense.shape[0] ** 0.5 * 8) + 0.01
    on_grid = StoredTensor.quantize(dense.dequantize(), format)
    one = measured(name, on_grid, update, format)
    old, delta = on_grid.dequantize(), update.delta()
    new = StoredTensor.quantize(old + delta, format).dequantize()
    assert abs(one.kept - ((new - old) * delta).sum() / (delta**2).sum()) < 1e-4
    print(f"{dtype:5} update {size:<6} rounding {one.rounding:.4f} kept on the grid {one.kept:.3f}")
    if dtype == "f32":
        assert one.kept > 0.999


def test_a_zero_update_is_kept():
    name = "layers.0.attention.wq.weight"
    w, one = stored(base(), "Q4_0")[name], updates(LARGE, {name: 2})[name]
    assert measured(name, w, one._replace(scale=0.0), FORMATS["Q4_0"]).kept == 1


# ---------------------------------------------------------------- refusals, and nothing half-done


def test_what_cannot_be_written_is_refused(tmp_path):
    of_gguf, of_folder = (
        open_checkpoint(gguf_base(tmp_path, "F32")),
        open_checkpoint(hf_base(tmp_path / "hf")),
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for source, out, dtype, words in [
        (of_gguf, "out", None, r"a folder is written only from a folder of Hugging Face.*ends in \.gguf"),
        (of_folder, "out", "q8", r"safetensors have no Q8_0; wanted a name that ends in \.gguf"),
        (of_folder, "full", None, r"full is there already; wanted the name of a new folder"),
        (of_gguf, "base.gguf", None, r"is part of what is to be converted"),
        (of_folder, "out.gguf", "q5", r"dtype is 'q5', it must be one of f32, bf16"),
    ]:
        with pytest.raises(ParameterError, match=words):
            merge(source, updates(LARGE), tmp_path / out, dtype)
    assert {path.name for path in tmp_path.iterdir()} == {"base.gguf", "hf", "full"}


def test_a_folder_that_reads_back_differently_is_thrown_away(tmp_path, monkeypatch):
    source, read_back = open_checkpoint(hf_base(tmp_path / "base")), merging._read_back

    def spoil(written, digests):
        with (written.path / "model.safetensors").open("r+b") as file:
            file.seek(-5, 2)
            file.write(b"\x01")
        read_back(written, digests)

    monkeypatch.setattr(merging, "_read_back", spoil)
    with pytest.raises(MismatchError, match=r"was written wrongly: .* reads back differently"):
        merge(source, updates(LARGE), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "out.gguf"])
def test_a_full_disk_leaves_nothing(name, tmp_path, monkeypatch):
    """One line names the file by the name that it was to have."""
    source, as_folder = open_checkpoint(hf_base(tmp_path / "base")), name != "out.gguf"
    (tmp_path / "out.gguf").write_text("the old file")
    out = tmp_path / "out" if as_folder else tmp_path / "out.gguf"
    fill_disk(monkeypatch, name)
    with pytest.raises(ResourceLimitError) as caught:
        merge(source, updates(LARGE), out)
    named = out / name if as_folder else out
    assert str(caught.value) == f"{named} was not written: No space left on device; nothing was changed"
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out.gguf"}
    assert (tmp_path / "out.gguf").read_text() == "the old file"


def part_of(process: int, out: Path) -> Path:
    """The name that this process gives to a part beside `out`."""
    return out.with_name(part_beside(out).name.replace(f"-{os.getpid()}-", f"-{process}-"))


def test_what_a_killed_process_left_takes_no_room(tmp_path, monkeypatch):
    """It is removed before the room on the disk is compared with the size of the new file."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    left = part_of(ended.pid, tmp_path / "out")
    left.write_bytes(bytes(9))
    usage = type("Usage", (), {"free": property(lambda self: 1 if left.exists() else 10)})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage())
    write_bytes(tmp_path / "out", b"new")
    assert (tmp_path / "out").read_bytes() == b"new"


@pytest.mark.parametrize("out", ["out", "out.gguf"])
def test_what_a_killed_process_left_is_removed(out, tmp_path, monkeypatch):
    """Not what a process writes that is still running, here or on another machine, and no other file."""
    source = open_checkpoint(hf_base(tmp_path / "base"))
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    here, other = (part_of(ended.pid, tmp_path / name) for name in (out, "other"))
    with monkeypatch.context() as patch:
        patch.setattr("socket.gethostname", lambda: "another-machine")
        elsewhere = part_of(ended.pid, tmp_path / out)
    kept = [part_of(os.getpid(), tmp_path / out), other, elsewhere, tmp_path / f".{out}.part"]
    for path in [*kept, here]:
        path.touch()
    part_of(ended.pid, tmp_path / out).mkdir()
    merge(source, updates(LARGE), tmp_path / out)
    assert {*tmp_path.iterdir()} == {tmp_path / "base", tmp_path / out, *kept}


def test_the_command_merges(main, capsys, tmp_path):
    model, folder = gguf_base(tmp_path, "Q8_0"), tmp_path / "adapter"
    write_peft(folder, updates(LARGE, every_matrix(2)), ARGS)
    write_gguf(tmp_path / "more.gguf", updates(LARGE), ARGS)
    adapters = ("--adapter", str(folder), "--adapter", f"{tmp_path / 'more.gguf'}:0.5")
    out = tmp_path / "out.gguf"
    assert main(["merge", "-m", str(model), *adapters, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    words = r"out\.gguf: 16 weights changed by [\d.e+]+% of their size; at least \d+% of each"
    assert re.search(words, said.err)
    for given in ([str(out)], [str(model), *adapters]):
        assert main(["generate", "-m", *given, "-n", "12", "--exact", "Once"]) == 0
    once, twice = np.array_split(list(capsys.readouterr().out), 2)
    assert np.array_equal(once, twice) and len(once) > 5
    write_peft(folder, updates(1e-4), ARGS)
    assert main(["merge", "-m", str(model), "--adapter", str(folder), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "rounding would erase the update of 3 of 3 weights" in said and "--dtype bf16 keeps" in said

"""`convert`: the new file means what the old one meant, and nothing is ever left half-done."""

import errno
import os
import resource
import signal
import subprocess
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers import generations
from helpers.command_line import PROGRAM, assert_refused, run
from helpers.generations import write_source
from helpers.gguf_writer import byte_vocabulary, write_llama
from helpers.tiny_models import float_weights

import numpy_llama as nl
from numpy_llama.backend import build
from numpy_llama.backend.formats import FORMATS, StoredTensor
from numpy_llama.checkpoint import convert, open_checkpoint
from numpy_llama.errors import (
    FileChangedError,
    FormatError,
    MismatchError,
    NumericsError,
    ParameterError,
    ResourceLimitError,
)
from numpy_llama.text.added import AddedTokens
from numpy_llama.text.chat import CHAT_FORMATS
from numpy_llama.text.tokenizer import UNUSED, Tokenizer

SOURCES = [
    ("Llama 3.1 (scaled)", "HF, sharded"),
    ("tied", "HF, safetensors, F16"),
    ("explicit head_dim", "HF, .bin, BF16"),
    ("Llama 2 (GQA)", "Meta, 1 file, BF16"),
    ("LLaMA 1 (MHA)", "Meta, 4 files, F16"),
]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    return write_source("Llama 3.1 (scaled)", "HF, sharded", tmp_path / "source")


@pytest.mark.parametrize("dtype", convert.DTYPES)
@pytest.mark.parametrize("name, format", SOURCES, ids=lambda value: value.replace(" ", "_"))
def test_the_new_file_means_the_same(name, format, dtype, tmp_path):
    old = open_checkpoint(write_source(name, format, tmp_path))
    out = convert.convert(old, tmp_path / "out.gguf", dtype)
    new = open_checkpoint(out)
    assert (new.format, new.args) == ("GGUF", old.args)
    weights, tied = new.weights(), generations.GENERATIONS[name].tied
    assert weights.keys() == old.weights().keys()
    assert (weights["output.weight"] is weights["tok_embeddings.weight"]) == tied
    for ours, w in old.weights().items():
        target = convert.target_format(ours, w.shape, dtype)
        assert weights[ours].format.name == target.name and weights[ours].in_place
        wanted = StoredTensor.quantize(w.dequantize(), target)
        np.testing.assert_array_equal(weights[ours].data, wanted.data)
    if dtype in ("f32", "bf16", "f16"):  # the weights are numbers that all three hold
        logits = [build(c.args, c.weights(), exact=True)(generations.IDS) for c in (old, new)]
        np.testing.assert_array_equal(*logits)
    for text in ("Hello, wörld! 12345", "<|eot_id|> is no control token", " \n\n\t x"):
        assert new.tokenizer().encode(text) == old.tokenizer().encode(text)
    assert new.tokenizer().eos_ids == old.tokenizer().eos_ids
    assert new.chat_format() is old.chat_format() is CHAT_FORMATS["llama3"]


def test_both_templates_are_kept(source, tmp_path, monkeypatch):
    old, templates = open_checkpoint(source), {"default": "one", "tool_use": "tools"}
    monkeypatch.setattr(old, "chat_template", lambda name="default": templates.get(name), raising=False)
    found = open_checkpoint(convert.convert(old, tmp_path / "out.gguf", "f32")).chat_format()
    assert (found.source, found.tool_use.source) == ("one", "tools")
    del templates["tool_use"]
    assert open_checkpoint(convert.convert(old, tmp_path / "o.gguf", "f32")).chat_format().tool_use is None


@pytest.mark.parametrize("dtype", convert.DTYPES)
def test_the_reference_reader_reads_it(dtype, source, tmp_path):
    out = convert.convert(open_checkpoint(source), tmp_path / "out.gguf", dtype)
    ours = open_checkpoint(out)
    tensors = gguf.GGUFReader(out).tensors
    assert {t.name for t in tensors} == ours.tensors.keys()
    for t in tensors:
        expected = gguf.dequantize(t.data, t.tensor_type)
        np.testing.assert_array_equal(ours.file.tensor(t.name).dequantize(), expected)


def test_which_formats_are_chosen():
    shape = (64, 128)
    for dtype, layer, outer in [("q4", "Q4_0", "Q8_0"), ("q8", "Q8_0", "Q8_0"), ("bf16", "BF16", "BF16")]:
        assert convert.target_format("layers.0.attention.wq.weight", shape, dtype) is FORMATS[layer]
        assert convert.target_format("output.weight", shape, dtype) is FORMATS[outer]
        assert convert.target_format("tok_embeddings.weight", shape, dtype) is FORMATS[outer]
        assert convert.target_format("norm.weight", (64,), dtype) is FORMATS["F32"]
    assert convert.target_format("layers.0.attention.wq.weight", (64, 72), "q4") is FORMATS["F32"]


def test_a_real_model_from_q4_1_to_q8_answers_rightly(smollm2_path, tmp_path):
    out = tmp_path / "smollm2-q8.gguf"
    done = run("convert", str(smollm2_path), str(out), "--dtype", "q8")
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"smollm2-q8.gguf: 138" in done.stderr and done.stderr.count(b"\n") == 1
    answer = run("chat", "-m", str(out), "Name the capital of France.")
    assert answer.stdout == b"The capital of France is Paris.\n"
    text = "The quick brown fox - 1234 - jumps, <|im_start|>!"
    assert nl.load_tokenizer(out).encode(text) == nl.load_tokenizer(smollm2_path).encode(text)


# Whatever happens, OUT is what it was, and nothing else is left behind


def assert_untouched(folder: Path, before: dict[str, bytes]) -> None:
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


@pytest.fixture
def old_out(tmp_path):
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "out.gguf").write_bytes(b"the old file")
    return folder / "out.gguf"


def test_progress_counts_up_to_the_whole_file_twice(source, tmp_path):
    heard = []
    out = convert.convert(
        open_checkpoint(source), tmp_path / "o", "q8", None, lambda *news: heard.append(news)
    )
    for what in ("converting", "checking"):
        steps = [(done, total) for w, done, total in heard if w == what]
        assert steps == sorted(steps) and len({total for _, total in steps}) == 1
        assert 0.95 * out.stat().st_size < steps[-1][0] <= steps[-1][1] <= out.stat().st_size


@pytest.mark.parametrize("when", ["converting", "checking"])
def test_ctrl_c_leaves_the_old_file(when, source, old_out):
    def interrupt(what, done, total):
        if what == when:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.convert(open_checkpoint(source), old_out, "q8", None, interrupt)
    assert_untouched(old_out.parent, {"out.gguf": b"the old file"})


@pytest.mark.parametrize("spoilt", ["header", "tensor"])
def test_what_reads_back_differently_is_thrown_away(spoilt, source, old_out, monkeypatch):
    verify = convert.verify

    def spoil(written, args, infos, sums, progress):
        with written.path.open("r+b") as file:
            file.seek(infos[3].offset + 5 if spoilt == "tensor" else 24)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
        verify(written.__class__(written.path), args, infos, sums, progress)

    monkeypatch.setattr(convert, "verify", spoil)
    with pytest.raises(nl.NumpyLlamaError) as caught:
        convert.convert(open_checkpoint(source), old_out, "bf16")
    if spoilt == "tensor":
        assert isinstance(caught.value, MismatchError) and "reads back differently" in str(caught.value)
    assert_untouched(old_out.parent, {"out.gguf": b"the old file"})


def test_a_full_disk_leaves_the_old_file(source, old_out):
    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = run("convert", str(source), str(old_out), "--dtype", "f32", preexec_fn=small_files)
    assert_refused(done, 1, str(old_out), "was not written", "nothing was changed")
    assert_untouched(old_out.parent, {"out.gguf": b"the old file"})


def test_a_disk_without_room_is_seen_beforehand(source, old_out, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.stat_result and type("U", (), {"free": 999}))
    with pytest.raises(ResourceLimitError, match=r"needs [\d,]+ bytes, the disk has 999 left"):
        convert.convert(open_checkpoint(source), old_out, "f32")
    assert_untouched(old_out.parent, {"out.gguf": b"the old file"})


@pytest.mark.parametrize("step", ["open", "fsync", "close"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EACCES, errno.EINVAL])
def test_what_fails_after_the_rename_says_that_the_new_file_is_there(
    step, number, source, old_out, monkeypatch
):
    """The folder cannot be opened, synchronized or closed: the name is new all the same."""
    usual, folders = {name: getattr(os, name) for name in ("open", "fsync", "close")}, set()

    def instead(name, *arguments, **options):
        of_folder = arguments[0] in folders or arguments[0] == old_out.parent
        if name == step and of_folder:
            raise OSError(number, os.strerror(number))
        result = usual[name](*arguments, **options)
        if name == "open" and of_folder:
            folders.add(result)
        return result

    for name in usual:
        monkeypatch.setattr(os, name, partial(instead, name))
    with pytest.raises(FormatError, match=r"out\.gguf was written and is whole, but its folder") as caught:
        convert.convert(open_checkpoint(source), old_out, "q8")
    assert os.strerror(number) in str(caught.value) and "nothing was changed" not in str(caught.value)
    assert os.listdir(old_out.parent) == ["out.gguf"]
    assert open_checkpoint(old_out).weights()


def test_a_part_that_cannot_be_removed_is_named(source, old_out, monkeypatch):
    """The old file is there, and beside it what was written."""

    def no_space(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    def no_unlink(path, **options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(convert, "write_tensor", no_space)
    monkeypatch.setattr(Path, "unlink", no_unlink)
    with pytest.raises(
        FormatError, match=r"not written: .*No space.*; \.out\.gguf\..*part is left"
    ) as caught:
        convert.convert(open_checkpoint(source), old_out, "q8")
    assert "nothing was changed" not in str(caught.value)
    assert old_out.read_bytes() == b"the old file"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_the_old_file(number, smollm2_path, old_out):
    command = [PROGRAM, "convert", str(smollm2_path), str(old_out), "--dtype", "f32"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not (parts := list(old_out.parent.glob(".out.gguf.*"))) or parts[0].stat().st_size < 1 << 20:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, message = process.communicate(timeout=20)
    expected = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
    assert (process.returncode, message) == (expected[number], b"")
    assert old_out.read_bytes() == b"the old file"
    left = list(old_out.parent.glob(".*"))
    assert len(left) == (number == signal.SIGKILL)  # nobody can tidy up after that one


def test_a_source_that_changes_meanwhile_is_noticed(source, old_out):
    opened = open_checkpoint(source)
    os.utime(opened.files[0].path, (1, 1))
    with pytest.raises(FileChangedError, match="time of change was"):
        convert.convert(opened, old_out, "q8")
    assert_untouched(old_out.parent, {"out.gguf": b"the old file"})


def test_refusals(source, tmp_path):
    opened = open_checkpoint(source)
    with pytest.raises(ParameterError, match="dtype is 'q2', it must be one of f32, bf16, f16, q8, q4"):
        convert.convert(opened, tmp_path / "o", "q2")
    with pytest.raises(ParameterError, match="is a folder"):
        convert.convert(opened, tmp_path, "q8")
    link = tmp_path / "link"
    link.symlink_to(opened.files[0].path)
    second = tmp_path / "MODEL"  # a file system may take it for the same name
    second.hardlink_to(opened.files[0].path)
    for same in (opened.files[0].path, link, second):
        with pytest.raises(ParameterError, match="part of what is to be converted"):
            convert.convert(opened, same, "q8")
    assert_refused(run("convert", str(source), str(tmp_path / "no" / "o"), "--dtype", "q8"), 1, "cannot be")
    assert_refused(run("convert", str(source), str(tmp_path / "o")), 2, "--dtype")


def test_nothing_that_belongs_to_the_source_is_overwritten(source):
    opened = open_checkpoint(source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    for name in ("tokenizer.model", "config.json", "model.safetensors.index.json"):
        with pytest.raises(ParameterError, match="part of what is to be converted"):
            convert.convert(opened, source / name, "q8")
    assert_untouched(source, before)


def test_only_files_are_replaced(source, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ParameterError, match="no regular file"):
        convert.convert(open_checkpoint(source), tmp_path / "fifo", "q8")
    assert (tmp_path / "fifo").is_fifo()


@pytest.mark.parametrize(
    "bad, dtype",
    [(np.nan, "f32"), (np.inf, "bf16"), (7e4, "f16"), (np.nan, "f16"), (7e4, "q8"), (np.nan, "q4")],
)
def test_a_weight_that_cannot_be_stored_is_named(bad, dtype, tmp_path, old_out):
    weights = dict(generations.weights_of("Llama 3"))
    weights["layers.1.feed_forward.w_up.weight"] = weights["layers.1.feed_forward.w_up.weight"].copy()
    weights["layers.1.feed_forward.w_up.weight"][3, 5] = bad
    path = write_llama(tmp_path / "bad.gguf", generations.LLAMA_3, weights, **byte_vocabulary(576))
    with pytest.raises(NumericsError, match=r"bad\.gguf: blk\.1\.ffn_up\.weight"):
        convert.convert(open_checkpoint(path), old_out, dtype)
    assert_untouched(old_out.parent, {"out.gguf": b"the old file"})


def test_rows_without_a_token_are_not_chosen_after_converting_either(tmp_path, source):
    """The embedding has 576 rows, the tokenizer 512 ids: greedy or not, no other id may come out."""
    out = convert.convert(open_checkpoint(source), tmp_path / "out.gguf", "f32")
    old, new = nl.load(source), nl.load(out)
    assert (old.tokenizer.vocab_size, new.tokenizer.vocab_size) == (512, 576)
    for seed in range(3):
        options = {"max_tokens": 60, "temperature": 5.0, "seed": seed}
        made = [llama.generate([1, 2, 3], **options).tokens for llama in (old, new)]
        assert made[0] == made[1] and max(made[0]) < 512


@pytest.mark.parametrize(
    "n_used, rows, fits",
    [
        (32_000, 32_000, True),
        (32_001, 32_000, False),
        (32_022, 32_256, True),  # DeepSeek Coder
        (512, 1_535, True),
        (512, 1_536, False),
        (100_016, 102_400, True),  # DeepSeek LLM
        (128_000, 147_000, False),
        (32_000, 128_256, False),
        (128_256, 202_048, False),
    ],
)
def test_a_tokenizer_is_that_of_its_embedding(n_used, rows, fits):
    """Padding is less than 1,024 rows, or less than an eighth."""
    kinds = np.ones(n_used, np.int32)
    unused = {"tokenizer.ggml.token_type": np.append(kinds, np.full(max(rows - n_used, 0), UNUSED, np.int32))}
    for entries in ({"tokenizer.ggml.token_type": kinds}, unused):
        n, added = len(entries["tokenizer.ggml.token_type"]), AddedTokens({})
        tokenizer = Tokenizer(
            [""] * n, [], {}, added, lambda part, begins: [], None, (), False, False, entries
        )
        if fits:
            tokenizer.check_rows(rows)
            continue
        with pytest.raises(MismatchError, match=f"the tokenizer has {n_used} ids, the embedding {rows} rows"):
            tokenizer.check_rows(rows)


def test_the_tokenizer_of_another_model_is_not_converted(tmp_path, old_out):
    """512 ids before an embedding of 2,000 rows: neither run nor written."""
    args = replace(generations.LLAMA_3, vocab_size=2000)
    weights = float_weights(args)
    path = write_llama(tmp_path / "model.gguf", args, weights, **byte_vocabulary(2000))
    for use in (nl.load, lambda path: convert.convert(open_checkpoint(path), old_out, "q8")):
        with pytest.raises(MismatchError, match="the tokenizer has 256 ids, the embedding 2000 rows"):
            use(path)
    assert_untouched(old_out.parent, {"out.gguf": b"the old file"})


def test_rows_beyond_any_padding_are_remarked_upon(tmp_path):
    """As DeepSeek LLM has them: it runs, and stderr has the two numbers."""
    args = replace(generations.LLAMA_3, n_layers=1, vocab_size=9000)
    weights = float_weights(args)
    vocabulary = byte_vocabulary(9000)
    vocabulary["tokens"][256:] = [f"word{i}" for i in range(256, 9000)]
    for n in (7900, 7976, 7977):
        vocabulary["token_type"][256:] = np.where(np.arange(256, 9000) < n, 1, 5)
        path = write_llama(tmp_path / "model.gguf", args, weights, **vocabulary)
        done = run("generate", "-m", str(path), "--prompt-ids", "1", "-n", "1")
        remark = f"the tokenizer has {n} ids, the embedding 9000 rows: is it".encode()
        assert done.returncode == 0 and (remark in done.stderr) == (9000 - n >= 1024)


def test_the_new_file_has_the_rights_of_any_new_file(source, tmp_path):
    out = convert.convert(open_checkpoint(source), tmp_path / "o", "q8")
    (tmp_path / "plain").touch()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode

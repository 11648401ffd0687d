"""Session files: the same bits in another process, and no other file is taken for one."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers.command_line import assert_refused, run
from helpers.tiny_models import SPEAKER, float_weights, write_speaker
from safetensors.numpy import load_file

import numpy_llama as nl
from numpy_llama.errors import (
    ContextOverflowError,
    FormatError,
    MismatchError,
    ParameterError,
    ResourceLimitError,
    TruncatedError,
    UnsupportedError,
)
from numpy_llama.generation.generate import forward
from numpy_llama.lora import LoRALinear

ARGS = replace(SPEAKER, head_dim=32, max_seq_len=160)
WINDOW = 12
KINDS = {
    "float16": {},
    "float32": {"exact": True},
    "q8": {"cache_dtype": "q8"},
    "numpy": {"backend": "numpy"},
    "float64": {"backend": "numpy", "dtype": "float64"},
    "numpy q8": {"backend": "numpy", "cache_dtype": "q8"},
}
IN_A_NEW_PROCESS = """
import json, sys
import numpy as np
import numpy_llama as nl
from numpy_llama.generation.generate import forward

model, path, options = sys.argv[1:]
llama = nl.load(model, threads=1, **json.loads(options))
session = llama.load_session(path)
print(json.dumps([session.ids, forward(llama.model, [7], session).astype(float).tolist()]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sessions")


@pytest.fixture(scope="module")
def path(folder):
    return write_speaker(folder / "speaker.gguf", ARGS)


@pytest.fixture(scope="module")
def llama(path):
    return nl.load(path, threads=1)


def held(llama, n: int) -> nl.Session:
    """A session that holds n positions."""
    session, ids = llama.new_session(), np.random.default_rng(n).integers(256, size=n).tolist()
    for begin in range(0, n, 8):
        forward(llama.model, ids[begin : begin + 8], session)
    return session


@pytest.mark.parametrize("kind", KINDS)
def test_another_process_goes_on_with_the_same_bits(kind, path, folder):
    llama = nl.load(path, threads=1, **KINDS[kind])
    session, saved = held(llama, 21), folder / "saved.session"
    llama.save_session(session, saved)
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, str(path), str(saved), json.dumps(KINDS[kind])]
    done = subprocess.run(command, capture_output=True, check=True)
    ids, logits = json.loads(done.stdout)
    assert ids == [*session.ids, 7]
    np.testing.assert_array_equal(logits, forward(llama.model, [7], session))


@pytest.mark.parametrize("n", [0, 1, 100, 147, 155])
@pytest.mark.parametrize("kind", KINDS)
def test_a_window_keeps_what_it_has_not_dropped(kind, n, folder, monkeypatch):
    """With room for 148 positions, it has dropped 128 of 155."""
    monkeypatch.setattr("numpy_llama.window.PREFILL_CHUNK", 8)
    model = write_speaker(folder / "window.gguf", replace(ARGS, sliding_window=WINDOW))
    llama = nl.load(model, threads=1, **KINDS[kind])
    session, saved = held(llama, n), folder / "window.session"
    llama.save_session(session, saved)
    loaded = llama.load_session(saved)
    assert loaded.ids == session.ids and len(load_file(saved)["keys"][0, 0]) == (27 if n == 155 else n)
    assert (loaded.cache.filled, loaded.cache.dropped) == (session.cache.filled, session.cache.dropped)
    np.testing.assert_array_equal(*(forward(llama.model, [7], one) for one in (session, loaded)))


def test_what_is_saved_is_what_the_model_can_go_on_from(llama, folder):
    """After a return to the beginning, and a branch. The session of another model is refused, and kept."""
    saved, session = folder / "part.session", held(llama, 30)
    session.keep_prefix_of([*session.ids[:9], 300], llama.model)
    llama.save_session(session.branch(), saved)
    loaded = llama.load_session(saved, max_seq_len=9)
    assert loaded.ids == session.ids and len(loaded.ids) == 9 and loaded.cache.max_seq_len == 9
    other = nl.Llama(llama.model.with_parts({"layers.0.feed_forward": np.zeros_like}), llama.tokenizer)
    with pytest.raises(MismatchError, match="the session is another model's"):
        other.save_session(session, saved)
    assert llama.load_session(saved).ids == session.ids


def test_a_file_is_replaced_when_the_new_one_is_whole(llama, tmp_path, monkeypatch):
    saved = tmp_path / "a.session"
    llama.save_session(held(llama, 5), saved)
    before = saved.read_bytes()
    monkeypatch.setattr(
        "os.fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(ResourceLimitError, match=r"a\.session was not written: No space left"):
        llama.save_session(held(llama, 6), saved)
    assert saved.read_bytes() == before and [*tmp_path.iterdir()] == [saved]


# --- files that are refused -------------------------------------------------------------------------------


def write(path, tensors, header=lambda entries: json.dumps(entries).encode(), tail=b""):
    """A safetensors file, of which `header` may change the entries or spell them as it likes."""
    entries, data = {}, b""
    for name, x in tensors.items():
        dtype = {"f": "F", "u": "U", "i": "I"}[x.dtype.kind] + str(8 * x.itemsize)
        offsets = [len(data), len(data) + x.nbytes]
        entries[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": offsets}
        data += x.tobytes()
    text = header(entries)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data + tail)


def about(**changes):
    """Other values in the JSON of the file. Without a value the key goes."""

    def change(tensors):
        found = json.loads(tensors["session"].tobytes()) | changes
        text = json.dumps({key: value for key, value in found.items() if value is not None})
        tensors["session"] = np.frombuffer(text.encode(), np.uint8)

    return change


def raw(text):
    return lambda tensors: tensors.update(session=np.frombuffer(text.encode(), np.uint8))


def number(name, value):
    def change(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name][1, 0, 3, 5] = value

    return change


def entry(name, **changes):
    return lambda entries: json.dumps(entries | {name: entries[name] | changes}).encode()


def nothing(tensors):
    """The tensors as they are."""


# What is changed in the tensors, what in the header or behind the data, the error, and its words.
HOSTILE = {
    "other ids": (about(ids=[1, 2]), {}, MismatchError, r"keys are F16 of shape .*12, 32\), .* 2, 32\)"),
    "an id too large": (about(ids=[259] * 12), {}, FormatError, "id 259 is no whole number from 0 to 258"),
    "an id below 0": (about(ids=[-1] * 12), {}, FormatError, "id -1 is no whole number"),
    "an id that is a float": (about(ids=[1.5] * 12), {}, FormatError, "id 1.5 is no whole number"),
    "an id that is a bool": (about(ids=[True] * 12), {}, FormatError, "id True is no whole number"),
    "an id that is a list": (about(ids=[[]] * 12), {}, FormatError, r"id \[\] is no whole number"),
    "ids that are a text": (about(ids="abc"), {}, nl.NumpyLlamaError, "ids is 'abc', wanted list"),
    "no ids": (about(ids=None), {}, nl.NumpyLlamaError, "has no ids"),
    "more ids than the context": (about(ids=[1] * 161), {}, ContextOverflowError, "161 ids, .* room for 160"),
    "dropped below 0": (about(dropped=-1), {}, FormatError, "-1 positions were dropped, of 12"),
    "all dropped": (about(dropped=13), {}, FormatError, "13 positions were dropped, of 12"),
    "dropped without a window": (about(dropped=2), {}, FormatError, "2 were dropped, as this cache cannot"),
    "dropped is a text": (about(dropped="2"), {}, nl.NumpyLlamaError, "dropped is '2', wanted int"),
    "another model": (about(model="0" * 32), {}, MismatchError, "was made with another model: its digest is"),
    "another tokenizer": (about(tokenizer="x"), {}, MismatchError, "was made with another tokenizer"),
    "a digest that is a number": (about(model=5), {}, nl.NumpyLlamaError, "model is 5, wanted str"),
    "no JSON": (raw("{"), {}, FormatError, "session is no JSON that can be read"),
    "a list": (raw("[]"), {}, FormatError, "wanted a JSON object"),
    "deep JSON": (raw("[" * 100_000), {}, FormatError, "nested too deeply"),
    "a key twice": (raw('{"ids": [], "ids": [1]}'), {}, FormatError, "duplicate key 'ids'"),
    "a number of many digits": (raw('{"dropped": ' + "9" * 9999 + "}"), {}, FormatError, "is no JSON"),
    "a NaN": (number("keys", np.nan), {}, FormatError, "keys has a number that is not finite"),
    "an infinity": (number("values", -np.inf), {}, FormatError, "values has a number that is not finite"),
    "keys in float32": (
        lambda t: t.update(keys=t["keys"].astype("f4")), {}, MismatchError, "keys are F32 .* cache has F16",
    ),
    "one position less": (
        lambda t: t.update(values=t["values"][:, :, 1:].copy()), {}, MismatchError, "values are F16 of shape",
    ),
    "one layer more": (
        lambda t: t.update(keys=np.concatenate([t["keys"]] * 2)), {}, MismatchError, "keys are F16 of shape",
    ),
    "no values": (lambda t: t.pop("values"), {}, FormatError, "is no session: it has not the tensors"),
    "no session": (lambda t: t.pop("session"), {}, FormatError, "is no session: it has not the tensors"),
    "a tensor more": (lambda t: t.update(more=t["keys"]), {}, FormatError, "is no session"),
    "the JSON in float32": (
        lambda t: t.update(session=np.zeros(9, "f4")), {}, FormatError, r"has not the tensors session \(U8\)",
    ),
    "bytes behind the data": (nothing, {"tail": b"x"}, FormatError, "file not fully covered"),
    "overlapping offsets": (
        nothing, {"header": entry("values", data_offsets=[100, 100 + 3072])}, FormatError, "overlap: ",
    ),
    "another shape": (nothing, {"header": entry("keys", shape=[2, 2, 12, 31])}, FormatError, "offsets give"),
    "a name twice": (
        nothing,
        {"header": lambda e: (json.dumps(e)[:-1] + ', "keys": ' + json.dumps(e["keys"]) + "}").encode()},
        FormatError,
        "duplicate key 'keys'",
    ),
    "offsets beyond the file": (
        nothing, {"header": entry("session", shape=[1 << 40], data_offsets=[6144, 6144 + (1 << 40)])},
        TruncatedError, "the tensors at byte",
    ),
    "a shape beyond all memory": (
        nothing, {"header": entry("keys", shape=[1 << 62, 1 << 62])}, ResourceLimitError, "is larger than",
    ),
    "another dtype": (nothing, {"header": entry("keys", dtype="X9")}, UnsupportedError, "unknown dtype 'X9'"),
    "a deep header": (nothing, {"header": lambda e: b"[" * 100_000}, FormatError, "nested too deeply"),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(llama, folder):
    llama.save_session(held(llama, 12), folder / "good.session")
    return folder / "good.session"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(name, llama, good, tmp_path):
    change, options, error, words = HOSTILE[name]
    tensors, bad = load_file(good), tmp_path / "bad.session"
    write(bad, tensors)
    assert len(llama.load_session(bad).ids) == 12  # what follows is refused for the change alone
    change(tensors)
    write(bad, tensors, **options)
    with pytest.raises(error, match=f"{bad}.*{words}"):
        llama.load_session(bad)


def test_a_cut_or_longer_header_is_refused(llama, good, tmp_path):
    whole, bad = good.read_bytes(), tmp_path / "bad.session"
    for n in range(0, len(whole), 97):
        bad.write_bytes(whole[:n])
        with pytest.raises(TruncatedError, match=str(bad)):
            llama.load_session(bad)
    bad.write_bytes((1 << 40).to_bytes(8, "little") + whole[8:])
    with pytest.raises(ResourceLimitError, match="header > 100,000,000 bytes"):
        llama.load_session(bad)


def test_a_scale_in_q8_that_is_not_finite_is_refused(path, tmp_path):
    llama = nl.load(path, threads=1, cache_dtype="q8")
    llama.save_session(held(llama, 12), tmp_path / "a.session")
    tensors = load_file(tmp_path / "a.session")
    tensors["keys"][0, 0, 3, :2] = np.array([np.nan], "<f2").view(np.uint8)
    write(tmp_path / "a.session", tensors)
    with pytest.raises(FormatError, match="keys has a number that is not finite"):
        llama.load_session(tmp_path / "a.session")


@pytest.mark.parametrize("name", ["", "a\0b", "\ud800", "a/\ud800", "..\0/a", b"a", None])
def test_what_no_file_can_have_as_its_name_is_refused(llama, name):
    for use in (llama.load_session, lambda path: llama.save_session(held(llama, 3), path)):
        with pytest.raises(ParameterError, match="it must be the path of a file"):
            use(name)


def test_no_other_file_is_a_session(llama, path, folder):
    for other, words in [(path, "header"), (folder, "is a folder"), (folder / "none", "is not there")]:
        with pytest.raises(nl.NumpyLlamaError, match=f"{other}.*{words}"):
            llama.load_session(other)
    with pytest.raises(ParameterError, match="path is 5, it must be the path of a file"):
        llama.load_session(5)


def test_another_model_is_named(llama, path, good):
    """An adapter, an exchanged part, other weights, other angles. A smaller context has the same angles."""
    wq = llama.model.layers[0].attention.wq
    lora = LoRALinear(wq, np.ones((1, ARGS.dim), np.float32), np.ones((wq.weight.shape[0], 1), np.float32))
    models = [
        llama.model.with_parts({"layers.0.attention.wq": lora}),
        llama.model.with_parts({"layers.1.feed_forward": np.zeros_like}),
        nl.Transformer(ARGS, float_weights(ARGS, seed=1)),
        nl.Transformer(replace(ARGS, rope_theta=2e4), float_weights(ARGS)),
    ]
    for model in models:
        with pytest.raises(MismatchError, match="was made with another model"):
            nl.Llama(model, llama.tokenizer).load_session(good)
    shorter = nl.load(path, threads=1, max_seq_len=64)
    assert shorter.load_session(good).cache.max_seq_len == 64
    with pytest.raises(MismatchError, match=r"keys are F16 .* has F32"):  # the weights are the same
        nl.load(path, backend="numpy").load_session(good)


# --- the command ------------------------------------------------------------------------------------------


def test_generate_begins_with_the_session_of_a_file(path, tmp_path, main, capsys):
    saved = tmp_path / "a.session"
    options = "generate", "-m", str(path), "-t", "1", "-n", "5", "--json"
    made = []
    for text in ("Once upon", "Once upon", "Once in"):
        for session in ([], ["--session", str(saved)]):
            assert main([*options, text, *session]) == 0
            made.append(json.loads(capsys.readouterr().out)["tokens"])
        assert made[-1] == made[-2]
    assert len(json.loads(load_file(saved)["session"].tobytes())["ids"]) == 1 + 7 + 5 - 1


def test_a_bad_session_is_one_line_before_the_text(path, tmp_path):
    saved = tmp_path / "bad"
    saved.write_bytes(b"no session at all")
    done = run("generate", "-m", str(path), "hi", "--session", str(saved))
    assert_refused(done, 1, f"{saved}: header > 100,000,000 bytes")
    assert b"read as a session" in done.stderr
    done = run("generate", "-m", str(path), "hi", "--session", str(tmp_path / "no" / "folder"))
    assert_refused(done, 1, "folder cannot be written: No such file or directory")


def test_a_command_that_fails_leaves_no_new_session(path, tmp_path):
    """Nor does it change one that was there."""
    new, old = tmp_path / "new", tmp_path / "old"
    assert run("generate", "-m", str(path), "-n", "2", "hi", "--session", str(old)).returncode == 0
    before = old.read_bytes()
    for saved in (new, old):
        for bad in (["hi", "--draft", str(tmp_path / "none.gguf")], ["x" * 100_000]):
            done = run("generate", "-m", str(path), *bad, "--session", str(saved))
            assert done.returncode == 1 and done.stderr.count(b"\n") == 1
    assert not new.exists() and old.read_bytes() == before
    assert_refused(run("generate", "-m", str(path), "hi", "--session", ""), 2, "an empty text is no path")

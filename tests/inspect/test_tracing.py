"""`trace` and `edit`: they see what the formulas say, and the model has no code for them."""

import asyncio
import contextvars
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_models import LOOKED_INTO, write_tiny

import numpy_llama as nl
from numpy_llama import cli
from numpy_llama import functional as F
from numpy_llama.errors import MismatchError, NumericsError, ParameterError, check_whole
from numpy_llama.inspect.tracing import EXAMPLES, PLACES, Trace, attention_weights, lens, names

EVERYTHING = ("*", "layers.*", "layers.*.*", "layers.*.*.*")
IDS = np.array([[1, 40, 41, 42, 43, 44, 45], [1, 90, 80, 70, 60, 50, 40]])
# C and NumPy sum in different orders: float32, of a model with three layers.
NEAR = 1e-5


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "F32")


@pytest.fixture(scope="module", params=["numpy", "c"])
def llama(request, path) -> nl.Llama:
    return nl.load(path, backend=request.param, exact=request.param == "c")


def test_every_intermediate_has_the_shape_that_its_letters_say(llama):
    with nl.trace(llama, *EVERYTHING) as seen:
        llama.model(IDS)
    assert [*seen] == names(llama.model, *EVERYTHING) and len(seen) == 3 + LOOKED_INTO.n_layers * 18
    sizes = {"B": 2, "T": 7, "S": 7, "D": 64, "H": 4, "K": 2, "Dh": 32, "F": 96, "V": 300}
    for place, (letters, _) in PLACES.items():
        shape = [eval(letter, {}, sizes) for letter in letters.replace("...", "B T").split()]
        for name in names(llama.model, place):
            assert seen[name].shape == tuple(shape), name


def test_the_intermediates_make_each_other(llama):
    with nl.trace(llama, *EVERYTHING) as seen:
        logits = llama.model(IDS)

    def near(found, expected):
        np.testing.assert_allclose(found, expected, rtol=NEAR, atol=NEAR)

    stream, angles = seen["tok_embeddings"], llama.model.freqs_cis[:7]
    for i in range(LOOKED_INTO.n_layers):
        of = {
            name.removeprefix(f"layers.{i}."): x
            for name, x in seen.items()
            if name.startswith(f"layers.{i}.")
        }
        a = {name.removeprefix("attention."): x for name, x in of.items() if name.startswith("attention.")}
        f = {
            name.removeprefix("feed_forward."): x
            for name, x in of.items()
            if name.startswith("feed_forward.")
        }
        near(a["q"], F.apply_rotary_emb(a["wq"].reshape(2, 7, 4, 32), angles))
        near(a["k"], F.apply_rotary_emb(a["wk"].reshape(2, 7, 2, 32), angles))
        near(a["v"], a["wv"].reshape(2, 7, 2, 32))
        near(a["scores"], F.attention_scores(a["q"], a["k"]))
        near(a["weights"], F.softmax(a["scores"]))
        near(a["heads"], F.attention(a["q"], a["k"], a["v"]))
        near(of["h"], stream + of["attention"])
        near(f["swiglu"], F.swiglu(f["w_gate"], f["w_up"]))
        near(seen[f"layers.{i}"], of["h"] + of["feed_forward"])
        stream = seen[f"layers.{i}"]
    near(seen["norm"], F.rms_norm(stream, llama.model.norm.weight, LOOKED_INTO.norm_eps))
    assert np.array_equal(seen["output"], logits)


def test_c_sees_what_numpy_sees(path):
    recorded = []
    for options in ({"backend": "numpy"}, {"exact": True}):
        llama = nl.load(path, **options)
        with nl.trace(llama, *EVERYTHING) as seen:
            llama.model(IDS)
        recorded.append(seen)
    for name, expected in recorded[0].items():
        np.testing.assert_allclose(recorded[1][name], expected, rtol=NEAR, atol=NEAR, err_msg=name)


def test_to_be_looked_at_changes_nothing(llama):
    """But that a layer is taken step by step by C, in float32, if its steps are wanted."""
    before, parts = llama.model(IDS), vars(llama.model).copy()
    with nl.trace(llama, "*", "layers.*"):
        assert np.array_equal(llama.model(IDS), before)
    with nl.trace(llama, *EVERYTHING), nl.trace(llama, "layers.1.attention.weights"):
        np.testing.assert_allclose(llama.model(IDS), before, rtol=NEAR, atol=NEAR)
    assert vars(llama.model) == parts
    with pytest.raises(ZeroDivisionError), nl.edit(llama, "layers.*", lambda x: 1 // 0):
        llama.model(IDS)
    assert vars(llama.model) == parts and np.array_equal(llama.model(IDS), before)


def test_passes_are_kept_apart(llama):
    with nl.trace(llama, "layers.1.attention.k", "output") as seen:
        made = llama.generate([1, 50, 60], max_tokens=4)
    assert [p["layers.1.attention.k"].shape[1] for p in seen.passes] == [3, 4, 5, 6][: len(made.tokens)]
    assert [int(p["output"].argmax()) for p in seen.passes] == made.tokens
    assert seen["output"] is seen.passes[-1]["output"]


def test_what_is_recorded_stays(llama):
    """Keys and values are views of a cache that is written over."""
    cache = llama.model.new_cache(2)
    with nl.trace(llama, "layers.0.attention.v") as seen:
        llama.model(IDS, 0, cache)
    before = seen["layers.0.attention.v"].copy()
    llama.model(IDS[:, ::-1], 0, cache)
    assert np.array_equal(seen["layers.0.attention.v"], before)


@pytest.mark.parametrize("name", [name for name in PLACES if not name.endswith(".h")])
def test_what_is_replaced_counts(llama, name):
    """Its place is taken by other numbers, which those behind it are made of."""
    name, last = name.replace("*", "1"), "output"
    right = llama.model(IDS)
    with nl.edit(llama, name, lambda x: np.where(np.isfinite(x), 0.5 * x, x)), nl.trace(llama, name) as seen:
        changed = llama.model(IDS)
    with nl.trace(llama, name, last) as plain:
        llama.model(IDS)
    finite = np.isfinite(plain[name])
    np.testing.assert_allclose(seen[name][finite], 0.5 * plain[name][finite], rtol=1e-4, atol=1e-5)
    assert np.abs(changed - right).max() > 1e-3


def test_a_head_can_be_silenced(llama):
    """Its gathered values set to 0, or its weights: the same, and the others are as they were."""

    def without(axis):
        def silence(x):
            np.moveaxis(x, axis, 0)[2] = 0
            return x

        return silence

    results = []
    for what, axis in (("heads", 2), ("weights", 1)):
        with (
            nl.edit(llama, f"layers.0.attention.{what}", without(axis)),
            nl.trace(llama, "layers.0.attention.heads") as t,
        ):
            results.append(llama.model(IDS))
        assert not t["layers.0.attention.heads"][:, :, 2].any() and t["layers.0.attention.heads"].any()
    np.testing.assert_allclose(*results, rtol=1e-3, atol=1e-4)


def test_wrong_names_and_shapes_are_refused(llama):
    for wrong, hint in [
        ("layers.*.atention.scores", r"is it layers\.\*\.attention\.scores\?"),
        ("layers.3", "this model of 3 layers"),
        ("layers.9.attention.wq", r"is it layers\.\*\.attention\.wq\?"),
        ("scores", r"is it layers\.\*\.attention\.scores\?"),
        ("", r"called ''; names are for example \"output\", \"layers\.0\" or"),
        ("q_proj", "names are for example"),
        (None, r"intermediate is None, it must be a text such as \"layers"),
        (["output"], r"is \['output'\], it must be a text such as"),
    ]:
        with pytest.raises(ParameterError, match=hint), nl.trace(llama, wrong):
            pass
    with (
        pytest.raises(
            ParameterError, match=r"layers\.0\.h is a sum .* the part that is added, layers\.0\.attention"
        ),
        nl.edit(llama, "layers.0.*", lambda x: x),
    ):
        pass
    for change, message in [
        (lambda x: x[0, 0], r"norm is \(2, 7, 64\), what should replace it \(64,\)"),
        (lambda x: None, r"norm: `change` has returned None, it must return an array of \(2, 7, 64\)"),
        (lambda x: x + 1j, r"norm: `change` has returned array.*, it must return"),
        (lambda x: "zero", "norm: `change` has returned 'zero'"),
    ]:
        with pytest.raises(MismatchError, match=message), nl.edit(llama, "norm", change):
            llama.model(IDS)
    with pytest.raises(ParameterError, match="change is None, it must be a function from an array"):
        nl.edit(llama, "norm", None).__enter__()


def test_a_trace_of_nothing_says_what_to_name(llama):
    message = r"no intermediate is named; name one or more, for example \"output\", \"layers\.0\" or \"layers"
    with pytest.raises(ParameterError, match=message), nl.trace(llama):
        pass
    for name in ("output", "layers.0", "layers.*.attention.weights"):  # the examples of the message
        assert name in EXAMPLES and names(llama.model, name)


# --- generators and tasks ---------------------------------------------------------------------------------


def traced(llama, found: list):
    """A generator that yields within its block."""
    with nl.trace(llama, "layers.0") as seen:
        while True:
            llama.model(IDS)
            found.append(len(seen.passes))
            yield seen


def test_a_suspended_generator_shares_its_hooks_until_its_block_ends(llama):
    """Python has no variable of a generator's own: the caller's model has the hooks, and then has none."""
    plain, expected = llama.model, llama.model(IDS)
    first, second = (traced(llama, []) for _ in range(2))
    seen, other = next(first), next(second)
    np.testing.assert_allclose(llama.model(IDS), expected, rtol=NEAR, atol=NEAR)
    assert (len(seen.passes), len(other.passes)) == (3, 2)  # also the pass of the caller
    first.close()  # not the last that began
    llama.model(IDS)
    assert (len(seen.passes), len(other.passes)) == (3, 3)
    del second  # as a loop ends that is left by break
    assert llama.model is plain and np.array_equal(llama.model(IDS), expected)


def test_a_generator_that_another_thread_ends_records_nothing_more(llama):
    """Its hooks stay in the thread where it began, and change no number."""
    expected = llama.model(IDS)

    def begin_and_end():
        generator = traced(llama, [])
        seen = next(generator)
        closer = threading.Thread(target=generator.close)
        closer.start()
        closer.join()
        np.testing.assert_allclose(llama.model(IDS), expected, rtol=NEAR, atol=NEAR)
        return len(seen.passes)

    assert contextvars.copy_context().run(begin_and_end) == 1
    assert np.array_equal(llama.model(IDS), expected)


def test_tasks_do_not_see_each_others_hooks(llama):
    """Two tasks take turns within their blocks; a third has no block, and a child has its parent's hooks."""
    plain, expected = llama.model, llama.model(IDS)

    async def task(name: str, turns: int) -> Trace:
        with nl.trace(llama, name) as seen:
            for _ in range(turns):
                llama.model(IDS)
                await asyncio.sleep(0)
                assert llama.model is not plain
        assert llama.model is plain
        return seen

    async def without() -> None:
        for _ in range(3):
            assert llama.model is plain and np.array_equal(llama.model(IDS), expected)
            await asyncio.sleep(0)

    async def child() -> None:
        llama.model(IDS)

    async def everything():
        one, two, _ = await asyncio.gather(task("layers.0", 3), task("output", 2), without())
        with nl.trace(llama, "norm") as seen:
            await asyncio.create_task(child())
        return one, two, seen

    one, two, seen = asyncio.run(everything())
    assert [*one] == ["layers.0"] and len(one.passes) == 3
    assert [*two] == ["output"] and len(two.passes) == 2
    assert [*seen] == ["norm"] and len(seen.passes) == 1
    assert llama.model is plain


def test_a_batch_can_be_edited(llama):
    prompts = [[1, 50, 60], [1, 70]]
    with nl.edit(llama, "layers.1.attention.heads", lambda x: 0 * x):
        together = [one.tokens for one in llama.generate_batch(prompts, max_tokens=4)]
        alone = [llama.generate(prompt, max_tokens=4).tokens for prompt in prompts]
    assert together == alone


# --- what the pictures show -------------------------------------------------------------------------------


def test_attention_weights_are_shares_of_what_was_seen(llama):
    ids = IDS[0].tolist()
    heads = np.stack([attention_weights(llama.model, ids, 1, head) for head in range(4)])
    np.testing.assert_allclose(heads.sum(-1), 1, rtol=1e-6)
    assert not np.triu(heads, 1).any()
    np.testing.assert_allclose(attention_weights(llama.model, ids, 1), heads.mean(0), rtol=1e-6)
    with pytest.raises(ParameterError, match=r"head is 1, it must be 0$"):  # not: from 0 to 0
        check_whole("head", 1, 0, 0)
    for layer, head, message in [
        (1, 4, "head is 4, it must be a whole number from 0 to 3"),
        (1, "2", "head is '2', it must be a whole number from 0 to 3"),
        (3, None, "layer is 3, it must be a whole number from 0 to 2"),
        ("*", None, r"layer is '\*', it must be"),
    ]:
        with pytest.raises(ParameterError, match=message):
            attention_weights(llama.model, ids, layer, head)


def test_the_lens_ends_in_what_the_model_says(llama):
    probs = lens(llama.model, IDS[0].tolist())
    assert probs.shape == (4, 300)
    np.testing.assert_allclose(probs[-1], F.softmax(llama.model(IDS[:1]))[0, -1], rtol=1e-4)
    assert np.abs(probs[0] - probs[-1]).max() > 1e-3


# --- the commands -----------------------------------------------------------------------------------------


def said(capsys, *arguments: object, code: int = 0) -> str:
    assert cli.main([str(a) for a in arguments]) == code
    out, err = capsys.readouterr()
    return err if code else out


def test_ops_lists_all_names(capsys):
    assert [line.split()[0] for line in said(capsys, "ops").splitlines()] == [*PLACES]


def test_trace_prints_and_keeps(path, tmp_path, capsys):
    out = tmp_path / "seen.npz"
    given = ("trace", "-m", path, "abc", "layers.*.attention.scores", "norm", "--out", out)
    lines = said(capsys, *given).splitlines()
    assert [line.split()[0] for line in lines[1:]] == [f"layers.{i}.attention.scores" for i in range(3)] + [
        "norm"
    ]
    printed, kept = json.loads(said(capsys, *given, "--json")), np.load(out)
    assert [*printed] == [*kept] and [*tmp_path.iterdir()] == [out]
    for name, row in printed.items():
        x = kept[name]
        assert tuple(row["shape"]) == x.shape
        np.testing.assert_allclose(row["most"], x.max())
        np.testing.assert_allclose(row["mean"], x[np.isfinite(x)].mean(), rtol=1e-5)
    assert "must end in .npz" in said(capsys, *given, "--out", "x.txt", code=2)
    assert "x.npz cannot be written" in said(capsys, *given, "--out", tmp_path / "no" / "x.npz", code=1)


@pytest.mark.parametrize(
    "text, most, message",
    [
        ("", 512, "the text has no tokens, wanted 1 or more: give a text that is not empty"),
        (
            "abc",
            1,
            "the text has 3 tokens, the context has room for 1: give a shorter text, or a larger --max",
        ),
        ("a" * 513, 512, "the text has 513 tokens, the context has room for 512: give a shorter text, or"),
    ],
)
@pytest.mark.parametrize("verb", [["trace", "norm"], ["lens"], ["attention"]], ids=lambda verb: verb[0])
def test_the_length_of_a_text_is_refused_with_a_way_out(verb, text, most, message, path, capsys):
    command, *names = verb
    assert message in said(capsys, command, "-m", path, text, *names, "--max-seq-len", most, code=2)


def test_a_text_is_too_long_for_a_record(path, capsys, monkeypatch):
    monkeypatch.setattr(cli.common, "MOST_TOKENS", 2)
    message = "the text has 3 tokens, at most 2 are recorded: give a shorter text"
    assert message in said(capsys, "trace", "-m", path, "abc", "norm", code=2)


def test_attention_is_a_triangle(path, capsys):
    title, *rows = said(capsys, "attention", "-m", path, "abcdef", "--layer", 2, "--head", 1).splitlines()
    assert title == "layer 2, head 1" and len(rows) >= 6
    for i, row in enumerate(rows):
        assert len(row.rstrip()) <= len(rows[0].rstrip()) + 2 * i + 20
    assert rows[0].rstrip().endswith("@@")  # the first can only look at itself
    assert "layer is 9, it must be a whole number from 0 to 2" in said(
        capsys, "attention", "-m", path, "abc", "--layer", 9, code=2
    )
    assert "must end in .svg, .png, .pdf" in said(
        capsys, "attention", "-m", path, "abc", "--out", "x.gif", code=2
    )
    assert "a terminal shows 60" in said(capsys, "attention", "-m", path, "ab" * 31, code=2)


@pytest.mark.parametrize("kind, begins", [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_attention_is_drawn(kind, begins, path, tmp_path, capsys):
    out = tmp_path / f"seen.{kind}"
    assert said(capsys, "attention", "-m", path, "abcdef", "--out", out) == ""
    assert out.read_bytes().startswith(begins) and [*tmp_path.iterdir()] == [out]


def spoilt(folder: Path, name: str, value: float = np.nan) -> Path:
    """A file with one weight whose numbers are all `value`."""

    def spoil(weights):
        weights[name][...] = value

    return write_tiny(folder / "spoilt.gguf", "F32", spoil)


def strict_json(text: str):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_trace_counts_what_is_not_finite(tmp_path, capsys):
    """NaN is printed as it is, as null in JSON; a masked score counts as infinite, and is no fault."""
    model = spoilt(tmp_path, "layers.1.attention.wq.weight")
    given = ("trace", "-m", model, "abc", "layers.*.attention.scores", "layers.0", "layers.1")
    title, *lines = (line.split() for line in said(capsys, *given).splitlines())
    assert title == ["shape", "mean", "sd", "least", "most", "nan", "inf"]
    rows = {line[0]: line[-6:] for line in lines}
    assert rows["layers.0.attention.scores"][-2:] == ["0", "12"]  # 4 heads, 3 later positions
    assert rows["layers.0"][-2:] == ["0", "0"] and "nan" not in rows["layers.0"]
    assert rows["layers.1.attention.scores"] == ["nan"] * 4 + ["36", "0"]
    assert rows["layers.1"] == ["nan"] * 4 + ["192", "0"]
    told = strict_json(said(capsys, *given, "--json"))
    none = dict.fromkeys(("mean", "sd", "least", "most"))
    assert told["layers.1"] == {"shape": [1, 3, 64], **none, "nan": 192, "inf": 0}
    assert told["layers.0"]["nan"] == 0 and told["layers.0"]["sd"] > 0


def test_statistics_are_those_of_the_finite_numbers():
    x = np.array([1, np.nan, 3, np.inf, -np.inf], np.float32)
    row = {"shape": (5,), "mean": 2.0, "sd": 1.0, "least": 1.0, "most": 3.0, "nan": 1, "inf": 2}
    assert cli.trace.summary(x) == row


@pytest.mark.parametrize("backend", ["c", "numpy"])
@pytest.mark.parametrize(
    "weight, value, verbs, place",
    [
        ("layers.1.attention.wq.weight", np.nan, ["attention"], "layers.1.attention.weights"),
        ("layers.1.attention.wq.weight", np.nan, ["lens", "lens --json"], "layers.1"),
        ("norm.weight", np.nan, ["lens", "lens --json"], "output"),
        ("output.weight", np.nan, ["lens", "lens --json"], "output"),
        ("output.weight", 3e38, ["lens"], "output"),
    ],
)
def test_a_picture_of_nan_is_one_line_on_stderr(
    weight, value, verbs, place, backend, tmp_path, recwarn, capsys
):
    model = spoilt(tmp_path, weight, value)
    for verb in verbs:
        name, *options = verb.split()
        err = said(capsys, name, "-m", model, "abc", "--backend", backend, *options, code=1)
        assert err == f"numpy-llama: {place} has numbers that are not finite: the weights may be damaged\n"
    assert not recwarn.list


def test_lens_has_a_line_for_each_layer(path, capsys):
    lines = said(capsys, "lens", "-m", path, "abc", "-k", 2).splitlines()
    assert [line[:9].strip() for line in lines] == ["embedding", "layer 0", "layer 1", "layer 2"]
    printed = json.loads(said(capsys, "lens", "-m", path, "abc", "-k", 2, "--json"))
    assert len(printed) == 4 and all(row[0]["probability"] >= row[1]["probability"] > 0 for row in printed)


def test_what_is_not_finite_is_no_picture(llama):
    """A damaged file: an error that names the place, in place of a picture of zeros or a traceback."""
    ids = [1, 40, 41, 42]
    with nl.edit(llama, "layers.0", lambda x: x * np.nan), np.errstate(invalid="ignore"):
        with pytest.raises(
            NumericsError, match=r"layers\.1\.attention\.weights has numbers that are not finite"
        ):
            attention_weights(llama.model, ids, 1)
        with pytest.raises(NumericsError, match=r"layers\.0 has numbers that are not finite"):
            lens(llama.model, ids)

"""Perplexity: the definition in plain loops, its command, and what is refused."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from helpers.command_line import assert_refused, run
from helpers.tiny_models import float_weights
from hypothesis import given
from hypothesis import strategies as st

import numpy_llama as nl
from numpy_llama.errors import ContextOverflowError, NumericsError, ParameterError
from numpy_llama.inspect.perplexity import LEAST_CTX, nll, perplexity, windows
from numpy_llama.proof.tiny import TINY
from numpy_llama.window import PREFILL_CHUNK

ARGS = replace(TINY, max_seq_len=2 * PREFILL_CHUNK + 20)
V = ARGS.vocab_size
# float32 in another order of sums: a log-probability moves by the rounding of its logits, at most about 5.
NLL_32 = 1e-4
NLL_8, NLL_15 = 5e-2, 2e-3  # with activations of 8 or 15 bits, the mean of a few
VALUE_32 = 1e-5  # relatively, of a mean of many

TEXT = (
    "The tower was built of grey stone, and from its roof one saw the river, the mill and the road to the "
    "sea. Every morning the miller's daughter counted the ships; in the evening she told her father how many "
    "had come back. Naïve travellers asked her why. 3 of them stayed. "
) * 2


@pytest.fixture(scope="module")
def model():
    return nl.Transformer(ARGS, float_weights(ARGS))


def loss(model, before, token):
    """-log softmax(logits after `before`)[token], in float64."""
    logits = [float(x) for x in model(np.array([before]))[0, -1]]
    highest = max(logits)
    return math.log(sum(math.exp(x - highest) for x in logits)) - (logits[token] - highest)


def by_definition(model, ids, ctx, bos_id):
    """llama.cpp's, in plain loops: -> (perplexity, standard error, tokens) after each window."""
    losses = []
    for start in range(0, len(ids) - ctx + 1, ctx):
        window = ids[start : start + ctx]
        if bos_id is not None:
            window[0] = bos_id
        losses += [loss(model, window[:i], window[i]) for i in range(ctx // 2 + 1, ctx)]
        n, mean = len(losses), sum(losses) / len(losses)
        variance = sum((x - mean) ** 2 for x in losses) / n
        yield math.exp(mean), math.exp(mean) * math.sqrt(variance / (n - 1)), n


@given(
    ctx=st.integers(LEAST_CTX, 20),
    length=st.integers(20, 70),
    bos_id=st.sampled_from([None, 1]),
    seed=st.integers(0, 99),
)
def test_it_is_the_definition(model, ctx, length, bos_id, seed):
    ids = np.random.default_rng(seed).integers(0, V, length).tolist()
    results = list(perplexity(model, ids, ctx, bos_id))
    expected = list(by_definition(model, list(ids), ctx, bos_id))
    assert [one.windows for one in results] == list(range(1, length // ctx + 1))
    assert [one.tokens for one in results] == [n for _, _, n in expected]
    for one, (value, error, _) in zip(results, expected, strict=True):
        assert one.perplexity == pytest.approx(value, rel=VALUE_32)
        assert one.nll == pytest.approx(math.log(value), rel=VALUE_32)
        assert one.standard_error == pytest.approx(error, rel=1e-3)


@given(length=st.integers(2, 2 * PREFILL_CHUNK + 20), seed=st.integers(0, 99), data=st.data())
def test_losses_however_the_text_is_cut_into_passes(model, length, seed, data):
    ids = np.random.default_rng(seed).integers(0, V, length).tolist()
    first = data.draw(st.integers(1, length - 1))
    scored = nll(model, ids, first)
    assert scored.shape == (length - first,) and scored.dtype == np.float64
    logits = model(np.array([ids]))[0, :-1].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = -logprobs[np.arange(length - 1), ids[1:]]
    np.testing.assert_allclose(scored, expected[first - 1 :], rtol=0, atol=NLL_32)


def test_a_used_cache_is_as_good_as_a_new_one(model):
    cache = model.new_cache(max_seq_len=40)
    nll(model, [3] * 40, 1, cache)
    np.testing.assert_array_equal(nll(model, [1, 2, 3, 4], 2, cache), nll(model, [1, 2, 3, 4], 2))


def test_it_stops_after_so_many_windows(model):
    ids = np.random.default_rng(0).integers(0, V, 100).tolist()
    assert list(perplexity(model, ids, 10, most=3)) == list(perplexity(model, ids, 10))[:3]
    assert list(perplexity(model, ids[:39], 10)) == list(perplexity(model, ids, 10))[:3]


def test_equal_logits_have_the_perplexity_of_the_vocabulary(model, monkeypatch):
    monkeypatch.setattr(model, "logits", lambda h: np.full((*h.shape[:-1], V), 3.0, np.float32))
    (result,) = perplexity(model, [7] * 30, 30)
    assert result.perplexity == pytest.approx(V) and result.standard_error == 0


def test_windows():
    assert windows(list(range(20)), 8) == [list(range(8)), list(range(8, 16))]
    assert windows(list(range(20)), 8, bos_id=99) == [[99, *range(1, 8)], [99, *range(9, 16)]]
    assert len(windows([0] * 16, 8)) == 2


def test_bad_arguments_are_refused(model):
    with pytest.raises(ParameterError, match="the text has 31 tokens, a window takes 32"):
        next(perplexity(model, [1] * 31, 32))
    with pytest.raises(ParameterError, match="ctx is 7, a window has at least 8 tokens"):
        next(perplexity(model, [1] * 31, 7))
    for first in (0, 4):
        with pytest.raises(ParameterError, match=rf"first is {first}, it must lie in 1\.\.3"):
            nll(model, [1, 2, 3, 4], first)
    with pytest.raises(ContextOverflowError):
        nll(model, [1] * 30, 1, model.new_cache(max_seq_len=20))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_stop_it(model, monkeypatch, bad):
    logits = model.logits

    def spoiled(h):
        out = logits(h)
        out[-1, 7] = bad
        return out

    monkeypatch.setattr(model, "logits", spoiled)
    with pytest.raises(NumericsError, match=f"the largest logit is {bad}, it must be a finite number"):
        nll(model, [1, 2, 3], 1)


def test_a_token_that_is_never_predicted_is_infinite(model, monkeypatch):
    logits = np.full((3, V), -800.0, np.float32)
    logits[:, 0] = 0
    monkeypatch.setattr(model, "logits", lambda h: logits[-len(h) :])
    (result,) = perplexity(model, [7] * 8, 8)
    assert (result.nll, result.perplexity) == (800, math.inf)


# ---------------------------------------------------------------- the command


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_the_command(text, smollm2_path):
    llama = nl.load(smollm2_path)
    ids = llama.tokenizer.encode(TEXT)
    *_, expected = perplexity(llama.model, ids, 48)
    assert expected.windows == len(ids) // 48 >= 2
    arguments = ["perplexity", "-m", str(smollm2_path), str(text), "--ctx", "48"]
    done = run(*arguments)
    found = re.fullmatch(
        r"perplexity ([\d.]+) \+/- ([\d.]+) \((\d+) windows of 48 tokens, (\d+) scored\)\n",
        done.stdout.decode(),
    )
    assert found and done.stderr == b""  # no bar without a terminal
    assert found[1] == f"{expected.perplexity:.4f}" and found[2] == f"{expected.standard_error:.4f}"
    assert (int(found[3]), int(found[4])) == (expected.windows, expected.tokens)
    result = json.loads(run(*arguments, "--json", "--windows", "1").stdout)
    first = next(perplexity(llama.model, ids, 48))
    assert result.pop("seconds") > 0 and result == {**vars(first), "ctx": 48}


@pytest.mark.slow
def test_the_numpy_path_says_the_same(text, smollm2_path):
    arguments = ["perplexity", "-m", str(smollm2_path), str(text), "--ctx", "32", "--windows", "2", "--json"]
    paths = ["--backend", "numpy"], ["--exact"], [], ["--activation-bits", "15"]
    numpy, exact, eight, fifteen = (json.loads(run(*arguments, *path).stdout)["nll"] for path in paths)
    assert exact == pytest.approx(numpy, abs=NLL_32)
    assert eight == pytest.approx(numpy, abs=NLL_8)
    assert fifteen == pytest.approx(numpy, abs=NLL_15)


@pytest.mark.parametrize(
    "data, arguments, code, words",
    [
        (b"too short", [], 2, ["text.txt has 2 tokens", "takes 512"]),
        (b"", [], 2, ["has 0 tokens"]),
        (b"ab\xff", [], 2, ["text.txt is not UTF-8", "0xff", "offset 2"]),
        (b"a\0b", [], 2, ["text.txt", "0x00", "offset 1"]),
        (b"a", ["--ctx", "9000"], 1, ["--ctx is 9000, the context has 8192 tokens: give less"]),
        (b"a", ["--max-seq-len", "99"], 1, ["--ctx is 512, the context has 99 tokens: give less"]),
        (b"a", ["--ctx", "7"], 2, ["--ctx", "8 or above"]),
        (b"a", ["--windows", "0"], 2, ["--windows", "1 or above"]),
    ],
)
def test_what_cannot_be_measured_is_refused(data, arguments, code, words, text, smollm2_path):
    text.write_bytes(data)
    assert_refused(run("perplexity", "-m", str(smollm2_path), str(text), *arguments), code, *words)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    missing = str(tmp_path / "none.txt")
    assert_refused(run("perplexity", missing), 2, f"{missing} cannot be read: No such file")
    assert_refused(run("perplexity", str(tmp_path)), 2, "cannot be read: Is a directory")
    assert_refused(run("perplexity"), 2, "FILE")

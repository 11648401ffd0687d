"""What is exchanged in a model is what runs: on every backend, in every way to run a model."""

import threading
from copy import deepcopy
from functools import partial

import numpy as np
import pytest

import numpy_llama as nl
from numpy_llama.backend import build
from numpy_llama.backend.formats import StoredTensor
from numpy_llama.backend.fused import FusedBlock
from numpy_llama.errors import MismatchError, NumericsError, ParameterError
from numpy_llama.generation.batch import generate_batch
from numpy_llama.generation.generate import Request, generate
from numpy_llama.generation.sampling import Sampler
from numpy_llama.generation.session import Session
from numpy_llama.inspect.perplexity import nll
from numpy_llama.model import Linear, RMSNorm
from numpy_llama.proof.tiny import TINY, TINY_BLOCKS, random_weights

BACKENDS = {
    "numpy": (TINY_BLOCKS, {"backend": "numpy"}),
    "c": (TINY_BLOCKS, {}),
    "c exact": (TINY_BLOCKS, {"exact": True}),
    "c, 1 thread": (TINY_BLOCKS, {"threads": 1}),
    "c, not fused": (TINY, {}),
}
LINEARS = ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
LINEARS += ("feed_forward.w_gate", "feed_forward.w_up", "feed_forward.w_down")
PARTS = (*LINEARS, "attention", "attention.attention", "feed_forward", "attention_norm", "ffn_norm")
CHILDREN = ["norm", "output", "layers.1", *(f"layers.1.{name}" for name in PARTS)]
IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="module", params=BACKENDS)
def model(request):
    args, options = BACKENDS[request.param]
    weights = random_weights(np.random.default_rng(7), args)
    stored = {name: StoredTensor.quantize(w, "F32") for name, w in weights.items()}
    model = build(args, stored, **options)
    fused = [type(layer) is FusedBlock for layer in model.layers]
    assert fused == [args is TINY_BLOCKS and request.param != "numpy"] * args.n_layers
    return model


def child(model, name):
    part = model
    for step in name.split("."):
        part = part[int(step)] if isinstance(part, list) else getattr(part, step)
    return part


def doubled(part):
    """The same part with twice its result."""
    return lambda *arguments: 2 * part(*arguments)


def negated(part):
    """The same part with its result's sign changed: no norm behind it undoes that."""
    return lambda *arguments: -part(*arguments)


@pytest.mark.parametrize("name", CHILDREN)
def test_an_exchanged_child_runs(model, name):
    """Its result arrives in the logits; the old model and all other blocks stay as they are."""
    before, part = model(IDS), child(model, name)
    other = model.with_parts({name: negated(part)})
    moved = np.abs(other(IDS) - before).max() / np.abs(before).max()
    print(f"{name:32} moves the logits by {moved:.3f} of the largest")
    assert moved > 1e-2
    np.testing.assert_array_equal(model(IDS), before)
    assert child(model, name) is part and other.layers[0] is model.layers[0]


@pytest.mark.parametrize("name", CHILDREN)
def test_an_assigned_child_runs(model, name):
    """Plain assignment does on every backend what it does in NumPy."""
    before, (place, _, last) = model(IDS), name.rpartition(".")
    whole, part = child(model, place) if place else model, child(model, name)
    put = partial(whole.__setitem__, int(last)) if isinstance(whole, list) else partial(setattr, whole, last)
    wanted = model.with_parts({name: doubled(part)})(IDS)
    put(doubled(part))
    try:
        np.testing.assert_array_equal(model(IDS), wanted)
    finally:
        put(part)
    np.testing.assert_array_equal(model(IDS), before)


@pytest.mark.parametrize("name", [*LINEARS, "attention_norm", "ffn_norm"])
def test_an_assigned_weight_is_used(model, name):
    """What a part holds counts as the part."""
    before, part = model(IDS), child(model, f"layers.1.{name}")
    weight = part.weight
    part.weight = 2 * weight[:]
    try:
        assert np.abs(model(IDS) - before).max() > 1e-2 * np.abs(before).max()
    finally:
        part.weight = weight
    np.testing.assert_array_equal(model(IDS), before)


@pytest.mark.parametrize("name", CHILDREN)
def test_every_way_to_run_a_model_runs_the_part(model, name):
    """Decoding, batches and perplexity."""
    other = model.with_parts({name: negated(child(model, name))})
    scored = [nll(one, IDS[0].tolist(), 2) for one in (model, other)]
    assert np.abs(scored[1] - scored[0]).max() > 1e-3
    prompts = [[3, 1, 4], [1, 5], [9, 2, 6, 5]]

    def ids(one):
        return [[*generate(one, prompt, Session(one), Sampler(), max_tokens=8)] for prompt in prompts]

    together = [[] for _ in prompts]
    requests = [Request(p, Session(other), Sampler(), max_tokens=8) for p in prompts]
    for i, token in generate_batch(other, requests):
        together[i].append(token)
    assert ids(other) == together != ids(model)


def test_one_part_for_every_layer(model):
    ran = []

    def part(x):
        ran.append(x.shape)
        return np.zeros_like(x)

    other = model.with_parts({"layers.*.feed_forward": part})
    assert other(IDS).shape == (1, 8, model.args.vocab_size) and len(ran) == model.args.n_layers


def test_parts_that_compute_the_same_give_the_same_logits(model):
    """An exchanged block runs its parts; they agree with the fused call within its rounding."""
    parts = {
        f"layers.{i}.ffn_norm": RMSNorm(layer.ffn_norm.weight, 1e-5) for i, layer in enumerate(model.layers)
    }
    expected = model(IDS)
    assert np.abs(model.with_parts(parts)(IDS) - expected).max() < 2e-3 * np.abs(expected).max()
    own = {f"layers.{i}.attention.wq": layer.attention.wq for i, layer in enumerate(model.layers)}
    np.testing.assert_array_equal(model.with_parts(own)(IDS), expected)


def decoded(model, ids):
    """Logits of the last of `ids`, each computed alone after the ones before it."""
    cache = model.new_cache(1, len(ids))
    return [model(np.array([[i]]), at, cache)[0, -1] for at, i in enumerate(ids)][-1]


ORDERS = [(1, 0), (0, 0), (1,), (0, 1, 0, 1)]


@pytest.mark.parametrize("order", ORDERS)
def test_each_layer_has_its_own_row_of_the_cache(model, order):
    """Layers in another order, twice, or left out: decoding gives the logits of one pass."""
    other = model.with_parts({"layers": [model.layers[i] for i in order]})
    assert other.args.n_layers == len(order) and model.args.n_layers == 2
    expected = other(IDS)[0, -1]
    assert np.abs(decoded(other, IDS[0]) - expected).max() < 4e-3 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["layers.1", "layers.1.attention"])
def test_a_part_of_another_layer_has_its_own_row_of_the_cache(model, name):
    other = model.with_parts({name: child(model, name.replace("1", "0"))})
    expected = other(IDS)[0, -1]
    assert np.abs(decoded(other, IDS[0]) - expected).max() < 4e-3 * np.abs(expected).max()
    assert [layer.attention.layer for layer in (*model.layers, *other.layers)] == [0, 1, 0, 1]


NO_PARTS = {
    "": r"no part '' in the model; there are args, cache_type, tok_embeddings, layers, norm, ",
    "layer.0": r"no part 'layer' in the model; is it \"layers\"\?",
    "layers.2": r"no part '2' in 'layers'; there are 0, 1$",
    "layers.-1": r"no part '-1' in 'layers'; is it \"layers.1\"",
    "layers.x": r"no part 'x' in 'layers'",
    "layers.0.attention.wx": r"no part 'wx' in 'layers.0.attention'; is it \"layers.0.attention.w.\"",
    "layers.*.attention.wx": r"no part 'wx' in 'layers.\*.attention'",
    "output.x": r"no part 'x' in 'output'",
    "norm.*": r"no part '\*' in 'norm'",
    "args.dim.x": r"no part 'x' in 'args.dim'; it has no parts$",
}


@pytest.mark.parametrize("name", NO_PARTS)
def test_a_name_that_is_none_is_refused(model, name):
    with pytest.raises(ParameterError, match=NO_PARTS[name]):
        model.with_parts({name: lambda x: x})


@pytest.mark.parametrize("parts", [None, [], "output", 3, [("output", np.copy)], {1: np.copy}, {None: 1}])
def test_parts_are_a_dict_by_name(model, parts):
    with pytest.raises(ParameterError, match=r"must be a (dict|text) such as"):
        model.with_parts(parts)


@pytest.mark.parametrize(
    "name, part", [("layers.0.attention.wq", None), ("output", "x"), ("norm", np.ones(3))]
)
def test_a_part_must_be_callable(model, name, part):
    with pytest.raises(ParameterError, match=f"^{name} is .*, it must be a part that can be called"):
        model.with_parts({name: part})


@pytest.mark.parametrize("layers", [None, 3, np.copy])
def test_the_layers_are_a_list(model, layers):
    with pytest.raises(ParameterError, match=r"layers is .*, it must be a list of parts"):
        model.with_parts({"layers": layers})


def test_a_session_reuses_only_keys_of_its_model(model):
    """Another model computes the whole prompt: the keys of the first one are not its own."""
    other = model.with_parts({"layers.0.feed_forward": negated(model.layers[0].feed_forward)})
    prompt = IDS[0].tolist()

    def ids(model, session):
        return [*generate(model, prompt, session, Sampler(), max_tokens=6)]

    session = Session(model)
    first = ids(model, session)
    twice = deepcopy(session)
    expected = ids(other, Session(other))
    assert ids(other, session) == ids(other, twice) == expected != first
    assert ids(model, session) == first
    computed = []
    [*generate(model, prompt, session, Sampler(), max_tokens=1, on_prefill=lambda at, _: computed.append(at))]
    assert computed == [7, 8]  # the prefix of the same model is kept


def test_a_session_of_another_size_is_refused(model):
    shorter = model.with_parts({"layers": model.layers[:1]})
    with pytest.raises(
        ParameterError, match=r"the session has .* = \(2, .*, the model has \(1, .*new_session"
    ):
        next(generate(shorter, [1, 2], Session(model), Sampler()))


def test_a_part_of_another_shape_is_an_error(model):
    wide = Linear(np.ones((7, model.args.dim), np.float32), child(model, "layers.0.attention.wq").linear)
    with pytest.raises((MismatchError, ValueError)):
        model.with_parts({"layers.0.attention.wq": wide})(IDS)


def test_the_first_layer_that_is_not_finite_is_found_behind_a_part(model):
    other = model.with_parts({"layers.1.feed_forward": lambda x: np.full_like(x, np.inf)})
    with pytest.raises(NumericsError, match="layer 1, the first to go wrong"):
        next(generate(other, [1, 2, 3], Session(other), Sampler()))


def test_a_trace_is_in_its_own_thread_only(smollm2_path):
    """While one thread traces every layer, another runs the blocks of the model itself, to the bit."""
    llama = nl.load(smollm2_path)
    expected, logits = llama.generate("Once upon a time", max_tokens=12).tokens, llama.model(IDS)
    blocks, found, traced = list(llama.model.layers), [], threading.Event()

    def other():
        traced.wait()
        found.append(llama.generate("Once upon a time", max_tokens=12).tokens)
        found.append([*map(id, llama.model.layers)])
        found.append(llama.model(IDS))

    thread = threading.Thread(target=other)
    thread.start()
    with nl.trace(llama, "layers.*.attention.weights", "layers.*") as seen:
        llama.model(IDS)
        traced.set()
        while thread.is_alive():
            llama.model(IDS)
        assert not {*map(id, llama.model.layers)} & {*map(id, blocks)}
    thread.join()
    assert len(seen) == 2 * llama.model.args.n_layers
    assert found[0] == expected and found[1] == [*map(id, blocks)]
    np.testing.assert_array_equal(found[2], logits)
    assert [*map(id, llama.model.layers)] == [*map(id, blocks)]


def test_a_block_that_records_nothing_is_refused(model):
    """The model as it was given has no hooks; `seen.model` has."""
    with pytest.raises(ParameterError, match=r"seen\.model"), nl.trace(model, "layers.0"):
        model(IDS)
    with nl.trace(model, "layers.0") as seen:
        seen.model(IDS)
    assert seen["layers.0"].shape == (1, 8, model.args.dim)
    with nl.edit(model, "layers.0", np.zeros_like) as edited:
        assert np.abs(edited(IDS) - model(IDS)).max() > 0


@pytest.mark.parametrize("place", ["scores", "weights"])
def test_an_exchanged_attention_has_no_scores(model, place):
    """What would be recorded was not computed, and an edit of it would replace the part."""
    other = model.with_parts({"layers.1.attention.attention": lambda q, k, v: np.zeros_like(q)})
    name = f"layers.1.attention.{place}"
    with pytest.raises(ParameterError, match="was exchanged"), nl.trace(other, name) as seen:
        seen.model(IDS)
    with pytest.raises(ParameterError, match="was exchanged"), nl.edit(other, name, np.copy) as edited:
        edited(IDS)
    with nl.trace(model, name) as seen:
        seen.model(IDS)
    assert seen[name].shape == (1, model.args.n_heads, 8, 8)


def test_blocks_may_end_in_any_order(smollm2_path):
    """Each ends its own hooks; the others go on, and after the last one the model is the model."""
    llama = nl.load(smollm2_path)
    model, blocks = llama.model, [nl.trace(llama, "layers.0"), nl.trace(llama, "layers.1")]
    first, second = (block.__enter__() for block in blocks)
    llama.model(IDS)
    blocks[0].__exit__(None, None, None)
    llama.model(IDS[:, :5])
    assert first["layers.0"].shape[1] == 8 and second["layers.1"].shape[1] == 5
    blocks[1].__exit__(None, None, None)
    assert llama.model is model

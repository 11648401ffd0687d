"""The whole model on tiny random configurations: against PyTorch, against itself in pieces; its budget."""

import ast
from dataclasses import MISSING, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_llama
from hypothesis import given
from hypothesis import strategies as st
from tolerances import CHUNKS_32, CHUNKS_64, MODEL_32, MODEL_64, assert_near
from transformers import LlamaConfig, LlamaForCausalLM

import numpy_llama
from numpy_llama.cache import KVCache
from numpy_llama.config import ModelArgs, RopeScaling
from numpy_llama.errors import ConfigError, ContextOverflowError, ParameterError
from numpy_llama.model import Transformer

CONTEXT = 24

TINY = ModelArgs(
    dim=24,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=6,
    hidden_dim=40,
    vocab_size=53,
    norm_eps=1e-5,
    rope_theta=1e4,
    max_seq_len=CONTEXT,
)

# The scaled RoPE has an original context of 16, so that slow, fast and ramped turns all occur in CONTEXT.
GENERATIONS = {
    "llama1": replace(TINY, n_kv_heads=4, norm_eps=1e-6),
    "llama2": replace(TINY, n_kv_heads=4),
    "llama2-70b": TINY,
    "llama3": replace(TINY, rope_theta=5e5, vocab_size=97),
    "llama3.1": replace(TINY, rope_theta=5e5, rope_scaling=RopeScaling(8.0, original_max_seq_len=16)),
    "llama3.2": replace(TINY, rope_theta=5e5, rope_scaling=RopeScaling(32.0, original_max_seq_len=16)),
    "mqa": replace(TINY, n_kv_heads=1, head_dim=10, n_layers=1),
}


@st.composite
def configurations(draw):
    """Small, and with no two sizes equal by rule: head_dim * n_heads need not be dim.

    Below 16 dimensions the residual stream now and then cancels, and RMSNorm magnifies its rounding.
    """
    generation = draw(st.sampled_from(sorted(GENERATIONS)))
    n_kv_heads = draw(st.integers(1, 3))
    return replace(
        GENERATIONS[generation],
        dim=draw(st.integers(16, 64)),
        n_layers=draw(st.integers(1, 3)),
        n_heads=n_kv_heads * draw(st.integers(1, 3)),
        n_kv_heads=n_kv_heads,
        head_dim=2 * draw(st.integers(1, 32)),
        hidden_dim=draw(st.integers(3, 64)),
        vocab_size=draw(st.integers(5, 101)),
    )


seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)


def random_weights(rng, args, dtype=np.float64, tied=False):
    """Matrices that about keep a vector's length; norm weights away from 1, so that each of them counts."""

    def matrix(OUT, IN):
        return rng.normal(size=(OUT, IN), scale=IN**-0.5)

    def norm():
        return rng.uniform(0.5, 1.5, args.dim)

    w = {"tok_embeddings.weight": rng.normal(size=(args.vocab_size, args.dim)), "norm.weight": norm()}
    w["output.weight"] = w["tok_embeddings.weight"] if tied else matrix(args.vocab_size, args.dim)
    for i in range(args.n_layers):
        w |= {
            f"layers.{i}.attention.wq.weight": matrix(args.n_heads * args.head_dim, args.dim),
            f"layers.{i}.attention.wk.weight": matrix(args.n_kv_heads * args.head_dim, args.dim),
            f"layers.{i}.attention.wv.weight": matrix(args.n_kv_heads * args.head_dim, args.dim),
            f"layers.{i}.attention.wo.weight": matrix(args.dim, args.n_heads * args.head_dim),
            f"layers.{i}.feed_forward.w_gate.weight": matrix(args.hidden_dim, args.dim),
            f"layers.{i}.feed_forward.w_up.weight": matrix(args.hidden_dim, args.dim),
            f"layers.{i}.feed_forward.w_down.weight": matrix(args.dim, args.hidden_dim),
            f"layers.{i}.attention_norm.weight": norm(),
            f"layers.{i}.ffn_norm.weight": norm(),
        }
    return {name: x.astype(dtype) for name, x in w.items()}


def random_tokens(rng, args, B=2, T=None):
    return rng.integers(args.vocab_size, size=(B, T or rng.integers(1, CONTEXT + 1)))


def torch_model(args, weights):
    dtype = torch.from_numpy(weights["norm.weight"]).dtype
    model = torch_llama.Transformer(args, dtype)
    model.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()})
    return model


# --- against PyTorch and transformers ---------------------------------------------------------------------


@given(configurations(), seeds, st.booleans())
def test_logits_as_torch(args, rng, tied):
    weights, tokens = random_weights(rng, args, tied=tied), random_tokens(rng, args)
    for dtype, tolerance in [(np.float64, MODEL_64), (np.float32, MODEL_32)]:
        w = {name: x.astype(dtype) for name, x in weights.items()}
        logits = Transformer(args, w)(tokens)
        assert logits.dtype == dtype
        assert logits.shape == (*tokens.shape, args.vocab_size)
        assert_near(logits, torch_model(args, w)(torch.from_numpy(tokens)), tolerance)


def half_split(weight, n_heads):
    """Meta keeps the two parts of a rotated pair side by side, Hugging Face half a head apart."""
    OUT, IN = weight.shape
    return weight.reshape(n_heads, OUT // n_heads // 2, 2, IN).swapaxes(1, 2).reshape(OUT, IN)


def transformers_model(args, weights, tied):
    rope = {"rope_type": "default", "rope_theta": args.rope_theta}
    if s := args.rope_scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_seq_len,
        }
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        rms_norm_eps=args.norm_eps,
        max_position_embeddings=args.max_seq_len,
        rope_parameters=rope,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    names = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w_gate": "mlp.gate_proj",
        "feed_forward.w_up": "mlp.up_proj",
        "feed_forward.w_down": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    state = {
        "model.embed_tokens.weight": weights["tok_embeddings.weight"],
        "model.norm.weight": weights["norm.weight"],
        "lm_head.weight": weights["output.weight"],
    }
    for i in range(args.n_layers):
        for ours, theirs in names.items():
            state[f"model.layers.{i}.{theirs}.weight"] = weights[f"layers.{i}.{ours}.weight"]
        for q_or_k, n_heads in [("q_proj", args.n_heads), ("k_proj", args.n_kv_heads)]:
            name = f"model.layers.{i}.self_attn.{q_or_k}.weight"
            state[name] = half_split(state[name], n_heads)
    model = LlamaForCausalLM(config)
    model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in state.items()})
    return model.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_logits_as_transformers(generation, tied, rng):
    args = GENERATIONS[generation]
    weights = random_weights(rng, args, np.float32, tied)
    tokens = random_tokens(rng, args, T=CONTEXT)
    with torch.no_grad():
        expected = transformers_model(args, weights, tied)(torch.from_numpy(tokens)).logits
    assert_near(Transformer(args, weights)(tokens), expected, MODEL_32)


@pytest.mark.parametrize("generation", ["llama3", "llama3.1", "llama3.2"])
def test_the_generations_differ(generation, rng):
    """The comparisons above mean something: theta, scaling and its factor all show within CONTEXT."""
    weights = random_weights(rng, TINY)
    args = replace(GENERATIONS[generation], vocab_size=TINY.vocab_size)
    others = [replace(a, vocab_size=TINY.vocab_size) for a in GENERATIONS.values() if a.n_kv_heads == 2]
    tokens = random_tokens(rng, TINY, T=CONTEXT)
    logits = Transformer(args, weights)(tokens)
    for other in others:
        if other != args:
            assert np.abs(Transformer(other, weights)(tokens) - logits).max() > 1e-3


# --- against itself, in pieces ----------------------------------------------------------------------------


def run_in_chunks(model, tokens, chunks):
    cache, start_pos, logits = model.new_cache(len(tokens)), 0, []
    for T in chunks:
        logits.append(model(tokens[:, start_pos : start_pos + T], start_pos, cache))
        start_pos += T
    return np.concatenate(logits, axis=1)


@given(configurations(), seeds, st.data())
def test_chunks_of_any_size_are_the_whole(args, rng, data):
    weights, tokens = random_weights(rng, args), random_tokens(rng, args, T=CONTEXT)
    cuts = sorted(data.draw(st.sets(st.integers(1, CONTEXT - 1))))
    chunks = np.diff([0, *cuts, CONTEXT])
    for dtype, tolerance in [(np.float64, CHUNKS_64), (np.float32, CHUNKS_32)]:
        model = Transformer(args, {name: x.astype(dtype) for name, x in weights.items()})
        whole = model(tokens)
        assert_near(run_in_chunks(model, tokens, chunks), whole, tolerance)
        assert_near(run_in_chunks(model, tokens, [1] * CONTEXT), whole, tolerance)


@given(configurations(), seeds, st.integers(1, CONTEXT - 1))
def test_the_future_does_not_matter(args, rng, split):
    model, tokens = Transformer(args, random_weights(rng, args)), random_tokens(rng, args, T=CONTEXT)
    other = tokens.copy()
    other[:, split:] = (tokens[:, split:] + 1) % args.vocab_size
    before, after = model(tokens), model(other)
    np.testing.assert_array_equal(before[:, :split], after[:, :split])
    assert (before[:, split] != after[:, split]).any()


@given(configurations(), seeds)
def test_rows_of_a_batch_are_independent(args, rng):
    model, tokens = Transformer(args, random_weights(rng, args)), random_tokens(rng, args, B=3)
    whole = model(tokens)
    for b in range(3):
        assert_near(model(tokens[[b]]), whole[[b]], CHUNKS_64)


# --- the cache --------------------------------------------------------------------------------------------


def tiny_model(rng, dtype=np.float64):
    return Transformer(TINY, random_weights(rng, TINY, dtype))


def test_slots_not_yet_written_are_never_read(rng):
    model, tokens = tiny_model(rng), random_tokens(rng, TINY, T=CONTEXT)
    cache = model.new_cache(2)
    cache.k[:], cache.v[:] = np.nan, np.nan
    for start_pos, end in [(0, 5), (5, 6), (6, CONTEXT)]:
        assert np.isfinite(model(tokens[:, start_pos:end], start_pos, cache)).all()


def test_rewind_and_replay(rng):
    """A cache is rewound by starting earlier: what lies behind start_pos is forgotten."""
    model, tokens = tiny_model(rng), random_tokens(rng, TINY, T=CONTEXT)
    cache = model.new_cache(2)
    model((tokens + 1) % TINY.vocab_size, 0, cache)
    first = model(tokens[:, :7], 0, cache)
    second = model(tokens[:, 7:], 7, cache)
    assert_near(np.concatenate([first, second], axis=1), model(tokens), CHUNKS_64)


def test_two_caches_are_two_conversations(rng):
    model = tiny_model(rng)
    a, b = random_tokens(rng, TINY, T=8), random_tokens(rng, TINY, T=8)
    cache_a, cache_b = model.new_cache(2), model.new_cache(2)
    for i in range(8):
        logits_a = model(a[:, [i]], i, cache_a)
        logits_b = model(b[:, [i]], i, cache_b)
    assert_near(logits_a[:, 0], model(a)[:, -1], CHUNKS_64)
    assert_near(logits_b[:, 0], model(b)[:, -1], CHUNKS_64)


@pytest.mark.parametrize("room", [6, CONTEXT])  # a cache below the context, and one as long as it
@pytest.mark.parametrize("beyond", [1, 2, 3, 50])
@pytest.mark.parametrize("before", [0, 1, 2, 5])
def test_overflow_raises_before_writing(rng, room, beyond, before):
    model = tiny_model(rng)
    cache = model.new_cache(1, room)
    model(random_tokens(rng, TINY, 1, room), 0, cache)
    k, v = cache.k.copy(), cache.v.copy()
    with pytest.raises(ContextOverflowError, match="do not fit"):
        model(random_tokens(rng, TINY, 1, before + beyond), room - before, cache)
    np.testing.assert_array_equal(cache.k, k)
    np.testing.assert_array_equal(cache.v, v)


@pytest.mark.parametrize("T", [1, 2, 3])
@pytest.mark.parametrize("start_pos", [-1, -2, -3, -CONTEXT, CONTEXT + 1, 10**6])
def test_impossible_positions_are_refused(rng, start_pos, T):
    model = tiny_model(rng)
    with pytest.raises(ContextOverflowError):
        model(random_tokens(rng, TINY, 1, T), start_pos, model.new_cache())


def test_a_prompt_beyond_the_context_is_refused(rng):
    with pytest.raises(ContextOverflowError, match=rf"0\.\.{CONTEXT} do not fit a context of {CONTEXT}"):
        tiny_model(rng)(random_tokens(rng, TINY, 1, CONTEXT + 1))


@pytest.mark.parametrize("max_seq_len", [-1, CONTEXT + 1])
def test_a_cache_beyond_the_context_is_refused(rng, max_seq_len):
    with pytest.raises(ParameterError, match=rf"{max_seq_len}.*1\.\.{CONTEXT}"):
        tiny_model(rng).new_cache(1, max_seq_len)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_cache_holds_what_was_stored(rng, dtype):
    cache = KVCache(TINY, 2, 7, dtype)
    xk, xv = rng.normal(size=(2, 2, 5, TINY.n_kv_heads, TINY.head_dim)).astype(dtype)
    cache.update(1, 0, xk[:, :3], xv[:, :3])
    keys, values = cache.update(1, 3, xk[:, 3:], xv[:, 3:])
    np.testing.assert_array_equal(keys, xk)
    np.testing.assert_array_equal(values, xv)
    assert keys.dtype == dtype


@pytest.mark.parametrize("bad", [-1, TINY.vocab_size])
def test_ids_outside_the_vocabulary_are_refused(rng, bad):
    with pytest.raises(ParameterError):
        tiny_model(rng)(np.array([[0, bad]]))


def test_linear_and_attention_are_handed_in(rng):
    """The seam: the model computes with what it is given, and with nothing else of its own."""
    weights, tokens, calls = random_weights(rng, TINY), random_tokens(rng, TINY, T=4), []

    def linear(x, w):
        calls.append("linear")
        return numpy_llama.functional.linear(x, w)

    def attention(q, k, v):
        calls.append("attention")
        return numpy_llama.functional.attention(q, k, v)

    logits = Transformer(TINY, weights, linear, attention)(tokens)
    np.testing.assert_array_equal(logits, Transformer(TINY, weights)(tokens))
    layer = ["linear"] * 3 + ["attention"] + ["linear"] * 4
    assert calls == layer * TINY.n_layers + ["linear"]


# --- hyperparameters --------------------------------------------------------------------------------------

WHOLE = ["dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "max_seq_len"]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("bad", [0, -1, 2.0, "4", None])
def test_sizes_must_be_whole_numbers_above_0(name, bad):
    with pytest.raises(ConfigError, match=name):
        replace(TINY, **{name: bad})


@pytest.mark.parametrize("name", ["norm_eps", "rope_theta"])
@pytest.mark.parametrize("bad", [0.0, -1e-5, np.nan, np.inf])
def test_eps_and_theta_must_be_finite_and_above_0(name, bad):
    with pytest.raises(ConfigError, match=name):
        replace(TINY, **{name: bad})


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"n_heads": 4, "n_kv_heads": 3}, "n_heads is 4.*multiple of n_kv_heads 3"),
        ({"n_heads": 2, "n_kv_heads": 4}, "n_heads is 2.*multiple of n_kv_heads 4"),
        ({"head_dim": 5}, "head_dim is 5.*even"),
    ],
)
def test_sizes_must_fit_each_other(bad, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **bad)


def test_what_the_generations_differ_in_has_no_default():
    assert [f.name for f in fields(ModelArgs) if f.default is not MISSING] == ["rope_scaling"]


@pytest.mark.parametrize(
    "bad",
    [
        {"factor": 0.0},
        {"factor": -8.0},
        {"factor": np.nan},
        {"low_freq_factor": np.inf},
        {"original_max_seq_len": 0},
        {"original_max_seq_len": 8192.0},
        {"low_freq_factor": 4.0},
        {"low_freq_factor": 5.0},
    ],
)
def test_rope_scaling_is_validated(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        RopeScaling(**({"factor": 8.0} | bad))


# --- the budget -------------------------------------------------------------------------------------------

PACKAGE = Path(numpy_llama.__file__).parent

# Imports run downwards: a module knows those further down this list, and its neighbours on one line.
LEVELS = [
    {"__init__", "__main__"},
    {"cli"},
    {"verify", "bench", "perplexity", "trace", "llama", "convert", "download", "doctor"},
    {"memory"},
    {"generate", "batch"},
    {"checkpoint", "tokenizer", "chat", "sandbox", "sampling"},
    {"words", "merging"},
    {"kernels", "layer"},
    {"quantize"},
    {"model"},
    {"cache"},
    {"interruptible"},
    {"functional"},
    {"config", "presets"},
    {"errors"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def lines(name):
    return len((PACKAGE / f"{name}.py").read_text().splitlines())


def imports(path):
    """All modules that a file imports, wherever the statement stands; ours as 'numpy_llama.name'."""
    package = ["numpy_llama", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            if base == ["numpy_llama"]:  # from . import functional
                yield from (f"numpy_llama.{alias.name}" for alias in node.names)
            else:
                yield ".".join(base)


def own_imports(path):
    """(the part of the package that the file belongs to, the parts that it imports)."""
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    names = [name.split(".")[1] for name in imports(path) if name.startswith("numpy_llama.")]
    return part, {name for name in names if name != part}


FILES = sorted(PACKAGE.rglob("*.py"))


def test_lines():
    assert lines("model") < 200
    assert sum(map(lines, ["config", "functional", "cache", "model"])) <= 450


def test_what_the_core_imports():
    ours = {f"numpy_llama.{name}" for name in ("functional", "cache", "config")}
    assert set(imports(PACKAGE / "model.py")) <= ours | {"numpy", "typing", "collections.abc"}
    ours = {f"numpy_llama.{name}" for name in ("config", "errors")}
    assert set(imports(PACKAGE / "functional.py")) <= ours | {"numpy", "math"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_run_downwards(path):
    part, imported = own_imports(path)
    assert part in LEVEL, f"{part} has no level yet: say in LEVELS what may import it"
    for name in imported & LEVEL.keys():  # a name without a level is a value of the package itself
        assert LEVEL[part] <= LEVEL[name], f"{path.name} imports {name}, which lies above it"


def test_imports_have_no_circles():
    graph = {part: set() for part in LEVEL}
    for path in FILES:
        part, imported = own_imports(path)
        graph[part] |= imported & LEVEL.keys()
    while leaves := {part for part, imported in graph.items() if not imported}:
        graph = {part: imported - leaves for part, imported in graph.items() if part not in leaves}
    assert not graph


def test_who_may_know_the_kernels():
    allowed = {"checkpoint", "verify", "doctor", "bench"}
    for path in FILES:
        if "kernels" in own_imports(path)[1]:
            assert allowed & {path.stem, path.parent.name}, f"{path} imports the kernels"

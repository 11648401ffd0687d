"""Record or replace any intermediate of the forward pass by its name.

    with trace(llama, "layers.*.attention.weights") as seen:
        llama.generate("The Eiffel Tower is in", max_tokens=1)
    seen["layers.3.attention.weights"]  # (B, H, T, S)

    with edit(llama, "layers.3.attention.heads", without_head_2):
        llama.generate("The Eiffel Tower is in")

model.py has no code for this. `Transformer.with_parts` makes a model with hooks around the named parts.
Within the `with` block, and only in its thread or asyncio task, `llama.model` is that model. Other threads
and tasks run the model without hooks. Neighbouring blocks without a hook stay one C call.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np

from .. import functional as F
from ..config import Array
from ..errors import (
    MismatchError,
    NumericsError,
    ParameterError,
    check_callable,
    check_kind,
    check_whole,
    escape,
)
from ..llama import STAND_INS, Llama
from ..model import Attention, FeedForward, Function, Linear, RMSNorm, Transformer, TransformerBlock

# Every name in the order of the forward pass, with its shape and its meaning.
PLACES = {
    "tok_embeddings": ("B T D", "the tokens' rows of the embedding, where the residual stream begins"),
    "layers.*.attention_norm": ("B T D", "the normalized stream, the input of attention"),
    "layers.*.attention.wq": ("B T H*Dh", "queries, not yet turned by RoPE"),
    "layers.*.attention.wk": ("B T K*Dh", "keys of the new positions, not yet turned"),
    "layers.*.attention.wv": ("B T K*Dh", "values of the new positions"),
    "layers.*.attention.q": ("B T H Dh", "queries, turned"),
    "layers.*.attention.k": ("B S K Dh", "keys of all positions, turned, as the cache has them"),
    "layers.*.attention.v": ("B S K Dh", "values of all positions, as the cache has them"),
    "layers.*.attention.scores": ("B H T S", "q k^T / sqrt(Dh), -inf for positions that are not seen"),
    "layers.*.attention.weights": ("B H T S", "softmax of the scores, the share of each position"),
    "layers.*.attention.heads": ("B T H Dh", "the result of each head: weights times values"),
    "layers.*.attention": ("B T D", "attention's update of the stream"),
    "layers.*.h": ("B T D", "the stream between the two steps of a layer"),
    "layers.*.ffn_norm": ("B T D", "the normalized stream, the input of the FFN"),
    "layers.*.feed_forward.w_gate": ("B T F", "the gate, before silu"),
    "layers.*.feed_forward.w_up": ("B T F", "the numbers that the gate multiplies"),
    "layers.*.feed_forward.swiglu": ("B T F", "silu(gate) * up"),
    "layers.*.feed_forward": ("B T D", "the FFN's update of the stream"),
    "layers.*": ("B T D", "the stream after a layer"),
    "norm": ("... D", "the normalized stream, the input of the output matrix"),
    "output": ("... V", "logits"),
}
LISTED = "`numpy-llama ops` lists the names"
EXAMPLES = f'for example "output", "layers.0" or "layers.*.attention.weights" ({LISTED})'
Hook = Callable[[str, np.ndarray], np.ndarray]  # (name, array) -> the array that takes its place


class Trace(dict[str, np.ndarray]):
    """The intermediates of the last forward pass by name. `passes` has those of every pass, each a dict.

    `model` is the Transformer with the hooks.
    """

    model: Transformer

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[dict[str, np.ndarray]] = []

    def note(self, name: str, array: np.ndarray) -> np.ndarray:
        if not self.passes or name in self:  # a name that occurs again begins a new pass
            self.clear()
            self.passes.append({})
        self[name] = self.passes[-1][name] = array.copy()  # keys and values are views of a cache
        return array


@contextmanager
def trace(llama: Llama | Transformer, *patterns: str) -> Iterator[Trace]:
    """Record the named intermediates of every forward pass in this block. `*` stands for one part of a name.

    A Llama records every pass in this thread, a Transformer only those of `seen.model`. A block without any
    pass is a ParameterError. The kernel does not store scores and weights, so they are computed again from q
    and k. Blocks can be nested: an inner `trace` records the arrays that an outer `edit` put in. A generator
    that yields within the block shares the hooks with its caller until the block ends.
    """
    seen = Trace()
    with _hooked(llama, lambda model: {*names(model, *patterns)}, seen.note) as seen.model:
        yield seen


@contextmanager
def edit(
    llama: Llama | Transformer, pattern: str, change: Callable[[np.ndarray], np.ndarray]
) -> Iterator[Transformer]:
    """Replace the named intermediates by change(array), in every forward pass of this block.

    -> the Transformer with the hooks; a Llama uses it in this thread. Another shape is a MismatchError. A
    change of `attention.k` or `.v` acts on that pass only; a change of `wk` or `wv` goes into the cache.
    A generator shares its hooks as in `trace`.
    """
    check_callable("change", change, "a function from an array to the array that takes its place")

    def wanted(model: Transformer) -> set[str]:
        found = names(model, pattern)
        if sums := [name for name in found if name.endswith(".h")]:
            raise ParameterError(
                f"{sums[0]} is a sum and can only be traced; edit the part that is added, "
                f"{sums[0].removesuffix('h')}attention"
            )
        return {*found}

    def replaced(name: str, array: np.ndarray) -> np.ndarray:
        new = np.asarray(found := change(array.copy()))
        if new.dtype.kind not in "biuf":  # None, if `change` has no return
            wanted = f"it must return an array of {array.shape}"
            raise MismatchError(f"{name}: `change` has returned {escape(found, 60)}, {wanted}")
        if new.shape != array.shape:
            raise MismatchError(f"{name} is {array.shape}, what should replace it {new.shape}")
        return new.astype(array.dtype)

    with _hooked(llama, wanted, replaced) as model:
        yield model


def names(model: Transformer, *patterns: str) -> list[str]:
    """The names in this model that match a pattern, in the order of the forward pass."""
    everything = list(_names(model.args.n_layers))
    if not patterns:
        raise ParameterError(f"no intermediate is named; name one or more, {EXAMPLES}")
    for pattern in patterns:
        check_kind("the name of an intermediate", pattern, str, 'a text such as "layers.*.attention.weights"')
        if not any(_matches(pattern, name) for name in everything):
            same_end = [place for place in PLACES if place.split(".")[-1] == pattern.split(".")[-1]]
            close = same_end or get_close_matches(pattern, [*PLACES, *everything], 1)
            hint = f"is it {close[0]}? ({LISTED})" if close else f"names are {EXAMPLES}"
            where = f"this model of {model.args.n_layers} layers"
            raise ParameterError(f"nothing in {where} is called {escape(pattern, 60)}; {hint}")
    return [name for name in everything if any(_matches(pattern, name) for pattern in patterns)]


def _names(n_layers: int) -> Iterator[str]:
    inner = [place for place in PLACES if place.startswith("layers.")]
    yield "tok_embeddings"
    for i in range(n_layers):
        yield from (place.replace("*", str(i)) for place in inner)
    yield from ("norm", "output")


def _matches(pattern: str, name: str) -> bool:
    """Part by part: "layers.*" is the stream after each layer, and no intermediate within it."""
    patterns, parts = pattern.split("."), name.split(".")
    return len(patterns) == len(parts) and all(map(fnmatchcase, parts, patterns))


class Hooks(NamedTuple):
    """The hooks of one block of `trace` or `edit`: one function for several names."""

    names: set[str]
    hook: Hook


# This thread's hooks on each model, those of the outermost block first.
_HOOKS: ContextVar[dict[Transformer, list[Hooks]]] = ContextVar("hooks")


@contextmanager
def _hooked(
    llama: Llama | Transformer, wanted: Callable[[Transformer], set[str]], hook: Hook
) -> Iterator[Transformer]:
    """The model with a hook on each wanted name, within a block and in its thread only."""
    check_kind("llama", llama, (Llama, Transformer), "a Llama or a Transformer")
    state = "not run"

    def within_block(name: str, array: np.ndarray) -> np.ndarray:
        nonlocal state
        if state == "ended":  # a stream may continue after the block
            return array
        state = "run"
        return hook(name, array)

    model = _model_of(llama)
    own = Hooks(wanted(model), within_block)
    _set_hooks(model, [*_HOOKS.get({}).get(model, []), own])
    try:
        yield STAND_INS.get()[model]
        if state == "not run":
            raise ParameterError(
                "no forward pass of this block reached a hook: run the Llama in the block's own thread, "
                "or the block's Transformer (of a trace, `seen.model`)"
            )
    finally:
        state = "ended"  # blocks of generators may end in any order: only this one's hooks go
        _set_hooks(model, [hooks for hooks in _HOOKS.get({}).get(model, []) if hooks is not own])


def _set_hooks(model: Transformer, hooks: list[Hooks]) -> None:
    """Let this thread's stand-in of the model have these hooks; without hooks there is no stand-in."""
    stand_ins, all_hooks = dict(STAND_INS.get()), dict(_HOOKS.get({}))
    stand_ins.pop(model, None)
    all_hooks.pop(model, None)
    if hooks:
        stand_ins[model], all_hooks[model] = with_hooks(model, hooks), hooks
    STAND_INS.set(stand_ins)
    _HOOKS.set(all_hooks)


def _model_of(llama: Llama | Transformer) -> Transformer:
    """The model without this thread's hooks."""
    model = llama.model if isinstance(llama, Llama) else llama
    return next((own for own, stand_in in STAND_INS.get().items() if stand_in is model), model)


def with_hooks(model: Transformer, hooks: Sequence[Hooks]) -> Transformer:
    """The same model with all these hooks. Hooks on one name run in order."""

    def hook(name: str, array: np.ndarray) -> np.ndarray:
        for one in hooks:
            if name in one.names:
                array = one.hook(name, array)
        return array

    wanted = set[str]().union(*(one.names for one in hooks))
    places: dict[str, set[str]] = {}
    for name in wanted:
        places.setdefault(_place(name), set()).add(name)
    for place in sorted(places, key=lambda place: -place.count(".")):  # inner parts before outer ones
        part = _part(model, place)
        if place.endswith(".attention.attention"):
            at, window = place.removesuffix(".attention"), model.args.sliding_window
            part = _with_inner_hooks(part, at, wanted, hook, window)
        else:
            before, after = places[place] - {place}, places[place] & {place}
            part = _with_hooks(part, hook, [*before], [*after])
        model = model.with_parts({place: part})
    return model


def _place(name: str) -> str:
    """The part whose result or argument has this name."""
    at, _, last = name.rpartition(".")
    if last in ("q", "k", "v", "scores", "weights", "heads"):
        return f"{at}.attention"
    arguments = {"tok_embeddings": "layers.0", "h": f"{at}.ffn_norm", "swiglu": f"{at}.w_down"}
    return arguments.get(last, name)


def _part(model: Transformer, name: str) -> Any:
    part: Any = model
    for step in name.split("."):
        part = part[int(step)] if isinstance(part, list) else getattr(part, step, None)
    return part


def _with_hooks(part: Any, hook: Hook, before: Sequence[str], after: Sequence[str]) -> Function:
    """A part of the model with hooks on its argument and its result."""

    def call(call_part: Function, x: np.ndarray, rest: Sequence[Any]) -> np.ndarray:
        for name in before:
            x = hook(name, x)
        y = call_part(x, *rest)
        for name in after:
            y = hook(name, y)
        return y

    if not isinstance(part, (Linear, RMSNorm, Attention, FeedForward, TransformerBlock)):
        return lambda x, *rest: call(part, x, rest)

    class Hooked(type(part)):  # type: ignore[misc]  # a base chosen at run time
        """A part of the same class, so that its own parts can be exchanged."""

        def __call__(self, x: Array, *rest: Any) -> Array:
            return call(super().__call__, x, rest)

    hooked: Any = object.__new__(Hooked)
    vars(hooked).update(vars(part))
    return hooked


def _with_inner_hooks(
    attend: Function, at: str, wanted: set[str], hook: Hook, window: int | None
) -> Function:
    """`attention` with hooks on q, k, v, scores, weights and heads."""
    within = {f"{at}.scores", f"{at}.weights"} & wanted

    def attention(q: Array, k: Array, v: Array) -> Array:
        q, k, v = hook(f"{at}.q", q), hook(f"{at}.k", k), hook(f"{at}.v", v)
        heads = attend(q, k, v)
        if within:  # the kernel does not store scores and weights
            scores = F.attention_scores(q, k, window)
            expected, near = F.weighted_values(F.softmax(scores), v), 0.01 * np.abs(v).max()
            if np.isfinite(heads).all() and not np.allclose(heads, expected, rtol=0, atol=near):
                raise ParameterError(
                    f"{at}.attention was exchanged and is not softmax(scores) v: it has no scores or weights"
                )
            weights = F.softmax(new := hook(f"{at}.scores", scores))
            used = hook(f"{at}.weights", weights)
            if new is not scores or used is not weights:
                heads = F.weighted_values(used, v)
        return hook(f"{at}.heads", heads)

    return attention


# --- the data of the figures ------------------------------------------------------------------------------


def attention_weights(
    model: Transformer, ids: Sequence[int], layer: int, head: int | None = None
) -> np.ndarray:
    """The attention weights of a text in one head, or the mean over a layer's heads: -> (T, T)."""
    check_whole("layer", layer, 0, model.args.n_layers - 1)
    if head is not None:
        check_whole("head", head, 0, model.args.n_heads - 1)
    name = f"layers.{layer}.attention.weights"
    with trace(model, name) as seen, np.errstate(all="ignore"):  # `_finite` checks the result
        seen.model.hidden(np.array([ids]))
    weights = _finite(name, seen[name][0])
    return weights.mean(axis=0) if head is None else weights[head]


def lens(model: Transformer, ids: Sequence[int]) -> np.ndarray:
    """The logit lens (nostalgebraist 2020): the next token if all later layers were left out.

    The last position's stream, before the first layer and after each, goes through norm, output and softmax:
    -> (n_layers + 1, V).
    """
    with np.errstate(all="ignore"):  # `_finite` checks the results
        with trace(model, "tok_embeddings", "layers.*") as seen:
            seen.model.hidden(np.array([ids]))
        streams = np.stack([_finite(name, h[0, -1]) for name, h in seen.items()])
        return F.softmax(_finite("output", model.logits(streams)))


def _finite(name: str, x: Array) -> Array:
    """x; a NumericsError if NaN or infinity is in it, which no picture could show."""
    if not np.isfinite(x).all():
        raise NumericsError(f"{name} has numbers that are not finite: the weights may be damaged")
    return x

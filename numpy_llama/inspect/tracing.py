"""Looking inside: any intermediate of the forward pass by its name, recorded or replaced.

    with trace(llama, "layers.*.attention.weights") as seen:
        llama.generate("The Eiffel Tower is in", max_tokens=1)
    seen["layers.3.attention.weights"]  # (B, H, T, S)

    with edit(llama, "layers.3.attention.heads", without_head_2):
        llama.generate("The Eiffel Tower is in")

The model knows nothing of this. `Transformer.with_parts` puts hooks around the parts that are asked for, in
a model of its own. `llama.model` is that model within the block, and only in the thread of the block: other
threads run the model without hooks. A block of the model is one C call as long as no part in it has a hook.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np

from .. import functional as F
from ..errors import MismatchError, ParameterError, check_callable, check_kind
from ..llama import STAND_INS, Llama
from ..model import Attention, FeedForward, Linear, RMSNorm, Transformer, TransformerBlock

# Every name there is, in the order of the forward pass, with its shape and what it is.
PLACES = {
    "tok_embeddings": ("B T D", "the tokens' rows of the embedding, where the residual stream begins"),
    "layers.*.attention_norm": ("B T D", "the stream as attention reads it"),
    "layers.*.attention.wq": ("B T H*Dh", "queries, not yet turned by RoPE"),
    "layers.*.attention.wk": ("B T K*Dh", "keys of the new positions, not yet turned"),
    "layers.*.attention.wv": ("B T K*Dh", "values of the new positions"),
    "layers.*.attention.q": ("B T H Dh", "queries, turned"),
    "layers.*.attention.k": ("B S K Dh", "keys of all positions, turned, as the cache has them"),
    "layers.*.attention.v": ("B S K Dh", "values of all positions, as the cache has them"),
    "layers.*.attention.scores": ("B H T S", "q k^T / sqrt(Dh), -inf where a query may not look"),
    "layers.*.attention.weights": ("B H T S", "softmax of the scores: where each query looks"),
    "layers.*.attention.heads": ("B T H Dh", "what each head gathered: weights times values"),
    "layers.*.attention": ("B T D", "what attention adds to the stream"),
    "layers.*.h": ("B T D", "the stream between the two steps of a layer"),
    "layers.*.ffn_norm": ("B T D", "the stream as the FFN reads it"),
    "layers.*.feed_forward.w_gate": ("B T F", "the gate, before silu"),
    "layers.*.feed_forward.w_up": ("B T F", "what the gate lets through"),
    "layers.*.feed_forward.swiglu": ("B T F", "silu(gate) * up"),
    "layers.*.feed_forward": ("B T D", "what the FFN adds to the stream"),
    "layers.*": ("B T D", "the stream behind a layer"),
    "norm": ("... D", "the stream as the output reads it"),
    "output": ("... V", "logits"),
}
Hook = Callable[[str, np.ndarray], np.ndarray]  # (name, array) -> the array that takes its place


class Trace(dict[str, np.ndarray]):
    """What the last forward pass made, by name; `passes` has all of them, each a dict.

    `model` is the Transformer that records.
    """

    model: Transformer

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[dict[str, np.ndarray]] = []

    def note(self, name: str, array: np.ndarray) -> np.ndarray:
        if not self.passes or name in self:  # what comes a second time is of another pass
            self.clear()
            self.passes.append({})
        self[name] = self.passes[-1][name] = array.copy()  # keys and values are views of a cache
        return array


@contextmanager
def trace(llama: Llama | Transformer, *patterns: str) -> Iterator[Trace]:
    """Record what the patterns name in every forward pass of this block; `*` stands for one part of a name.

    Of a Llama every pass in this thread is recorded, of a Transformer those of `seen.model`. A block without
    any pass is a ParameterError. The kernel does not store scores and weights: they are computed again from
    its q and k. Blocks may lie within each other: an inner one records what an outer one has replaced.
    """
    seen = Trace()
    with _hooked(llama, lambda model: {*names(model, *patterns)}, seen.note) as seen.model:
        yield seen


@contextmanager
def edit(
    llama: Llama | Transformer, pattern: str, change: Callable[[np.ndarray], np.ndarray]
) -> Iterator[Transformer]:
    """Put change(array) in the place of what the pattern names, in every forward pass of this block.

    -> the Transformer that does so; a Llama runs it by itself, in this thread. MismatchError where the shape
    is another. A change of `attention.k` or `.v` is seen by that pass only; one of `wk` or `wv` goes into the
    cache.
    """

    check_callable("change", change)

    def wanted(model: Transformer) -> set[str]:
        found = names(model, pattern)
        if sums := [name for name in found if name.endswith(".h")]:
            raise ParameterError(
                f"{sums[0]} is a sum and can only be traced; edit what is added, "
                f"{sums[0].removesuffix('h')}attention"
            )
        return {*found}

    def replaced(name: str, array: np.ndarray) -> np.ndarray:
        new = np.asarray(change(array.copy()))
        if new.shape != array.shape:
            raise MismatchError(f"{name} is {array.shape}, what should replace it {new.shape}")
        return new.astype(array.dtype)

    with _hooked(llama, wanted, replaced) as model:
        yield model


def names(model: Transformer, *patterns: str) -> list[str]:
    """The names in this model that the patterns mean, in the order of the forward pass."""
    everything = list(_names(model.args.n_layers))
    for pattern in patterns:
        check_kind("the name of a place", pattern, str, "a text")
        if not any(_means(pattern, name) for name in everything):
            close = get_close_matches(pattern, [*PLACES, *everything], 1)
            hint = f"; is it {close[0]}?" if close else ""
            raise ParameterError(
                f"nothing in this model of {model.args.n_layers} layers is called {pattern!r}{hint}"
                " (`numpy-llama ops` lists the names)"
            )
    return [name for name in everything if any(_means(pattern, name) for pattern in patterns)]


def _names(n_layers: int) -> Iterator[str]:
    inner = [place for place in PLACES if place.startswith("layers.")]
    yield "tok_embeddings"
    for i in range(n_layers):
        yield from (place.replace("*", str(i)) for place in inner)
    yield from ("norm", "output")


def _means(pattern: str, name: str) -> bool:
    """Part by part: "layers.*" is the stream behind each layer, and nothing within it."""
    parts, of = pattern.split("."), name.split(".")
    return len(parts) == len(of) and all(map(fnmatchcase, of, parts))


class Listener(NamedTuple):
    """What one block of `trace` or `edit` asks for."""

    wanted: set[str]
    hook: Hook


# This thread's listeners to a model, the outermost block's first.
_LISTENERS: ContextVar[dict[Transformer, list[Listener]]] = ContextVar("listeners")


@contextmanager
def _hooked(
    llama: Llama | Transformer, wanted: Callable[[Transformer], set[str]], hook: Hook
) -> Iterator[Transformer]:
    """The model with hooks at the wanted places, for the time of a block and in its thread only."""
    check_kind("llama", llama, (Llama, Transformer), "a Llama or a Transformer")
    state = "not run"

    def within_block(name: str, array: np.ndarray) -> np.ndarray:
        nonlocal state
        if state == "ended":  # a stream may go on after the block
            return array
        state = "run"
        return hook(name, array)

    model, stand_ins, listeners = _model_of(llama), STAND_INS.get(), _LISTENERS.get({})
    heard = [*listeners.get(model, []), Listener(wanted(model), within_block)]
    hooked = with_hooks(model, heard)
    tokens = STAND_INS.set({**stand_ins, model: hooked}), _LISTENERS.set({**listeners, model: heard})
    try:
        yield hooked
        if state == "not run":
            raise ParameterError(
                "no forward pass of this block reached a hook: run the Llama in the block's own thread; "
                "of a Transformer run the one that the block gives, `seen.model` of a trace"
            )
    finally:
        state = "ended"
        STAND_INS.reset(tokens[0])
        _LISTENERS.reset(tokens[1])


def _model_of(llama: Llama | Transformer) -> Transformer:
    """The model without this thread's hooks."""
    model = llama.model if isinstance(llama, Llama) else llama
    return next((own for own, stand_in in STAND_INS.get().items() if stand_in is model), model)


def with_hooks(model: Transformer, listeners: Sequence[Listener]) -> Transformer:
    """The same model with a hook at every place that a listener wants; each calls the listeners in order."""

    def hook(name: str, array: np.ndarray) -> np.ndarray:
        for listener in listeners:
            if name in listener.wanted:
                array = listener.hook(name, array)
        return array

    wanted = set[str]().union(*(listener.wanted for listener in listeners))
    places: dict[str, set[str]] = {}
    for name in wanted:
        places.setdefault(_place(name), set()).add(name)
    for place in sorted(places, key=lambda place: -place.count(".")):  # a part before what holds it
        part = _part(model, place)
        if place.endswith(".attention.attention"):
            part = _with_inner_hooks(part, place.removesuffix(".attention"), wanted, hook)
        else:
            before, after = places[place] - {place}, places[place] & {place}
            part = _with_hooks(part, hook, [*before], [*after])
        model = model.with_parts({place: part})
    return model


def _place(name: str) -> str:
    """The part whose result, or whose argument, has that name."""
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


def _with_hooks(part: Any, hook: Hook, before: Sequence[str], after: Sequence[str]) -> Callable:
    """A part of the model with hooks on its argument and its result."""

    def call(call_part: Callable, x: np.ndarray, rest: Sequence) -> np.ndarray:
        for name in before:
            x = hook(name, x)
        y = call_part(x, *rest)
        for name in after:
            y = hook(name, y)
        return y

    if not isinstance(part, (Linear, RMSNorm, Attention, FeedForward, TransformerBlock)):
        return lambda x, *rest: call(part, x, rest)

    class Hooked(type(part)):  # type: ignore[misc]
        """Still a part of its kind: its own parts can be exchanged."""

        def __call__(self, x, *rest):
            return call(super().__call__, x, rest)

    hooked: Any = object.__new__(Hooked)
    vars(hooked).update(vars(part))
    return hooked


def _with_inner_hooks(attend: Callable, at: str, wanted: set[str], hook: Hook) -> Callable:
    """`attention` with hooks on q, k, v, scores, weights and heads."""
    within = {f"{at}.scores", f"{at}.weights"} & wanted

    def attention(q, k, v):
        q, k, v = hook(f"{at}.q", q), hook(f"{at}.k", k), hook(f"{at}.v", v)
        heads = attend(q, k, v)
        if within:  # the kernel does not store them: they are computed again
            scores = F.attention_scores(q, k)
            weights = F.softmax(new := hook(f"{at}.scores", scores))
            used = hook(f"{at}.weights", weights)
            if new is not scores or used is not weights:
                heads = F.weighted_values(used, v)
        return hook(f"{at}.heads", heads)

    return attention


# --- what the pictures show -------------------------------------------------------------------------------


def attention_weights(
    model: Transformer, ids: Sequence[int], layer: int, head: int | None = None
) -> np.ndarray:
    """Where each token of a text looks, in one head or in the mean of a layer's: -> (T, T)."""
    name, H = f"layers.{layer}.attention.weights", model.args.n_heads
    if head is not None and not 0 <= head < H:
        raise ParameterError(f"head is {head}, the model has 0..{H - 1}")
    with trace(model, name) as seen:
        seen.model.hidden(np.array([ids]))
    weights = seen[name][0]
    return weights.mean(axis=0) if head is None else weights[head]


def lens(model: Transformer, ids: Sequence[int]) -> np.ndarray:
    """What would come after a text if all layers from here on were left out (nostalgebraist 2020).

    The stream at the last position, before the first layer and behind each, through norm, output and softmax:
    -> (n_layers + 1, V).
    """
    with trace(model, "tok_embeddings", "layers.*") as seen:
        seen.model.hidden(np.array([ids]))
    streams = np.stack([h[0, -1] for h in seen.values()])
    return F.softmax(model.logits(streams))

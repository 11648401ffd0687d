"""Looking inside: any intermediate of the forward pass by its name, recorded or replaced.

    with trace(llama, "layers.*.attention.weights") as seen:
        llama.generate("The Eiffel Tower is in", max_tokens=1)
    seen["layers.3.attention.weights"]  # (B, H, T, S)

    with edit(llama, "layers.3.attention.heads", without_head_2):
        llama.generate("The Eiffel Tower is in")

The model knows nothing of this. While the block runs, some of its parts are exchanged for ones that do the
same and tell of it; what is not asked for is computed as ever, by the same kernels. Only a layer that is
asked for its inner steps takes them one by one, where csrc/layer.c would take them in one call.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from .. import functional as F
from ..errors import MismatchError, ParameterError
from ..llama import Llama
from ..model import Attention, FeedForward, Transformer, TransformerBlock

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
Tell = Callable[[str, np.ndarray], np.ndarray]  # (name, array) -> what takes its place


class Trace(dict[str, np.ndarray]):
    """What the last forward pass made, by name; `passes` has all of them, each a dict."""

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
    """Record what the patterns name in every forward pass of this model; `*` stands for one part of a name.

    The scores and weights are computed beside the kernel, which never has them in memory, from its q and k.
    Blocks may lie within each other: what an outer one has replaced is what an inner one sees.
    """
    seen = Trace()
    with _tapped(llama, lambda model: {*names(model, *patterns)}, seen.note):
        yield seen


@contextmanager
def edit(
    llama: Llama | Transformer, pattern: str, change: Callable[[np.ndarray], np.ndarray]
) -> Iterator[None]:
    """Put change(array) in the place of what the pattern names, in every forward pass of this model.

    MismatchError where its shape is another. A change of `attention.k` or `.v` is seen by that pass only; one
    of `wk` or `wv` goes into the cache.
    """

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

    with _tapped(llama, wanted, replaced):
        yield


def names(model: Transformer, *patterns: str) -> list[str]:
    """The names in this model that the patterns mean, in the order of the forward pass."""
    everything = list(_names(model.args.n_layers))
    for pattern in patterns:
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


@contextmanager
def _tapped(
    llama: Llama | Transformer, wanted: Callable[[Transformer], set[str]], told: Tell
) -> Iterator[None]:
    """The model with parts that tell of what is wanted: told(name, array) gives what takes its place."""
    model = llama.model if isinstance(llama, Llama) else llama
    listener = wanted(model), told
    taps = _TAPPED.setdefault(model, _Taps(model))
    taps.listeners.append(listener)
    taps.install()
    try:
        yield
    finally:
        taps.listeners.remove(listener)
        taps.install()


class _Taps:
    """A model's own parts, and who listens: one after the other, in the order in which they came."""

    def __init__(self, model: Transformer):
        self.model, self.parts = model, (model.layers, model.norm, model.output)
        self.listeners: list[tuple[set[str], Tell]] = []

    def install(self) -> None:
        """Put in the model's place of each part what the listeners want, or its own."""
        model, (layers, norm, output) = self.model, self.parts
        wanted = set[str]().union(*(names for names, _ in self.listeners))
        layers = [_layer(layer, f"layers.{i}", wanted, self.tell) for i, layer in enumerate(layers)]
        layers[0] = _twin(layers[0], self.tell, given="tok_embeddings")
        model.layers, model.norm = layers, _twin(norm, self.tell, "norm")
        model.output = _twin(output, self.tell, "output")
        if not self.listeners:
            model.layers, model.norm, model.output = self.parts
            del _TAPPED[model]

    def tell(self, name: str, array: np.ndarray) -> np.ndarray:
        for wanted, told in self.listeners:
            if name in wanted:
                array = told(name, array)
        return array


_TAPPED: dict[Transformer, _Taps] = {}


def _twin(part: Any, tell: Tell, made: str | None = None, given: str | None = None) -> Any:
    """A part of the model that tells of its result under the name `made`, of its argument as `given`."""

    class Twin(type(part)):  # type: ignore[misc]
        def __call__(self, x, *rest):
            x = tell(given, x) if given else x
            y = super().__call__(x, *rest)
            return tell(made, y) if made else y

    twin = object.__new__(Twin)
    twin.__dict__.update(vars(part))
    return twin


def _layer(block: TransformerBlock, at: str, wanted: set[str], tell: Tell) -> TransformerBlock:
    if any(name.startswith(f"{at}.") for name in wanted):
        steps = object.__new__(TransformerBlock)  # step by step, if it was one call
        steps.__dict__.update(vars(block))
        steps.attention_norm = _twin(block.attention_norm, tell, f"{at}.attention_norm")
        steps.attention = _attention(block.attention, f"{at}.attention", wanted, tell)
        steps.ffn_norm = _twin(block.ffn_norm, tell, f"{at}.ffn_norm", given=f"{at}.h")
        steps.feed_forward = _feed_forward(block.feed_forward, f"{at}.feed_forward", tell)
        block = steps
    return _twin(block, tell, at)


def _attention(part: Attention, at: str, wanted: set[str], tell: Tell) -> Attention:
    """Its matrices, and what lies within its inner function."""
    attend, within = part.attention, {f"{at}.scores", f"{at}.weights"} & wanted

    def attention(q, k, v):
        q, k, v = tell(f"{at}.q", q), tell(f"{at}.k", k), tell(f"{at}.v", v)
        heads = attend(q, k, v)
        if within:  # the kernel does not keep them: they are computed again
            scores = F.attention_scores(q, k)
            weights = F.softmax(new := tell(f"{at}.scores", scores))
            used = tell(f"{at}.weights", weights)
            if new is not scores or used is not weights:
                heads = F.weighted_values(used, v)
        return tell(f"{at}.heads", heads)

    twin = _twin(part, tell, at)
    twin.attention = attention
    for name in ("wq", "wk", "wv"):
        setattr(twin, name, _twin(getattr(part, name), tell, f"{at}.{name}"))
    return twin


def _feed_forward(part: FeedForward, at: str, tell: Tell) -> FeedForward:
    twin = _twin(part, tell, at)
    twin.w_gate, twin.w_up = _twin(part.w_gate, tell, f"{at}.w_gate"), _twin(part.w_up, tell, f"{at}.w_up")
    twin.w_down = _twin(part.w_down, tell, given=f"{at}.swiglu")
    return twin


# --- what the pictures show -------------------------------------------------------------------------------


def attention_weights(
    model: Transformer, ids: Sequence[int], layer: int, head: int | None = None
) -> np.ndarray:
    """Where each token of a text looks, in one head or in the mean of a layer's: -> (T, T)."""
    name, H = f"layers.{layer}.attention.weights", model.args.n_heads
    if head is not None and not 0 <= head < H:
        raise ParameterError(f"head is {head}, the model has 0..{H - 1}")
    with trace(model, name) as seen:
        model.hidden(np.array([ids]))
    weights = seen[name][0]
    return weights.mean(axis=0) if head is None else weights[head]


def lens(model: Transformer, ids: Sequence[int]) -> np.ndarray:
    """What would come after a text if all layers from here on were left out (nostalgebraist 2020).

    The stream at the last position, before the first layer and behind each, through norm, output and softmax:
    -> (n_layers + 1, V).
    """
    with trace(model, "tok_embeddings", "layers.*") as seen:
        model.hidden(np.array([ids]))
    streams = np.stack([h[0, -1] for h in seen.values()])
    return F.softmax(model.logits(streams))

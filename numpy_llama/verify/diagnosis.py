"""Faults of a checkpoint, found without another copy. C can equal NumPy on a wrong file.

A trained model predicts plain English. Each fault has a repair: reorder the rows of wq and wk, exchange
w_gate and w_up, change rope_theta, or leave a shard's layers out. If a repaired model predicts the sample
text clearly better than the file as it is, the file has that fault. `published` compares the hyperparameters
with those of the published model of the same shape.

Some faults hardly change the loss on a short text, and this does not find them. A wrong RoPE factor of Llama
3 is one: `published` finds it. A flipped low bit of a mantissa is another: compare.py finds it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..backend import Progress, build
from ..backend.formats import StoredTensor
from ..cache import KVCache
from ..checkpoint.names import interleaved_rows
from ..checkpoint.presets import PRESETS
from ..config import Array, ModelArgs
from ..errors import NumericsError
from ..inspect.perplexity import losses
from ..model import Transformer
from ..text.tokenizer import Tokenizer

TEXT = """\
Bread is made from four things: flour, water, salt and yeast. The baker mixes them in a large bowl, works \
the dough with both hands until it is smooth, and leaves it under a cloth in a warm place. After an hour \
it has grown to twice its size, because the yeast eats the sugar in the flour and breathes out gas. The \
baker then folds the dough, shapes it into a loaf, lets it rise once more and puts it into a hot oven. \
When the crust is brown and the loaf sounds hollow, the bread is done.

The moon goes around the earth once in about four weeks. It has no light of its own: what we see is the \
light of the sun, which falls on one half of it. When the moon stands between the earth and the sun, its \
dark half is turned to us, and we call it a new moon. Two weeks later the earth stands between the moon \
and the sun, and we see a full moon. The pull of the moon also raises the water of the sea, so that most \
coasts have high water and low water twice a day.

Once upon a time there was a little girl named Anna who lived in a small house near the forest. One day \
she found a bird with a broken wing. She was very sad, so she took the bird home and gave it some water \
and a warm place to sleep. Every morning she asked the bird, "Are you better today?" And one morning the \
bird sang a song and flew out of the window. Anna was happy, because she knew that her friend could fly \
again.

The captain of the ship was an old man with a grey beard. He had been at sea for more than forty years and \
had seen every port between London and Shanghai. "A storm is coming," he said to the crew, and pointed at \
the dark clouds in the west. The men took down the sails and tied everything to the deck. All night long \
the wind blew and the waves rolled over the ship, but in the morning the sea was calm again, and nobody \
was hurt. The cook made coffee for everyone, and the captain wrote into his book: "Storm from the west, no \
damage, all men well."
"""
# The loss that a repair must save, in nats a token. A large healthy model changes less if one of its layers
# is left out, or if it has the next published rope_theta.
MARGIN = 0.05
# The loss that a repair must save, in standard errors of the mean over the tokens. A few dozen repairs are
# tried.
SURE = 3.0
# For the published rope_theta of a model of this shape less evidence is enough.
MARGIN_PUBLISHED, SURE_PUBLISHED = 0.01, 2.0
# A model predicts the text if its loss is below this share of log(vocab_size), the loss of a blind guess.
PREDICTS = 0.75
# A repair is given up if its loss on the first 128 tokens is too high.
FIRST = 128
# The length of the text in tokens. A tokenizer of bytes takes a quarter of the text, and that is enough.
TOKENS = 640
WORST = 100.0  # nats: NaN and infinity count as this

Weights = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class Repair:
    """A possible fault of the file, and the model without it."""

    fault: str
    args: ModelArgs
    weights: Weights
    without: range = range(0)  # layers left out
    margin: float = MARGIN
    sure: float = SURE


@dataclass(frozen=True)
class Reading:
    """How well the sample text was predicted: losses in nats a token."""

    tokens: int
    blind: float  # the loss of a blind guess
    loss: float
    tried: int  # repairs
    fault: str | None  # the repair that helped, and how much
    repaired: float | None
    standard_error: float | None

    @property
    def inconclusive(self) -> bool:
        """The model predicts the text neither as it is nor repaired."""
        return self.loss > PREDICTS * self.blind and self.fault is None


class Sample:
    """The sample text, read by one model after another."""

    def __init__(self, args: ModelArgs, tokenizer: Tokenizer, threads: int | None = None):
        self.args, self.threads = args, threads
        ids = tokenizer.encode(TEXT, bos=tokenizer.add_bos)
        self.ids = ids[: min(args.max_seq_len, TOKENS)]
        self.blind = math.log(args.vocab_size)

    def losses(self, repair: Repair, most: float = math.inf) -> np.ndarray:
        """The loss of each token in nats. If the mean of the first FIRST is above `most`, only of those."""
        model = build(repair.args, repair.weights, threads=self.threads)
        model = model.with_parts({f"layers.{i}": left_out for i in repair.without})
        cache, parts, ends = model.new_cache(max_seq_len=len(self.ids)), [], [FIRST, len(self.ids) - 1]
        begin = 0
        for end in sorted({min(end, len(self.ids) - 1) for end in ends}):
            parts.append(self._losses(model, begin, end, cache))
            if parts[0].mean() > most:
                break
            begin = end
        return np.concatenate(parts)

    def _losses(self, model: Transformer, begin: int, end: int, cache: KVCache) -> np.ndarray:
        wanted = self.ids[begin + 1 : end + 1]
        try:
            with np.errstate(all="ignore"):
                h = model.hidden(np.array([self.ids[begin:end]]), begin, cache)
                found = losses(model.logits(h[0]), wanted)
        except NumericsError:
            return np.full(len(wanted), WORST)
        return np.minimum(np.nan_to_num(found, nan=WORST), WORST)

    def read(
        self, weights: Weights, runs: Mapping[str, range], progress: Progress = lambda what, done, total: None
    ) -> Reading:
        """Measure the loss as it is and with each repair. The repair that helps most names the fault.

        All weights are in memory at once, as stored. `runs`: see `repairs`.
        """
        made = {id(w): w.realize() for w in weights.values()}
        weights = {name: made[id(w)] for name, w in weights.items()}
        tried = list(repairs(self.args, weights, runs))
        progress("reading a text", 0, len(tried) + 1)
        before = self.losses(Repair("", self.args, weights))
        most = min(before[:FIRST].mean() + MARGIN, PREDICTS * self.blind)
        best: tuple[float, float, str] | None = None
        for n, repair in enumerate(tried, 1):
            progress("reading a text", n, len(tried) + 1)
            after = self.losses(repair, most)
            gain = before[: len(after)] - after
            error = gain.std() / math.sqrt(len(gain))
            clear = gain.mean() > max(repair.margin, repair.sure * error) and len(after) == len(before)
            predicted = after.mean() < PREDICTS * self.blind
            if clear and predicted and (best is None or after.mean() < best[0]):
                best = (float(after.mean()), float(error), repair.fault)
        repaired, error, fault = best or (None, None, None)
        loss = float(before.mean())
        return Reading(len(before), self.blind, loss, len(tried), fault, repaired, error)


def left_out(x: Array, start_pos: int, freqs_cis: Array, cache: KVCache) -> Array:
    """A layer that adds nothing to the residual stream."""
    return x


def repairs(args: ModelArgs, weights: Weights, runs: Mapping[str, range]) -> Iterator[Repair]:
    """A repair for each known fault. `runs`: descriptions of layers that may belong to another model."""
    for which, fault, q, k in orders(args):
        yield Repair(
            f"the rows of {which} {fault}", args, _each_named(weights, wq=_reorder(q), wk=_reorder(k))
        )
    exchanged = {
        name.replace(a, b): w
        for name, w in weights.items()
        for a, b in (("w_gate", "w_up"), ("w_up", "w_gate"))
        if a in name
    }
    yield Repair("w_gate and w_up (w1 and w3) are exchanged", args, {**weights, **exchanged})
    thetas = {p.rope_theta for p in same_shape(args).values()}
    for theta in sorted({preset.args.rope_theta for preset in PRESETS.values()} - {args.rope_theta}):
        fault = f"rope_theta is {args.rope_theta:g}, it should be {theta:g}"
        proof = (MARGIN_PUBLISHED, SURE_PUBLISHED) if theta in thetas else (MARGIN, SURE)
        yield Repair(fault, replace(args, rope_theta=theta), weights, range(0), *proof)
    for scaling in {preset.args.rope_scaling for preset in PRESETS.values()} - {args.rope_scaling}:
        other = replace(args, rope_scaling=scaling)
        fault = f"the RoPE scaling is {described(args)}, it should be {described(other)}"
        yield Repair(fault, other, weights)
    for what, layers in runs.items():
        if len(layers) < args.n_layers:
            yield Repair(f"{what} do not belong to this model, or are corrupt", args, weights, layers)


def orders(args: ModelArgs) -> Iterator[tuple[str, str, np.ndarray | None, np.ndarray | None]]:
    """-> (which, fault, q, k): matrices whose rows may be in a wrong order, and the right order of wq and wk.

    An order is the places of the rows in the file; None leaves a matrix as it is.
    """
    q, k = (interleaved_rows(n, args.head_dim) for n in (args.n_heads, args.n_kv_heads))
    faults: list[tuple[str, Callable[[Array], Array]]] = [
        ("are in Hugging Face's order (half-split), not in pairs", lambda rows: rows),
        ("were un-permuted twice", np.argsort),
    ]
    for fault, make in faults:
        yield "wq and wk", fault, make(q), make(k)
        yield "wq", fault, make(q), None
        yield "wk", fault, None, make(k)
    width, rest = divmod(len(k), args.n_heads)
    if args.n_heads != args.n_kv_heads and not rest and width % 2 == 0:
        wrong = interleaved_rows(args.n_heads, width)
        yield "wk", "were un-permuted with n_heads, not n_kv_heads", None, np.argsort(wrong)[k]


def _reorder(rows: np.ndarray | None) -> Callable[[StoredTensor], StoredTensor]:
    def put(w: StoredTensor) -> StoredTensor:
        if rows is None:
            return w
        order = rows if w.row_order is None else w.row_order[rows]
        return w.with_row_order(order)

    return put


def _each_named(weights: Weights, **make: Callable[[StoredTensor], StoredTensor]) -> Weights:
    """The same weights, with a function applied to those of some names."""
    kinds = {name: name.split(".")[-2] for name in weights}
    return {name: make[kinds[name]](w) if kinds[name] in make else w for name, w in weights.items()}


def described(args: ModelArgs) -> str:
    """Its RoPE scaling in a few words."""
    return "none" if args.rope_scaling is None else args.rope_scaling.describe(args.max_seq_len)


def same_shape(args: ModelArgs) -> dict[str, ModelArgs]:
    """The published models of this shape, by name."""
    sizes = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size")
    return {
        name: preset.args
        for name, preset in PRESETS.items()
        if all(getattr(preset.args, size) == getattr(args, size) for size in sizes)
    }


def published(args: ModelArgs) -> str | None:
    """The difference from the published model of this shape, if there is one: its RoPE factor or norm_eps.

    rope_theta may differ, because models with an extended context have their own. The sample text checks it.
    """
    same = same_shape(args)
    eps = [p for p in same.values() if math.isclose(p.norm_eps, args.norm_eps, rel_tol=1e-3)]
    if not same or any(p.rope_scaling == args.rope_scaling for p in eps):
        return None
    name, nearest = next(iter(same.items()))
    which = f"{name}, which has this shape, was published with"
    if not eps:
        return f"norm_eps is {args.norm_eps:g}, {which} {nearest.norm_eps:g}"
    if nearest.rope_scaling is None:  # others extended its context
        return None
    found, wanted = described(args), described(nearest)
    return f"the RoPE scaling is {found}, {which} {wanted}"

"""Faults of a checkpoint, found by comparing every weight and hyperparameter with another copy of the model.

The copies may be stored in different formats, so they are compared in float32. If both have one format, or
one is the other widened, a fault is named to the bit. A difference as small as rounding is no fault.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import groupby

import numpy as np

from ..backend.formats import StoredTensor
from ..checkpoint.base import Checkpoint
from ..config import ModelArgs
from ..functional import rope_freqs
from .diagnosis import Weights, described, orders

# The largest error of rounding, relative to the root mean square of the weights. 4-bit formats have 0.07 to
# 0.1, and no usable format has 0.2. 8 bits have 0.01, and so may 16-bit or float32 numbers that were 8 bits
# before.
ROUNDING = 0.2
ROUNDING_OF = {"F32": 0.02, "F16": 0.02, "BF16": 0.02, "Q8_0": 0.02}
UNRELATED = 0.3  # the cosine of weights of two models is smaller
FEW = 256  # at most as many unequal numbers as a block has: damage in one place
OUTLIER = 16.0  # a damaged number's error, in median errors of its tensor
AT_ONCE = 1 << 22  # numbers compared at a time
SAMPLED = 61  # the median error is that of every 61st number
SKETCH, SAME = 4, 0.9  # two weights are the same if their first SKETCH rows have a cosine above SAME
CONTEXT = "max_seq_len"  # a limit, and no part of the mathematics


@dataclass(frozen=True)
class Difference:
    """The result for one weight. `what`: "equal", "rounding", or the fault."""

    name: str
    what: str
    detail: str = ""  # about this weight only
    error: float = 0.0

    @property
    def wrong(self) -> bool:
        return self.what not in ("equal", "rounding")


def arguments(found: ModelArgs, wanted: ModelArgs) -> Iterator[tuple[str, str]]:
    """The name of each argument that differs, and how."""
    for field in fields(ModelArgs):
        a, b = getattr(found, field.name), getattr(wanted, field.name)
        if field.name == "rope_scaling":
            if not _same_rope(found, wanted):
                shown = described(found), described(wanted)
                yield field.name, f"rope_scaling is {shown[0]}, the reference has {shown[1]}"
        elif a is None or b is None:
            if a != b:
                yield field.name, f"{field.name} is {a}, the reference has {b}"
        elif not math.isclose(a, b, rel_tol=1e-6):
            yield field.name, f"{field.name} is {a:g}, the reference has {b:g}"


def _same_rope(a: ModelArgs, b: ModelArgs) -> bool:
    """Whether both scalings give the same angles and lengths, each in its own context."""
    if a.rope_scaling == b.rope_scaling or a.head_dim != b.head_dim:
        return a.rope_scaling == b.rope_scaling
    made = []
    for args in (a, b):
        freqs = rope_freqs(args.head_dim, args.rope_theta)
        same = np.ones(len(freqs) + 1)
        if (s := args.rope_scaling) is not None:
            same = np.append(s.divisors(freqs, args.rope_theta, args.max_seq_len), s.length_factor)
        made.append(same)
    return np.allclose(made[0], made[1], rtol=1e-5, atol=0)


def compare(
    opened: Checkpoint,
    reference: Checkpoint,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[list[str], list[str]]:
    """-> the faults, in the order of the forward pass, and a line for each harmless kind of difference."""
    found, wanted = opened.weights(), reference.weights()
    differing = dict(arguments(opened.args, reference.args))
    faults = [how for name, how in differing.items() if name != CONTEXT]
    lines = [how for name, how in differing.items() if name == CONTEXT]
    if {name: w.shape for name, w in found.items()} != {name: w.shape for name, w in wanted.items()}:
        return ["it is another model: " + "; ".join(faults)], lines
    differences = []
    for done, name in enumerate(wanted):
        progress("comparing", done, len(wanted))
        differences.append(Comparison(name, found, wanted, opened.args).difference())
    order = {name: i for i, name in enumerate(_forward(wanted))}
    differences.sort(key=lambda d: order[d.name])
    return faults + list(_faults(differences, opened)), lines + list(_fine(differences, found, wanted))


def _forward(names: Iterable[str]) -> list[str]:
    """The embedding, the layers, the rest."""
    return sorted(names, key=lambda name: (not name.startswith("tok_"), not name.startswith("layers.")))


class Comparison:
    """One weight of two files."""

    def __init__(self, name: str, found: Weights, wanted: Weights, args: ModelArgs):
        self.name, self.args, self.wanted_weights = name, args, wanted
        self.found: StoredTensor = found[name].realize()
        self.wanted: StoredTensor = wanted[name].realize()
        formats = self.found.format.name, self.wanted.format.name
        self.rounding = max(ROUNDING_OF.get(format, ROUNDING) for format in formats)

    def difference(self) -> Difference:
        name = self.name
        if self._same_bytes():
            return Difference(name, "equal")
        unequal, at, error, cosine, worst = self._measure(self.found, self.wanted)
        if not unequal:
            return Difference(name, "equal")
        if unequal <= FEW and unequal < self.found.shape[-1] * len(self.found) / 4:
            return Difference(name, "damaged", self._damage(at, unequal))
        if error < self.rounding:
            if worst is not None:
                return Difference(name, "damaged", self._damage([worst], 1) + ", beyond rounding")
            return Difference(name, "rounding", error=error)
        if (what := self._order() or self._other()) is not None:
            return Difference(name, what)
        if abs(cosine) < UNRELATED:
            return Difference(name, "not the weights of this model")
        return Difference(name, "other weights", f"relative error {error:.2g}, cosine {cosine:.3f}")

    def _same_bytes(self) -> bool:
        a, b = self.found, self.wanted
        if a.column_order is not None or b.column_order is not None:
            return False  # the numbers are compared
        return a.format == b.format and all(
            np.array_equal(a.stored_rows(part), b.stored_rows(part)) for part in _parts(a)
        )

    def _measure(
        self, found: StoredTensor, wanted: StoredTensor
    ) -> tuple[int, list[tuple[int, ...]], float, float, tuple[int, int] | None]:
        """-> (unequal, at, error, cosine, worst): how many numbers are unequal, and the places of the first.

        `error` is relative. `worst`: the place of a single number whose error is far above the others, or
        None.
        """
        unequal, at, off = 0, list[tuple[int, ...]](), []
        squares = np.zeros(4)  # of the difference, of both, and their product
        for part in _parts(found):
            a, b = (np.atleast_2d(t[part]) for t in (found, wanted))
            odd = ~((a == b) | (np.isnan(a) & np.isnan(b)))
            if unequal <= FEW:
                shift = 0 if len(found.shape) == 1 else part.start
                at += [(int(i) + shift, int(j)) for i, j in np.argwhere(odd)[:FEW]]
            unequal += int(odd.sum())
            with np.errstate(all="ignore"):
                d = np.abs(a - b)
                ratio = np.where(odd, d / _scale(b, max(found.format.block, wanted.format.block)), 0)
            ratio = np.nan_to_num(ratio, nan=np.inf)
            i, j = np.unravel_index(int(ratio.argmax()), ratio.shape)
            off.append(
                (
                    float(ratio[i, j]),
                    float(np.median(ratio.ravel()[::SAMPLED])),
                    (int(i) + (part.start or 0), int(j)),
                )
            )
            a, d = (np.where(np.isfinite(x), x, 0).astype(np.float64) for x in (a, d))
            squares += [np.vdot(d, d), np.vdot(a, a), np.vdot(b, b), np.vdot(a, b)]
        most, _, place = max(off)
        usual = float(np.median([median for _, median, _ in off]))
        kept = np.sqrt(squares[:3])
        error = kept[0] / max(kept[2], 1e-300)
        # The error of one number may be larger than all others together.
        lonely = most > max(OUTLIER * max(usual, 2.0**-12), 4 * error) or not math.isfinite(most)
        if lonely and usual < self.rounding:
            error = min(error, usual)
        return unequal, at, error, squares[3] / max(kept[1] * kept[2], 1e-300), place if lonely else None

    def _damage(self, at: list[tuple[int, ...]], unequal: int) -> str:
        """The first damaged number and its place; the bit, if a single one is flipped."""
        row, column = at[0]
        vector = len(self.found.shape) == 1
        a, b = (
            np.atleast_2d(t[...] if vector else t[row : row + 1])[0][column]
            for t in (self.found, self.wanted)
        )
        place = f"[{column}]" if vector else f"[{row}, {column}]"
        text = f"{self.name}{place} is {a:.9g}, wanted {b:.9g}"
        if bit := self._bit(row, column):
            text += f": {bit}"
        return text + (f"; {unequal} numbers differ" if unequal > 1 else "")

    def _bit(self, row: int, column: int) -> str:
        """The only bit in which the number, or its block, differs; "" if several bits differ."""
        if self.found.column_order is not None or self.wanted.column_order is not None:
            return ""
        formats = self.found.format, self.wanted.format
        raw = [np.atleast_2d(_row(t, row))[0] for t in (self.found, self.wanted)]
        if formats[0] != formats[1]:
            raw = [
                np.ascontiguousarray(f.dequantize(r[None])[0]).view(np.uint8)
                for f, r in zip(formats, raw, strict=True)
            ]
            first, width = 4 * column, 4
        else:
            first, width = column // formats[0].block * formats[0].block_bytes, formats[0].block_bytes
        changed = np.unpackbits(np.bitwise_xor(*(r[first : first + width] for r in raw)), bitorder="little")
        if changed.sum() != 1:
            return ""
        bit = int(changed.argmax())
        if width <= 4:
            sign = ", the sign," if bit == 8 * width - 1 else ""
            return f"bit {bit}{sign} of its {8 * width} is flipped"
        return f"bit {bit % 8} of byte {bit // 8} of its block is flipped"

    def _order(self) -> str | None:
        """The fault if rows of wq or wk are right and only their order is wrong, else None."""
        kind = self.name.split(".")[-2]
        if kind not in ("wq", "wk"):
            return None
        for which, fault, q, k in orders(self.args):
            rows = q if kind == "wq" else k
            if which == kind and rows is not None:
                found, order = self.found, self.found.row_order
                put = found.with_row_order(rows if order is None else order[rows])
                if self._measure(put, self.wanted)[2] < self.rounding:
                    return f"the rows {fault}"
        found, first = (
            t / np.linalg.norm(t, axis=1, keepdims=True) for t in (self.found[:], self.wanted[:SKETCH])
        )
        return "the rows are in another order" if (first @ found.T).max(axis=1).min() > SAME else None

    def _other(self) -> str | None:
        """The fault if it is another weight of the reference, else None."""
        if len(self.found.shape) == 1:
            return None
        rows = slice(0, SKETCH)
        mine = self.found[rows].ravel()
        for name, other in self.wanted_weights.items():
            if other.shape == self.found.shape and name != self.name:
                theirs = other.realize()[rows].ravel()
                with np.errstate(all="ignore"):
                    same = mine @ theirs > SAME * math.sqrt((mine @ mine) * (theirs @ theirs)) > 0
                if (
                    same
                    and {_kind(name), _kind(self.name)} == {"w_gate", "w_up"}
                    and _generic(name, self.name) == _kind(name)
                ):
                    return "exchanged with each other (w1 and w3)"
                if same:
                    return f"the reference has these weights as {_generic(name, self.name)}"
        return None


def _kind(name: str) -> str:
    return name.split(".")[-2]


def _generic(name: str, other: str) -> str:
    """The name of a weight, without its layer if both are of one layer."""
    a, b = name.split("."), other.split(".")
    return a[-2] if a[:2] == b[:2] else name


def _scale(b: np.ndarray, block: int) -> np.ndarray:
    """The size that a number's rounding error grows with.

    In a block format it is the largest number of the block, else the number itself or its row's mean.
    """
    if block == 1:
        return np.maximum(np.abs(b), np.sqrt(np.mean(b * b, axis=1, keepdims=True)))
    return np.repeat(np.abs(b).reshape(len(b), -1, block).max(axis=-1), block, axis=-1)


def _row(tensor: StoredTensor, row: int) -> np.ndarray:
    return tensor.data if len(tensor.shape) == 1 else tensor.stored_rows(row)


def _parts(tensor: StoredTensor) -> Iterator[slice]:
    if len(tensor.shape) == 1:
        yield slice(None)
        return
    step = max(1, AT_ONCE // tensor.shape[1])
    for begin in range(0, len(tensor), step):
        yield slice(begin, min(begin + step, len(tensor)))


def _faults(differences: list[Difference], opened: Checkpoint) -> Iterator[str]:
    """A line for each fault, with all weights that have it; or for a whole file of another model."""
    wrong = [d for d in differences if d.wrong]
    holders = opened.holders()
    for path in dict.fromkeys(holders.values()):
        held = [d for d in differences if holders.get(d.name) == path]
        matrices = [d for d in held if "norm" not in d.name]  # norms of different models are alike
        strange = all(d.what == "not the weights of this model" for d in matrices)
        if matrices and strange and len(held) < len(differences):
            yield f"{path.name} belongs to another model: {names([d.name for d in held])}"
            wrong = [d for d in wrong if d not in held]
    for what in dict.fromkeys(d.what for d in wrong):
        group = [d for d in wrong if d.what == what]
        if group[0].detail:
            yield from (d.detail if d.what == "damaged" else f"{d.name}: {d.what}, {d.detail}" for d in group)
        else:
            yield f"{names([d.name for d in group])}: {what}"


def _fine(differences: list[Difference], found: Weights, wanted: Weights) -> Iterator[str]:
    equal = [d for d in differences if d.what == "equal"]
    if equal:
        yield f"{len(equal)} of {len(differences)} weights are equal"
    rounded = [d for d in differences if d.what == "rounding"]
    formats = [(found[d.name].format.name, wanted[d.name].format.name) for d in rounded]
    for pair in dict.fromkeys(formats):
        errors = [d.error for d, its in zip(rounded, formats, strict=True) if its == pair]
        size = f"relative error {min(errors):.1e} to {max(errors):.1e}"
        yield f"{len(errors)} weights differ by rounding: {pair[0]} against {pair[1]}, {size}"


def names(weights: list[str]) -> str:
    """Names of weights as a short text: those of many layers are joined."""
    layers: dict[str, list[int]] = {}
    for name in weights:
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            layers.setdefault(rest.removesuffix(".weight"), []).append(int(layer))
    out = [name for name in weights if not name.startswith("layers.")]
    for run, kinds in groupby(sorted(layers, key=layers.__getitem__), key=lambda kind: layers[kind]):
        kinds_here = list(kinds)
        which = "all weights" if len(kinds_here) == 9 else ", ".join(kinds_here)
        out.append(f"{which} of {_numbers(run)}")
    return "; ".join(out)


def _numbers(layers: list[int]) -> str:
    first, last = layers[0], layers[-1]
    if first == last:
        return f"layer {first}"
    whole = layers == [*range(first, last + 1)]
    return f"layers {first}..{last}" if whole else f"layers {', '.join(map(str, layers))}"

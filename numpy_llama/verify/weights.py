"""Faults found in the weights alone: numbers that no trained model has, and layers of two models.

All layers read and write one residual stream. A matrix therefore weighs the channels of the stream much like
the same matrix of the next layer does. Matrices of two models do not. Measured is the correlation of the most
similar of the seven matrices: 0.79 and more within trained models, 0.1 across two.
"""

from itertools import pairwise

import numpy as np

from ..backend.formats import StoredTensor

ALIKE = 0.4  # the correlation of two layers' channel weights; below it they are of two models
LONELY = 8.0  # the largest norm weight divided by the second largest; trained models reach 2
HUGE = 1000.0  # the length of a matrix's longest row divided by that of its median row
HOLE = 0.25  # the share of a matrix's rows that are zero; a file that is incomplete has more
# A channel's norm weight hardly changes from layer to layer, if it is divided by the median of its vector.
# Take a channel whose weights in the layers before and after are above LEAST, and within a factor of
# AS_LARGE. Trained models never have a weight between them that is as large but negative, or smaller than
# TINY times as large.
LEAST, TINY, AS_LARGE = 0.03, 2.0**-12, 2.0
ONES = 64  # the shortest vector in which one number can be called odd
BITS = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}


class Census:
    """Checks each weight (`look`), and keeps the faults in `findings`."""

    def __init__(self, weights: dict[str, StoredTensor]):
        self.stored, self.findings = weights, list[str]()
        self.norms: dict[str, dict[int | None, np.ndarray]] = {}
        self.profiles: dict[str, dict[int, np.ndarray]] = {}

    def look(self, layer: int | None, name: str, weight: np.ndarray) -> None:
        full = f"{name}.weight" if layer is None else f"layers.{layer}.{name}.weight"
        finite = np.isfinite(weight)
        if not finite.all():
            at = tuple(map(int, np.argwhere(~finite)[0]))
            where = f"{full}{list(at)}"
            number = f"{(~finite).sum()} of its {weight.size:,} numbers are not finite"
            self.findings.append(f"{where} is {weight[at]}{bit_at(self.stored[full], at)}; {number}")
        elif weight.ndim == 1:
            self.norms.setdefault(name, {})[layer] = weight
        elif layer is not None:
            self._matrix(layer, name, full, weight)

    def _matrix(self, layer: int, name: str, full: str, weight: np.ndarray) -> None:
        with np.errstate(over="ignore"):
            squares = np.square(weight)
            rows, columns = np.sqrt(squares.sum(axis=1)), np.sqrt(squares.sum(axis=0))
        if (zeros := int((rows == 0).sum())) > HOLE * len(rows):
            self.findings.append(f"{full}: {zeros} of {len(rows)} rows are zero, a hole in the file")
        elif rows.max() > HUGE * np.median(rows):
            most = int(rows.argmax())
            what = f"is {rows[most] / np.median(rows):.3g} times as long as its median row"
            self.findings.append(f"{full}: row {most} {what}")
        writes = name.endswith(("wo", "w_down"))
        self.profiles.setdefault(name, {})[layer] = np.log(np.maximum(rows if writes else columns, 1e-30))

    def end(self) -> None:
        """Compare each norm with those of the layers before and after, when `look` has had all of them."""
        for name, vectors in self.norms.items():
            for layer, vector in vectors.items():
                full = f"{name}.weight" if layer is None else f"layers.{layer}.{name}.weight"
                neighbours = () if layer is None else (layer - 1, layer + 1)
                near = [vectors[i] for i in neighbours if i in vectors]
                with np.errstate(all="ignore"):  # a damaged number may overflow
                    found = odd_one(vector, near) or odd_bits(vector)
                if found is not None:
                    at, why = found
                    what = f"{full}[{at}] is {vector[at]:.9g}, {why}"
                    self.findings.append(what + bit_at(self.stored[full], (at,), np.median(np.abs(vector))))

    def breaks(self) -> list[int]:
        """The layers that are not of the same model as the layer before; [] if most of them are unlike it."""
        kinds = list(self.profiles.values())
        n = max((max(kind) for kind in kinds), default=0) + 1
        alike = [max(_alike(kind.get(i - 1), kind.get(i)) for kind in kinds) for i in range(1, n)]
        found = [i for i, likeness in enumerate(alike, 1) if likeness < ALIKE]
        return found if len(found) <= len(alike) // 2 else []  # layers of random weights are all unlike

    def runs(self) -> list[range]:
        """The runs of layers between two breaks, without the longest: the others may be of another model."""
        if not (found := self.breaks()):
            return []
        n = max(max(kind) for kind in self.profiles.values()) + 1
        ends = [0, *found, n]
        runs = [range(a, b) for a, b in pairwise(ends)]
        return [run for run in runs if run is not max(runs, key=len)]


def _alike(a: np.ndarray | None, b: np.ndarray | None) -> float:
    if a is None or b is None or not a.std() or not b.std():
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def odd_one(vector: np.ndarray, near: list[np.ndarray]) -> tuple[int, str] | None:
    """-> the place of a norm weight that no training makes, and why. `near`: the layers before and after."""
    if len(vector) < ONES:
        return None
    sizes = np.abs(vector)
    median, at = np.median(sizes), int(sizes.argmax())
    second = np.partition(sizes, -2)[-2]
    if sizes[at] > LONELY * second:
        return at, f"the largest of the others {second:.6g}"
    if len(near) < 2 or not median:
        return None
    before, after = (x / np.median(np.abs(x)) for x in near)
    lower, higher = np.minimum(before, after), np.maximum(before, after)
    agree = (lower > LEAST) & (higher < AS_LARGE * lower)
    size = sizes / median
    alike = agree & (size < AS_LARGE * higher) & (size > lower / AS_LARGE)
    for odd, why in [
        (alike & (vector < 0), "above zero and as large in the layers before and after"),
        (agree & (size < TINY * lower), "far larger in the layers before and after"),
    ]:
        if odd.sum() == 1:
            return int(odd.argmax()), why
    return None


def odd_bits(vector: np.ndarray) -> tuple[int, str] | None:
    """-> the only number that is no bfloat16 (or float16) in a float32 vector of them, and why."""
    bits = np.ascontiguousarray(vector, np.float32).view(np.uint32)
    for name, zeros in (("bfloat16", 16), ("float16", 13)):
        odd = np.flatnonzero(bits & ((1 << zeros) - 1))
        if len(odd) == 1 and len(vector) > ONES:
            low = int(bits[odd[0]]) & ((1 << zeros) - 1)
            bit = f": bit {low.bit_length() - 1} is flipped" if low.bit_count() == 1 else ""
            return int(odd[0]), f"all others of its vector are {name} numbers{bit}"
        if not len(odd):
            return None
    return None


def bit_at(stored: StoredTensor, at: tuple[int, ...], usual: float = 1.0) -> str:
    """The bit that makes a number of usual size when it is flipped back; "" if there is none."""
    ordered = stored.row_order is not None or stored.column_order is not None
    if stored.format.name not in BITS or (len(at) > 1 and ordered):
        return ""
    row = stored.data[at[0]] if len(at) > 1 else stored.data
    one = row.reshape(-1).view(BITS[stored.format.name])[at[-1]]
    width = 8 * one.itemsize
    flipped = one ^ (np.ones(width, one.dtype) << np.arange(width, dtype=one.dtype))
    with np.errstate(all="ignore"):
        values = stored.format.dequantize(flipped[:, None].view(np.uint8)).reshape(-1)
    found = stored.format.dequantize(one.reshape(1, 1).view(np.uint8)).reshape(())
    if abs(found) < 64 * usual and abs(found) > usual / 64:  # neither huge nor tiny: its sign is wrong
        return f": bit {width - 1}, the sign, is flipped" if found < 0 else ""
    with np.errstate(all="ignore"):
        away = np.abs(np.log2(np.abs(values / usual)))
    best = int(np.where(np.isfinite(away), away, np.inf).argmin())
    return f": with bit {best} flipped it would be {values[best]:.6g}" if away[best] < 6 else ""

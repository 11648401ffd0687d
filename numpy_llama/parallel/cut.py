"""Which rows of each weight a rank has. Each output is one sum on one rank, so the sums stay what they are.

    wq                       rows of whole query heads, beside their key/value heads
    wk wv                    rows of whole key/value heads; with more ranks, several ranks have the same
    w_gate w_up              rows, of F
    wo w_down                rows, of D: they read gathered activations
    output                   rows, of V
    tok_embeddings, norms    all of them; a pass reads single rows of tok_embeddings

Rows are cut between groups of UNIT, so a packed weight is cut in place, and C's swiglu takes whole registers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ..backend.formats import PACKED_ROWS, PackedTensor, StoredTensor, unpack_rows
from ..checkpoint.memory import MemoryPlan, memory_plan
from ..config import Array, ModelArgs
from ..errors import ParameterError, UnsupportedError, escape
from ..lora import LowRank
from ..window import PREFILL_CHUNK

UNIT = 2 * PACKED_ROWS
Cuts = tuple[slice, ...]  # the part of each rank


def cut(n: int, shares: Sequence[float], unit: int = 1, least: int = 0) -> Cuts:
    """0 .. n cut in proportion to the shares, between units. Each part has at least `least` units."""
    units, end, ends = -(-n // unit), 0, [0]
    sums = [*accumulate(shares)]
    for i, before in enumerate(sums):
        wanted = round(units * before / sums[-1])
        end = min(max(wanted, end + least), units - least * (len(shares) - 1 - i))
        ends.append(min(end * unit, n))
    return tuple(slice(begin, end) for begin, end in pairwise(ends))


def widths(cuts: Cuts) -> list[int]:
    return [part.stop - part.start for part in cuts]


@dataclass(frozen=True)
class Plan:
    """How a model is cut for some ranks."""

    args: ModelArgs
    heads: Cuts
    kv_heads: Cuts
    dim: Cuts
    hidden_dim: Cuts
    vocab: Cuts

    @classmethod
    def of(cls, args: ModelArgs, shares: Sequence[float]) -> "Plan":
        """UnsupportedError if there are more ranks than query heads."""
        if len(shares) > args.n_heads:
            raise UnsupportedError(
                f"{len(shares)} ranks, but the model has {args.n_heads} query heads: each rank needs one, so "
                f"start at most {args.n_heads}"
            )
        rows = (cut(n, shares, UNIT) for n in (args.dim, args.hidden_dim, args.vocab_size))
        return cls(args, *_heads(args, shares), *rows)

    def local_args(self, rank: int) -> ModelArgs:
        """The arguments of a model with this rank's heads."""
        n_heads, n_kv_heads = (widths(cuts)[rank] for cuts in (self.heads, self.kv_heads))
        return replace(self.args, n_heads=n_heads, n_kv_heads=n_kv_heads)

    def weights(self, weights: Mapping[str, StoredTensor], rank: int) -> dict[str, StoredTensor]:
        """This rank's rows of every weight."""
        return {
            name: w if (rows := self.rows(name, rank)) is None else rows_of(w, rows)
            for name, w in weights.items()
        }

    def memory(
        self,
        weights: Mapping[str, StoredTensor],
        rank: int,
        backend: str,
        dtype: DTypeLike | None = None,
        exact: bool = False,
        cache_dtype: str | None = None,
    ) -> MemoryPlan:
        """The memory plan of this rank, which has these weights.

        Beside those of its rows it has whole activations: what wo and w_down multiply, its quantized copy,
        and what the ranks exchange.
        """
        args = replace(self.local_args(rank), hidden_dim=max(1, widths(self.hidden_dim)[rank]))
        plan = memory_plan(args, weights, backend, dtype, exact, cache_dtype)
        if len(self.heads) == 1:
            return plan
        D, wide = args.dim, max(self.args.n_heads * args.head_dim, self.args.hidden_dim)
        whole = PREFILL_CHUNK * (3 * wide + 3 * D) * np.dtype(dtype or np.float32).itemsize
        return replace(plan, scratch=plan.scratch + whole)

    def updates(self, updates: Mapping[str, LowRank], rank: int) -> dict[str, LowRank]:
        """The updates of this rank's rows: all of A, and those rows of B."""
        return {
            name: one if (rows := self.rows(name, rank)) is None else one._replace(b=one.b[rows].copy())
            for name, one in updates.items()
        }

    def widths(self, name: str) -> list[int]:
        """The rows of a weight that each rank contributes: of a key/value head only the first that has it."""
        found, end = list[int](), 0
        for rank in range(len(self.heads)):
            rows = self.rows(name, rank) or slice(0, 0)
            found.append(rows.stop - max(rows.start, end) if rows.stop > end else 0)
            end = max(end, rows.stop)
        return found

    def rows(self, name: str, rank: int) -> slice | None:
        """The rows of a weight that this rank has; None: all of them."""
        q, kv = (_rows_of_heads(cuts[rank], self.args.head_dim) for cuts in (self.heads, self.kv_heads))
        rows = {"wq": q, "wk": kv, "wv": kv, "wo": self.dim[rank], "w_down": self.dim[rank]}
        rows |= {"w_gate": self.hidden_dim[rank], "w_up": self.hidden_dim[rank], "output": self.vocab[rank]}
        return rows.get(name.removesuffix(".weight").rpartition(".")[2])


def _heads(args: ModelArgs, shares: Sequence[float]) -> tuple[Cuts, Cuts]:
    """Query heads and key/value heads of each rank, at least one of each."""
    K, n_rep = args.n_kv_heads, args.n_heads // args.n_kv_heads
    if len(shares) <= K:
        kv_heads = cut(K, shares, least=1)
        return tuple(slice(part.start * n_rep, part.stop * n_rep) for part in kv_heads), kv_heads
    heads, kv = list[slice](), list[slice]()
    for head, group in enumerate(cut(len(shares), [1] * K)):  # these ranks share a key/value head
        for part in cut(n_rep, shares[group], least=1):
            heads.append(slice(head * n_rep + part.start, head * n_rep + part.stop))
            kv.append(slice(head, head + 1))
    return tuple(heads), tuple(kv)


def _rows_of_heads(heads: slice, head_dim: int) -> slice:
    return slice(heads.start * head_dim, heads.stop * head_dim)


def rows_of(tensor: StoredTensor, rows: slice) -> StoredTensor:
    """These rows of a weight, in the model's order. A tensor in place is not copied if it need not be.

    Rows in another order, such as Hugging Face's, change their places within a head. So whole heads are the
    same rows in both orders.
    """
    order, numbers = tensor.row_order, np.arange(rows.start, rows.stop)
    shape, columns = (len(numbers), *tensor.shape[1:]), tensor.column_order
    if order is not None:
        order = order[rows] - rows.start
        if not np.array_equal(np.sort(order), np.arange(len(order))):
            made = partial(_picked, tensor.stored_rows, numbers)
            return StoredTensor(tensor.format, shape, made, None, columns)
    if not isinstance(tensor, PackedTensor):
        return tensor.part(rows, order)
    packed, at_end = tensor.packed, rows.stop == len(tensor)
    if rows.start % PACKED_ROWS == 0 and (at_end or rows.stop % PACKED_ROWS == 0):
        groups = packed[rows.start : len(packed) if at_end else rows.stop]
        return PackedTensor(tensor.format, shape, groups, order, columns)
    unpacked = partial(_picked, partial(unpack_rows, packed, tensor.format), numbers)
    return StoredTensor(tensor.format, shape, unpacked, order, columns)


def _picked(make: Callable[[Array], Array], numbers: Array, rows: slice) -> Array:
    return make(numbers[rows])


def checked_shares(shares: Any, ranks: int) -> list[float]:
    """A share of the weights for each rank; ParameterError unless each is a number above 0."""
    if shares is None:
        return [1.0] * ranks
    numbers = isinstance(shares, list | tuple) and all(type(one) in (int, float) for one in shares)
    if not numbers or len(shares) != ranks or not all(0 < one < 1e9 for one in shares):
        found = escape(shares, 60)
        raise ParameterError(f"shares are {found}, they must be {ranks} numbers above 0, one for each rank")
    return [float(one) for one in shares]

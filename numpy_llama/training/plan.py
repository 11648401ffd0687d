"""What a step costs, computed before it runs: memory, which limits a micro-batch, and operations.

    weights       as stored if they are frozen, float32 if they learn
    learning      12 bytes for each number that learns: its gradient, m and v; on several ranks a part of
                  the sum of gradients too
    activations   for each token and layer x, q, k, v, out, lse, h, gate, up (backward.Saved); with
                  checkpointing x alone, and the others for one layer
    scratch       logits of one chunk (NumPy keeps three arrays of CHUNK rows, C one array of 2 CHUNK rows),
                  temporary arrays of one layer, the interpreter

A row is computed whole, in training and in validation. So the longest of them is the smallest micro-batch.

A multiplication and an addition are two operations. Each matrix takes them once forward, once for dx and, if
it learns, once for dW. Attention has two products forward and five backward, of the visible positions only.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..backward import CHUNK
from ..checkpoint.memory import BYTES_A_TOKEN, PYTHON, gib
from ..config import ModelArgs
from ..errors import ResourceLimitError
from .batch import inputs
from .examples import Row
from .state import State

SHARE = 0.8  # of the available memory that a plan may use: other programs need some too
MOST_TOKENS = 2048  # of a micro-batch, unless one row has more: a larger one takes more memory


@dataclass(frozen=True)
class TrainingPlan:
    """All numbers but the last three are bytes, of each rank."""

    weights: int
    learning: int
    scratch: int
    activations: int  # of the largest micro-batch, or of a longer row
    most_tokens: int  # of a micro-batch
    checkpointing: bool
    n_ranks: int = 1  # that the micro-batches are cut for

    @property
    def peak(self) -> int:
        return self.weights + self.learning + self.scratch + self.activations

    def __str__(self) -> str:
        how = ", each block computed twice" if self.checkpointing else ""
        return (
            f"{gib(self.peak)}: weights {gib(self.weights)}, gradients and moments {gib(self.learning)}, "
            f"activations {gib(self.activations)} for {self.most_tokens} tokens at once{how}, "
            f"scratch {gib(self.scratch)}"
        )


def training_plan(
    args: ModelArgs,
    weights: int,
    learned: int,
    longest: int,
    step_tokens: int,
    available: int,
    source: object,
    state: State | None = None,
    n_ranks: int = 1,
) -> TrainingPlan:
    """The plan with the largest micro-batch that fits; ResourceLimitError, with the numbers, if none does.

    weights: their bytes. learned: how many numbers learn. longest, step_tokens: see `largest`. A resumed run
    keeps the micro-batches that its `state` names, because others have other bits.
    """
    matrix = args.dim * max(args.hidden_dim, args.n_heads * args.head_dim)  # numbers of the largest
    scratch = PYTHON + BYTES_A_TOKEN * args.vocab_size + 4 * (3 * CHUNK * args.vocab_size + 2 * matrix)
    learning = 12 * learned + (4 * learned // n_ranks if n_ranks > 1 else 0)
    fixed, room = weights + learning + scratch, int(SHARE * available)

    def plan(most: int, checkpointing: bool, cut_for: int = n_ranks) -> TrainingPlan:
        activations = max(most, longest) * token_bytes(args, checkpointing)
        return TrainingPlan(weights, learning, scratch, activations, most, checkpointing, cut_for)

    if state is not None:
        most, cut_for = (int(state.options.get(name) or 1) for name in ("most_tokens", "n_ranks"))
        begun = plan(most, bool(state.options.get("checkpointing")), cut_for)
        if begun.peak > available:
            raise ResourceLimitError(
                f"{state.path}: the run was begun with more memory, it takes {begun}; {gib(available)} are "
                "available: end other programs, or begin another run with another --out"
            )
        return begun
    for checkpointing in (False, True):
        most = max(longest, min(step_tokens, MOST_TOKENS))
        most = min(most, max(0, room - fixed) // token_bytes(args, checkpointing))
        if most >= longest:
            return plan(most, checkpointing)
    activations = gib(longest * token_bytes(args, True))
    raise ResourceLimitError(
        f"training {source} takes {gib(plan(longest, True).peak)}: weights {gib(weights)}, gradients and "
        f"moments {gib(learning)}, activations {activations} for a row of {longest} tokens, scratch "
        f"{gib(scratch)}; {gib(available)} are available, of which {SHARE:.0%} may be used; give a smaller "
        "--seq-len, a smaller model, or --method lora, which keeps the weights as they are stored"
    )


def largest(train: Sequence[Row], held_out: Iterable[Row], batch_size: int) -> tuple[int, int]:
    """The inputs of the longest row, which may be one of validation or test, and of the largest step."""
    lengths = sorted((inputs([row]) for row in train), reverse=True)
    return max([lengths[0], *(inputs([row]) for row in held_out)]), sum(lengths[:batch_size])


def token_bytes(args: ModelArgs, checkpointing: bool) -> int:
    """The activations of a token in all layers, and the temporary arrays of one."""
    D, HDh, KDh = args.dim, args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    saved = 4 * (2 * D + 2 * HDh + 2 * KDh + 2 * args.hidden_dim + args.n_heads)  # of a layer
    temporary = 4 * (6 * D + 4 * HDh + 4 * KDh + 6 * args.hidden_dim)
    return temporary + (4 * D * args.n_layers + saved if checkpointing else saved * args.n_layers)


@dataclass(frozen=True)
class Work:
    """The operations of a step on this model. DPO computes the reference too, and each head once more."""

    layers: int  # weights of all matrices in the layers
    head: int
    heads: int  # n_layers * n_heads * head_dim
    all_learns: bool
    dpo: bool = False

    @classmethod
    def of(cls, args: ModelArgs, all_learns: bool, dpo: bool = False) -> "Work":
        D, HDh, KDh = args.dim, args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        layer = 2 * D * HDh + 2 * D * KDh + 3 * D * args.hidden_dim
        return cls(args.n_layers * layer, D * args.vocab_size, args.n_layers * HDh, all_learns, dpo)

    def operations(self, rows: Sequence[Row]) -> int:
        examples = [example for row in rows for example in row]
        tokens, trained = sum(map(len, examples)), sum(int(one.trained.sum()) for one in examples)
        pairs = sum(len(one) * (len(one) + 1) // 2 for one in examples)  # of a query and a visible key
        times, products = (3 if self.all_learns else 2) + self.dpo, 7 + 2 * self.dpo
        matrices = times * self.layers * tokens + (times + self.dpo) * self.head * trained
        return 2 * matrices + 2 * products * self.heads * pairs

"""PyTorch and transformers on whole models, in a process of their own. In one process with the C kernels, two
OpenMP runtimes would share the CPUs, and each would wait for the other's threads.

    with Oracle() as oracle:
        of_torch, of_transformers = oracle.both(args, weights, tokens)
"""

import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoint.names import tensor_names
from ..config import Array, ModelArgs
from ..model import Weights
from ..rope import (
    DynamicScaling,
    ExplicitScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    YarnScaling,
)

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


class Oracle:
    def __enter__(self) -> "Oracle":
        self.process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        return self

    def __exit__(self, *error: object) -> None:
        self.process.shutdown(cancel_futures=True)

    def both(self, args: ModelArgs, weights: Weights, tokens: Array) -> list[Array]:
        """The logits of torch_llama.py, and those of LlamaForCausalLM with its eager attention."""
        return self.process.submit(_both, args, weights, tokens).result()


def _both(args: ModelArgs, weights: Weights, tokens: Array) -> list[Array]:
    try:
        return [_torch(args, weights, tokens), _transformers(args, weights, tokens)]
    except Exception as error:  # some errors of transformers cannot be pickled
        raise RuntimeError(f"{type(error).__name__}: {error}") from None


def _torch(args: ModelArgs, weights: Weights, tokens: Array) -> Array:
    from .torch_ops import Transformer

    return Transformer(args, weights)(tokens)


def half_split(weight: Array, n_heads: int) -> Array:
    """Rows of wq or wk in Hugging Face's order: the two of a pair half a head apart, not side by side."""
    OUT, IN = weight.shape
    return weight.reshape(n_heads, OUT // n_heads // 2, 2, IN).swapaxes(1, 2).reshape(OUT, IN)


def _transformers(args: ModelArgs, weights: Weights, tokens: Array) -> Array:
    import torch

    model = transformers_model(args, weights)
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def transformers_model(args: ModelArgs, weights: Weights) -> "LlamaForCausalLM":
    """LlamaForCausalLM holding these weights; the head is tied if the embedding is the output matrix."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    more: dict[str, Any] = {"rope_parameters": rope_parameters(args), "attn_implementation": "eager"}
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
        tie_word_embeddings=weights["output.weight"] is weights["tok_embeddings.weight"],
        **more,
    )
    state = {}
    for ours, theirs in tensor_names(args, "hf").items():
        heads = {"wq": args.n_heads, "wk": args.n_kv_heads}.get(ours.split(".")[-2])
        w = weights[ours] if heads is None else half_split(weights[ours], heads)
        state[theirs] = torch.from_numpy(np.array(w))
    with warnings.catch_warnings():  # transformers warns about settings that we set on purpose
        warnings.simplefilter("ignore")
        model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state)
    return model


def rope_parameters(args: ModelArgs) -> dict[str, Any]:
    """This RoPE as transformers has it, for all texts that fit into the context.

    transformers chooses by the length of each text where we choose by the size of the context: it is given
    what we choose. "longrope" with two equal lists is what explicit divisors are there.
    """
    theta, s = args.rope_theta, args.rope_scaling
    if s is None:
        return {"rope_type": "default", "rope_theta": theta}
    if isinstance(s, DynamicScaling):  # in any context that is a larger theta, from pair 0 to the last
        longer = 1 + s.factor * max(args.max_seq_len / s.original_max_seq_len - 1, 0)
        theta *= longer ** (args.head_dim / (args.head_dim - 2)) if args.head_dim > 2 else 1
        return {"rope_type": "default", "rope_theta": theta}
    rope = {"rope_type": s.type, "rope_theta": theta}
    if isinstance(s, LinearScaling):
        return rope | {"factor": s.factor}
    if isinstance(s, ExplicitScaling):
        lists = {"short_factor": list(s.factors), "long_factor": list(s.factors)}
        more = {"rope_type": "longrope", "original_max_position_embeddings": args.max_seq_len, "factor": 1.0}
        return rope | lists | more | {"attention_factor": s.length_factor}
    assert isinstance(s, Llama3Scaling | YarnScaling | LongRopeScaling), s
    rope["original_max_position_embeddings"] = s.original_max_seq_len
    if isinstance(s, Llama3Scaling):
        ramp = {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
        return rope | ramp | {"factor": s.factor}
    rope["attention_factor"] = s.length_factor
    if isinstance(s, YarnScaling):
        ramp = {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate}
        return rope | ramp | {"factor": s.factor}
    chosen = list(s.long_factor if args.max_seq_len > s.original_max_seq_len else s.short_factor)
    return rope | {"short_factor": chosen, "long_factor": chosen, "factor": 1.0}

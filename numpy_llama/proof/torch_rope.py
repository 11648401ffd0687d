"""RoPE's table in PyTorch, to check functional.py and rope.py. It shares no formula with them.

It computes one frequency at a time, as in the papers. The laws and `verify` use it.
"""

import math

import torch

from ..config import ModelArgs, RopeScaling
from ..rope import (
    DynamicScaling,
    ExplicitScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    YarnScaling,
)


def rotary_table(args: ModelArgs, T: int, dtype: torch.dtype) -> torch.Tensor:
    """r e^(i m theta_j) of T positions -> (T, Dh / 2) complex. Angles are in `dtype`, as in Meta's code."""
    freqs = args.rope_theta ** -(torch.arange(0, args.head_dim, 2, dtype=dtype) / args.head_dim)
    length = 1.0
    if args.rope_scaling:
        length = args.rope_scaling.length_factor
        scaled = [scaled_freq(freq, j, args, args.rope_scaling) for j, freq in enumerate(freqs.tolist())]
        freqs = torch.tensor(scaled, dtype=dtype)
    angles = torch.arange(T, dtype=dtype)[:, None] * freqs
    return torch.polar(torch.full_like(angles, length), angles)


def scaled_freq(freq: float, j: int, args: ModelArgs, s: RopeScaling) -> float:
    """The scaled frequency theta_j."""
    wavelen = 2 * math.pi / freq  # positions that a whole turn takes
    if isinstance(s, LinearScaling):
        return freq / s.factor
    if isinstance(s, ExplicitScaling):
        return freq / s.factors[j]
    if isinstance(s, LongRopeScaling):
        return freq / (s.short_factor, s.long_factor)[args.max_seq_len > s.original_max_seq_len][j]
    if isinstance(s, DynamicScaling):  # a larger theta (u/bloc97, u/emozilla 2023)
        D, L = args.head_dim, s.original_max_seq_len
        stretched = s.factor * max(args.max_seq_len, L) / L - (s.factor - 1)
        base: float = args.rope_theta * stretched ** (D / (D - 2)) if D > 2 else 1.0
        return float(base ** (-2 * j / D))
    if isinstance(s, Llama3Scaling):  # by its wavelength (Meta's models/llama3/reference_impl)
        long, short = s.original_max_seq_len / s.low_freq_factor, s.original_max_seq_len / s.high_freq_factor
        if wavelen < short:
            return freq
        if wavelen > long:
            return freq / s.factor
        smooth = (s.original_max_seq_len / wavelen - s.low_freq_factor) / (
            s.high_freq_factor - s.low_freq_factor
        )
        return (1 - smooth) * freq / s.factor + smooth * freq
    assert isinstance(s, YarnScaling), s  # Peng et al. 2023, section 3.2, with its ramp over the pairs
    first, last = (
        args.head_dim
        * math.log(s.original_max_seq_len / (beta * 2 * math.pi))
        / (2 * math.log(args.rope_theta))
        for beta in (s.beta_fast, s.beta_slow)
    )
    if s.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, args.head_dim - 1)
    if j <= first:
        return freq
    if j >= last:
        return freq / s.factor
    ramp = (j - first) / (last - first)
    return freq / s.factor * ramp + freq * (1 - ramp)

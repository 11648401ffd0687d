"""The same model in PyTorch, side by side: SmolLM2's forward pass, step by step in both libraries.

Each step is written twice: ours is on the left of the pair, PyTorch's on the right. Both get the output of
PyTorch's previous step, so the printed difference is that of this one step.

    python examples/side_by_side_with_pytorch.py "The capital of France is"
"""

import sys

import numpy as np
import torch
import torch.nn.functional as TF

import numpy_llama as nl
from numpy_llama import functional as F

text = " ".join(sys.argv[1:]) or "The capital of France is"
llama = nl.load(backend="numpy")
args, model = llama.model.args, llama.model
tokens = np.array([llama.tokenizer.encode(text)])
T = tokens.shape[1]
steps: dict[str, float] = {}


def pair(name: str, ours: np.ndarray, theirs: torch.Tensor) -> torch.Tensor:
    """Remember the largest difference of this step, relative to the largest number; go on with PyTorch's."""
    difference = np.abs(ours - theirs.numpy()).max() / np.abs(theirs.numpy()).max()
    steps[name] = max(steps.get(name, 0.0), float(difference))
    return theirs


def t(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(x))


freqs_cis = F.precompute_freqs_cis(args.head_dim, T, args.rope_theta)
freqs = args.rope_theta ** -(torch.arange(0, args.head_dim, 2, dtype=torch.float32) / args.head_dim)
angles = torch.outer(torch.arange(T, dtype=torch.float32), freqs)
pair("freqs_cis", freqs_cis, torch.polar(torch.ones_like(angles), angles))

h = pair(
    "embedding", F.embedding(tokens, model.tok_embeddings), TF.embedding(t(tokens), t(model.tok_embeddings))
)
for layer in model.layers:
    att, ffn = layer.attention, layer.feed_forward

    w = layer.attention_norm.weight
    x = pair(
        "rms_norm", F.rms_norm(h.numpy(), w, args.norm_eps), TF.rms_norm(h, w.shape, t(w), args.norm_eps)
    )

    w = att.wq.weight
    q = pair("linear", F.linear(x.numpy(), w), TF.linear(x, t(w))).unflatten(-1, (-1, args.head_dim))
    k = TF.linear(x, t(att.wk.weight)).unflatten(-1, (-1, args.head_dim))  # (B, T, K, Dh)
    v = TF.linear(x, t(att.wv.weight)).unflatten(-1, (-1, args.head_dim))

    turn = t(freqs_cis)[None, :, None]
    turned = (torch.view_as_complex(a.unflatten(-1, (-1, 2)).contiguous()) * turn for a in (q, k))
    q_turned, k_turned = (torch.view_as_real(a).flatten(-2) for a in turned)
    q = pair("apply_rotary_emb", F.apply_rotary_emb(q.numpy(), freqs_cis), q_turned)
    k = k_turned

    heads = (a.transpose(1, 2) for a in (q, k, v))  # PyTorch takes the heads before the positions
    out = TF.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)
    out = pair("attention", F.attention(q.numpy(), k.numpy(), v.numpy()), out)
    h = h + TF.linear(out.flatten(-2), t(att.wo.weight))

    x = TF.rms_norm(h, h.shape[-1:], t(layer.ffn_norm.weight), args.norm_eps)
    gate, up = TF.linear(x, t(ffn.w_gate.weight)), TF.linear(x, t(ffn.w_up.weight))
    x = pair("swiglu", F.swiglu(gate.numpy(), up.numpy()), TF.silu(gate) * up)
    h = h + TF.linear(x, t(ffn.w_down.weight))

logits = TF.linear(TF.rms_norm(h, h.shape[-1:], t(model.norm.weight), args.norm_eps), t(model.output.weight))
pair("whole model", model(tokens), logits)

print(f"{'step':<18} largest relative difference")
for name, difference in steps.items():
    print(f"{name:<18} {difference:.1e}")
print("next token:", repr(llama.tokenizer.decode([int(logits[0, -1].argmax())])))
assert max(steps.values()) < 1e-4

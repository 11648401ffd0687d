"""LLaMA in PyTorch, written from the papers with PyTorch's own functions.

It shares only the hyperparameters with the model. It has no cache: each call computes all tokens. Its
parameters have the names of our weights, so `load_state_dict` checks the names too.
"""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu

from ..config import ModelArgs
from .torch_rope import rotary_table


def rotate(x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
    """Pairs (x_2j, x_2j+1) as complex numbers, turned: (B, T, H, Dh), (T, Dh / 2) -> (B, T, H, Dh)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * freqs_cis[..., None, :]).flatten(-2)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.head_dim, self.window = args.head_dim, args.sliding_window
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(self, x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
        q = rotate(self.wq(x).unflatten(-1, (-1, self.head_dim)), freqs_cis)  # (B, T, H, Dh)
        k = rotate(self.wk(x).unflatten(-1, (-1, self.head_dim)), freqs_cis)  # (B, T, K, Dh)
        v = self.wv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # heads first
        visible = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        if self.window is not None:
            visible = visible.triu(1 - self.window)
        out = scaled_dot_product_attention(q, k, v, visible, enable_gqa=True)
        return self.wo(out.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w_gate = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.w_up = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.w_down = nn.Linear(args.hidden_dim, args.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w_down(silu(self.w_gate(x)) * self.w_up(x))


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.attention = Attention(args)
        self.ffn_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.feed_forward = FeedForward(args)

    def forward(self, x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
        h = x + self.attention(self.attention_norm(x), freqs_cis)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    def __init__(self, args: ModelArgs, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layers))
        self.norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.to(dtype)

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T, V)."""
        return self.with_graph(tokens)

    def with_graph(self, tokens: torch.Tensor) -> torch.Tensor:
        """The same logits, for autograd."""
        h = self.tok_embeddings(tokens)
        freqs_cis = rotary_table(self.args, tokens.shape[1], h.dtype)
        for layer in self.layers:
            h = layer(h, freqs_cis)
        return self.output(self.norm(h))

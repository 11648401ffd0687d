"""The smallest forward pass: a LLaMA with random weights, in plain NumPy."""

import numpy as np

from numpy_llama import ModelArgs, Transformer
from numpy_llama.checkpoint.names import expected_shape, tensor_names

args = ModelArgs(
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    hidden_dim=160,
    vocab_size=100,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_seq_len=128,
)
rng = np.random.default_rng(0)
weights = {
    name: rng.normal(0, 0.1, expected_shape(name, args)).astype(np.float32)
    for name in tensor_names(args, "ours")
}
model = Transformer(args, weights)

# Prefill: all positions at once. (B, T) ids -> (B, T, V) logits.
tokens = np.array([[3, 14, 15, 92, 65]])
cache = model.new_cache(batch=1, max_seq_len=16)
logits = model(tokens, start_pos=0, cache=cache)
print("logits", logits.shape, logits.dtype)

# Decode: one new position a call, the same function.
for start_pos in range(5, 10):
    next_token = logits[:, -1:].argmax(axis=-1)
    print("position", start_pos, "token", next_token.item())
    logits = model(next_token, start_pos, cache)

"""One attention head by hand: four words look at each other, and the result is what `attention` gives."""

import numpy as np

from numpy_llama import functional as F

np.set_printoptions(precision=2, suppress=True)
rng = np.random.default_rng(0)
T, Dh = 4, 8  # four positions, one head of eight numbers
q, k, v = rng.normal(size=(3, T, Dh)).astype(np.float32)

# RoPE: each position turns its queries and keys by its own angles. A product depends on the distance alone.
freqs_cis = F.precompute_freqs_cis(Dh, T, rope_theta=10000.0)
q = F.apply_rotary_emb(q[None, :, None], freqs_cis)[0, :, 0]
k = F.apply_rotary_emb(k[None, :, None], freqs_cis)[0, :, 0]

scores = q @ k.T / np.sqrt(Dh)
print("how well each query (row) fits each key (column):", scores, sep="\n")

scores = scores + F.causal_mask(T, T)
print("the future is closed:", scores, sep="\n")

weights = F.softmax(scores)
print("as shares of 1 in each row:", weights, sep="\n")

out = weights @ v
print("each position's mixture of the values:", out, sep="\n")

same = F.attention(q[None, :, None], k[None, :, None], v[None, :, None])[0, :, 0]
print("the largest difference from attention(q, k, v):", np.abs(out - same).max())
assert np.allclose(out, same, atol=1e-6)

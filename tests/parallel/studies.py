"""Look into a model and exchange its parts, alone or on ranks, and write all that is seen.

python studies.py MODEL OUT

OUT is a file of NumPy. Everything here runs in one process, so it must run on ranks.
"""

import copy
import sys

import numpy as np

import numpy_llama as nl
from numpy_llama import functional as F
from numpy_llama.inspect.tracing import PLACES, attention_weights, lens


class OwnAttention:
    """Attention as a student may write it, with a gate for each head."""

    def __init__(self, old, gate):
        self.old, self.gate = old, gate

    def __call__(self, x, start_pos, freqs_cis, cache):
        a, (B, T, _) = self.old, x.shape
        q = F.apply_rotary_emb(a.wq(x).reshape(B, T, a.n_heads, a.head_dim), freqs_cis)
        k = F.apply_rotary_emb(a.wk(x).reshape(B, T, a.n_kv_heads, a.head_dim), freqs_cis)
        k, v = cache.update(0, start_pos, k, a.wv(x).reshape(B, T, a.n_kv_heads, a.head_dim))
        return a.wo((self.gate[:, None] * F.attention(q, k, v)).reshape(B, T, -1))


def exchanges(model):
    """The names of parts, and what takes their place."""
    layers, args = model.layers, model.args
    rng = np.random.default_rng(0)
    gate = rng.random(args.n_heads).astype(np.float32)
    table = rng.standard_normal((args.vocab_size, args.dim)).astype(np.float32)
    return {
        "a function": {"layers.*.attention.attention": F.attention},
        "an attention": {"layers.0.attention": OwnAttention(layers[0].attention, gate)},
        "a linear": {"layers.1.attention.wk": lambda x: 0.5 * layers[0].attention.wk(x)},
        "a feed-forward": {"layers.0.feed_forward": lambda x: layers[1].feed_forward(x) - x},
        "a weight": {"output.weight": table, "output.linear": F.linear},
        "a norm": {"norm.eps": 0.1, "layers.1.ffn_norm": lambda x: x},
        "a block": {"layers.1": lambda h, *rest: layers[1](h, *rest) * np.float32(1.01)},
        "an embedding": {"tok_embeddings": table},
        "angles": {"freqs_cis": model.freqs_cis.conj()},
        "the order": {"layers": [layers[1], layers[2], layers[0], layers[1]]},
        "fewer": {"layers": [layers[2]]},
    }


def studies(llama):
    """A name, and an array that must be the same on ranks."""
    model, tokens = llama.model, np.random.default_rng(0).integers(256, size=(2, 9))
    for place in PLACES:
        name = place.replace("*", "1")
        with nl.trace(model, name) as seen:
            yield f"{name}, logits", seen.model(tokens)
        yield name, seen[name]
        if not name.endswith(".h"):
            with nl.edit(model, name, lambda x: x * np.float32(0.9)) as edited:
                yield f"{name}, edited", edited(tokens)
    for what, parts in exchanges(model).items():
        other = model.with_parts(parts)
        cache = other.new_cache(2, 16)
        yield f"exchanged: {what}", other(tokens, 0, cache)
        yield f"exchanged: {what}, one more", other(tokens[:, :1], 9, cache)
    yield "unchanged", model(tokens)
    own, model.norm = model.norm, lambda x: 2 * x
    yield "put in place", model(tokens)
    model.norm = own
    attention = model.layers[1].attention
    own, attention.attention = attention.attention, F.attention
    yield "put in place in a block", model(tokens)
    attention.attention = own
    h = model.hidden(tokens)
    yield "a matrix by itself", attention.wq(h)
    yield "a block by itself", model.layers[1](h, 0, model.freqs_cis[:9], model.new_cache(2, 9))
    yield "all layers", model.run_layers(h, 0, model.freqs_cis[:9], model.new_cache(2, 9))
    yield "the last two parts", model.output(model.norm(h))
    yield "copied", copy.deepcopy(model)(tokens)
    yield "lens", lens(model, [1, 2, 3])
    yield "attention", attention_weights(model, [1, 2, 3], 0)
    session = llama.new_session(40)
    yield "before", np.array(llama.generate("hello", max_tokens=4, session=session).tokens)
    with nl.trace(llama, "layers.*.attention.weights", "layers.*.feed_forward.swiglu") as seen:
        completion = llama.generate("hello you", max_tokens=4, session=session)
        yield "within", np.array(completion.tokens)
        batch = llama.generate_batch(["hello", "hi", "hello you"], max_tokens=4)
        yield "a batch", np.array([one.tokens for one in batch])
    for i, one in enumerate(seen.passes):
        for name, array in one.items():
            yield f"pass {i}, {name}", array
    yield "behind", np.array(llama.generate("hello you", max_tokens=4, session=session).tokens)


def main(path: str, out: str) -> None:
    options = {"default": {}, "float64": {"backend": "numpy", "dtype": np.float64}}
    found = {}
    for name, one in options.items():
        for what, array in studies(nl.load(path, threads=1, **one)):
            found[f"{name}, {what}"] = np.array(array)
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])

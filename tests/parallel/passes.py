"""Compute passes of each model of a folder, alone or on ranks, and write all logits.

    python passes.py FOLDER OUT [OPTIONS]

OPTIONS are further ones of nl.load, in JSON. OUT is a file of NumPy, with an array for each model. The bits
of BLAS depend on the size of a matrix, so the NumPy backend computes one model only.
"""

import copy
import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np

import numpy_llama as nl
from numpy_llama.generation.batch import BatchCache, hidden_states
from numpy_llama.generation.generate import forward
from numpy_llama.parallel import fused

OPTIONS = {
    "default": {},
    "15 bits": {"activation_bits": 15},
    "exact": {"exact": True},
}
Q8 = {"q8": {"cache_dtype": "q8"}}
NUMPY = {"float32": {"backend": "numpy"}, "float64": {"backend": "numpy", "dtype": np.float64}}


def passes(model) -> list[np.ndarray]:
    """Chunks of a prompt, tokens one by one, batches, sequences of several lengths, caches, branches."""
    rng, V = np.random.default_rng(0), model.args.vocab_size
    tokens, cache = rng.integers(V, size=(1, 40)), model.new_cache(1, 64)
    ends = [0, 17, *range(30, 37)]
    found = [model(tokens[:, a:b], a, cache) for a, b in pairwise(ends)]
    found.append(model(tokens[:, 5:9]))  # with a cache of its own
    found.append(model(tokens))
    filled, args = model.new_cache(1, 16), model.args
    for layer in range(args.n_layers):  # as `bench -d` fills it
        kv = rng.standard_normal((2, 1, 5, args.n_kv_heads, args.head_dim), dtype=np.float32)
        filled.update(layer, 0, *kv)
    found.append(model(tokens[:, :3], 5, filled))
    batch = model.new_cache(3, 32)
    found += [model(rng.integers(V, size=(3, n)), at, batch) for n, at in [(6, 0), (1, 6), (2, 7), (22, 9)]]
    caches = [copy.deepcopy(cache), cache, model.new_cache(1, 8)]
    starts = np.array([36, 20, 0])
    for _ in range(2):
        h = hidden_states(model, rng.integers(V, size=(3, 1)), starts, BatchCache(caches))
        found.append(model.logits(h[:, -1]))
        starts = starts + 1
    session = nl.Session(model, 64)
    forward(model, tokens[0, :20].tolist(), session)
    for other in (session.branch(), session, session.branch().branch()):
        found.append(forward(model, tokens[0, 20:26].tolist(), other))
    return found


def main(folder: str, out: str, options: str = "{}") -> None:
    given, found = json.loads(options), {}
    if given.pop("overlapping", False):  # as on several machines, and for short prompts too
        fused.cut_for, fused.OverlappingCut.LEAST = fused.OverlappingCut, 20
    for path in sorted(Path(folder).iterdir()):
        for name, others in {
            **OPTIONS,
            **(Q8 if path.name in ("Q4_0.gguf", "window.gguf") else {}),
            **(NUMPY if path.name in ("F32.gguf", "window.gguf") else {}),
        }.items():
            logits = passes(nl.load(path, threads=1, **others, **given).model)
            found[f"{path.name}, {name}"] = np.concatenate([one.reshape(-1) for one in logits])
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Call a model with odd arguments, alone or on ranks, and print what becomes of each call.

python arguments.py MODEL BACKEND
"""

import hashlib
import sys
from collections.abc import Callable

import numpy as np

import numpy_llama as nl
from numpy_llama.generation.batch import BatchCache

path, backend = sys.argv[1:]
in_c = backend == "c"
model = nl.load(path, threads=1, backend=backend).model
tokens, angles = np.array([[1, 2, 3]]), model.freqs_cis[:3]
h, block = model.hidden(tokens), model.layers[0]
text = np.full(h.shape, "x")


def filled():
    cache = model.new_cache(1, 16)
    model.hidden(tokens, 0, cache)
    return cache


def logits(x):
    return lambda: model.logits(x)


def hidden(start_pos):
    return lambda: model.hidden(tokens, start_pos, filled())


def blocked(x=h, start_pos=0, freqs_cis=angles):
    return lambda: block(x, start_pos, freqs_cis, filled())


def parts(**exchanged):
    return lambda: model.with_parts({name.replace("__", "."): part for name, part in exchanged.items()})(
        tokens
    )


def loaded(**options):
    return lambda: nl.load(path, backend=backend, **options).model(tokens)


# Whether a call has a result. None: that depends on the backend, and the NumPy backend on ranks has one too.
calls: list[tuple[bool | None, Callable[[], np.ndarray]]] = [
    *((True, logits(h.astype(dtype))) for dtype in ("e", "f", "d", "g", "i", "?", ">f4")),
    *((False, logits(h.astype(dtype))) for dtype in ("O", "M8[s]", "m8[s]", "V4", "S1")),
    *((False, logits(x)) for x in (text, None, h.tolist(), h[..., :2], np.float32(1))),
    *((True, hidden(start)) for start in (3, np.int64(3), np.uint8(3), np.array(3), True)),
    *(
        (False, hidden(start))
        for start in (0.0, 0.5, None, "0", -1, np.array([0, 0]), np.array([], int), [[0]])
    ),
    *((False, hidden(start)) for start in (np.array(3.0), np.array([3.0]), float("nan"))),
    *((None, hidden(start)) for start in ([3], np.array([3]))),
    (None, lambda: model.hidden(tokens, [0])),
    (None, lambda: model.hidden(tokens, 0, BatchCache([filled()]))),
    *((False, lambda cache=cache: model.hidden(tokens, 0, cache)) for cache in (5, "c", [filled()])),
    *((True, blocked(h.astype(dtype))) for dtype in ("f", "e")),
    *((None, blocked(h.astype(dtype))) for dtype in ("d", "g")),
    *((False, blocked(x)) for x in (text, h.tolist(), h[0], h[:, :2], h[:, :0])),
    *((False, blocked(start_pos=start)) for start in (0.0, None, -1, [0, 0])),
    *((None, blocked(start_pos=start)) for start in ([0], np.array([3]))),
    (True, blocked(freqs_cis=angles[None])),
    *((False, blocked(freqs_cis=x)) for x in (angles[:2], angles[None, None], np.stack([angles] * 2), None)),
    (False, blocked(freqs_cis=np.full(angles.shape, "x"))),
    *((None, blocked(freqs_cis=x)) for x in (angles.real, angles.astype(complex))),
    (False, lambda: model.run_layers(h, 0.0, angles, filled())),
    (False, parts(norm=lambda x: text)),
    (False, parts(layers__0=lambda x, *more: None)),
    (False, parts(layers__0=lambda x, *more: text)),
    (None, parts(layers__0=lambda x, *more: x.astype(float))),
    *((None, loaded(threads=n)) for n in ("2", [1], 0, True, 1.5, lambda: 1)),
    *((None, loaded(threads=1, activation_bits=n)) for n in ("8", 9, None)),
    (False, loaded(max_seq_len=0)),
]
for i, (works, call) in enumerate(calls):
    shown = in_c or works is not None
    try:
        found = np.ascontiguousarray(call())
    except Exception as error:
        assert not works, (i, error)
        print(i, "an error" if shown else "", flush=True)
    else:
        assert works is not False, (i, found.dtype, found.shape)
        bits = hashlib.sha256(found.tobytes()).hexdigest() if in_c else ""
        print(i, f"{found.dtype} {found.shape} {bits}" if shown else "", flush=True)

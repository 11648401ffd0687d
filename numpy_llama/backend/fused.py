"""One C call for a whole layer: `TransformerBlock` with the same weights and the same meaning.

What lies between two kernels costs a small model more than the kernels: thirty layers a token, twenty calls
of Python a layer. The model takes no notice: it is handed other layers.
"""

import numpy as np

from ..cache import KVCache
from ..model import Transformer, TransformerBlock

CACHED = (np.float32, np.float16)


class FusedBlock(TransformerBlock):
    """A TransformerBlock whose call is `layer` of csrc/layer.c, within the rounding of float32.

    A cache that is neither a KVCache nor batch.py's, or in float64, goes the ordinary way.
    """

    def __init__(self, block: TransformerBlock, kernels, packed):
        vars(self).update(vars(block))
        self.kernels, self.packed = kernels, packed

    def __call__(self, x, start_pos, freqs_cis, cache):
        caches, starts = getattr(cache, "caches", [cache]), np.atleast_1d(start_pos).tolist()
        layer, (B, T, _) = self.attention.layer, x.shape
        usual = all(type(one) is KVCache and one.k.dtype in CACHED for one in caches)
        if not usual or sum(one.batch for one in caches) != B:
            return super().__call__(x, start_pos, freqs_cis, cache)
        ends = [one.check(layer, at, one.batch, T) for one, at in zip(caches, starts, strict=True)]
        keys = [k for one in caches for k in one.k[layer]]  # of each sequence (K, max_seq_len, Dh)
        values = [v for one in caches for v in one.v[layer]]
        starts = [at for one, at in zip(caches, starts, strict=True) for _ in range(one.batch)]
        y = self.kernels.layer(self.packed, x, starts, freqs_cis, keys, values)
        if y is None:  # the ordinary way says best what is wrong with these numbers
            return super().__call__(x, start_pos, freqs_cis, cache)
        for one, end in zip(caches, ends, strict=True):
            one.filled[layer] = end
        return y


def fuse(model: Transformer, kernels) -> Transformer:
    """Let each layer of the model be one call, where the kernels can."""
    packed = [kernels.pack_layer(layer) for layer in model.layers]
    model.layers = [
        FusedBlock(layer, kernels, weights) if weights else layer
        for layer, weights in zip(model.layers, packed, strict=True)
    ]
    return model

"""One C call for a whole layer: `TransformerBlock` with the same weights and the same meaning.

What lies between two kernels costs a small model more than the kernels: thirty layers a token, twenty calls
of Python a layer. The model takes no notice: it is handed other layers.
"""

import numpy as np

from .cache import KVCache
from .model import Transformer, TransformerBlock

CACHED = (np.float32, np.float16)


class CompiledBlock(TransformerBlock):
    """A TransformerBlock whose call is `layer` of csrc/layer.c, within the rounding of float32.

    Several sequences at once, or another cache than KVCache, go the ordinary way.
    """

    def __init__(self, block: TransformerBlock, kernels, packed):
        vars(self).update(vars(block))
        self.kernels, self.packed = kernels, packed

    def __call__(self, x, start_pos, freqs_cis, cache):
        if len(x) != 1 or type(cache) is not KVCache or cache.k.dtype not in CACHED:
            return super().__call__(x, start_pos, freqs_cis, cache)
        layer = self.attention.layer
        end = cache.check(layer, start_pos, *x.shape[:2])
        k, v = cache.k[layer, 0], cache.v[layer, 0]
        y = self.kernels.layer(self.packed, x, start_pos, freqs_cis, k, v)
        if y is None:  # the ordinary way says best what is wrong with these numbers
            return super().__call__(x, start_pos, freqs_cis, cache)
        cache.filled[layer] = end
        return y


def compile_layers(model: Transformer, kernels) -> Transformer:
    """Let each layer of the model be one call, where the kernels can."""
    packed = [kernels.pack_layer(layer) for layer in model.layers]
    model.layers = [
        CompiledBlock(layer, kernels, weights) if weights else layer
        for layer, weights in zip(model.layers, packed, strict=True)
    ]
    return model

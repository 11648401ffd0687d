"""LLaMA 1, 2 and 3 in NumPy that a person reads in an evening, with C kernels proven equal to it.

import numpy_llama as nl

llama = nl.load("smollm2-135m-instruct")
print(llama.chat([{"role": "user", "content": "What is the capital of France?"}]).text)
"""

from .cache import KVCache
from .chat import ChatTemplate
from .config import ModelArgs, RopeScaling
from .errors import NumpyLlamaError
from .generate import Context
from .llama import Completion, Llama, Piece, load, load_tokenizer
from .model import Transformer
from .pull import pull
from .sampling import Sampler
from .tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = [
    "ChatTemplate",
    "Completion",
    "Context",
    "KVCache",
    "Llama",
    "ModelArgs",
    "NumpyLlamaError",
    "Piece",
    "RopeScaling",
    "Sampler",
    "Tokenizer",
    "Transformer",
    "load",
    "load_tokenizer",
    "pull",
]

"""LLaMA 1, 2 and 3 in NumPy that a person reads in an evening, with C kernels that tests hold equal to it.

import numpy_llama as nl

llama = nl.load("smollm2-135m-instruct")
print(llama.chat([{"role": "user", "content": "Name the capital of France."}]).text)
"""

from importlib import import_module

TYPE_CHECKING = False  # type checkers read it as True; an import of `typing` would take longer than this file

__version__ = "0.1.0"

# A name is imported at its first use (PEP 562). So the command line starts, and Ctrl-C ends it, before NumPy
# and the rest are imported.
_HOME = {
    "ChatTemplate": "text.chat",
    "Completion": "generation.transcript",
    "KVCache": "cache",
    "Llama": "llama",
    "Lookup": "generation.speculative",
    "ModelArgs": "config",
    "NumpyLlamaError": "errors",
    "Piece": "generation.transcript",
    "RopeScaling": "config",
    "Sampler": "generation.sampling",
    "Score": "generation.scoring",
    "Session": "generation.session",
    "Tokenizer": "text.tokenizer",
    "Transformer": "model",
    "edit": "inspect.tracing",
    "load": "llama",
    "load_tokenizer": "llama",
    "pull": "checkpoint.download",
    "trace": "inspect.tracing",
}
__all__ = [*_HOME]

if TYPE_CHECKING:  # the same names, for type checkers
    from .cache import KVCache as KVCache
    from .checkpoint.download import pull as pull
    from .config import ModelArgs as ModelArgs
    from .config import RopeScaling as RopeScaling
    from .errors import NumpyLlamaError as NumpyLlamaError
    from .generation.sampling import Sampler as Sampler
    from .generation.scoring import Score as Score
    from .generation.session import Session as Session
    from .generation.speculative import Lookup as Lookup
    from .generation.transcript import Completion as Completion
    from .generation.transcript import Piece as Piece
    from .inspect.tracing import edit as edit
    from .inspect.tracing import trace as trace
    from .llama import Llama as Llama
    from .llama import load as load
    from .llama import load_tokenizer as load_tokenizer
    from .model import Transformer as Transformer
    from .text.chat import ChatTemplate as ChatTemplate
    from .text.tokenizer import Tokenizer as Tokenizer
else:

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

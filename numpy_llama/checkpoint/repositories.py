"""Names that people know for models of the Hugging Face Hub, as data.

Each repository has GGUF files, and is open to everyone without a licence to accept on its page.
"""

from collections.abc import Mapping
from types import MappingProxyType

REPOSITORIES: Mapping[str, str] = MappingProxyType({
    "smollm2-360m-instruct":      "bartowski/SmolLM2-360M-Instruct-GGUF",
    "smollm2-1.7b-instruct":      "bartowski/SmolLM2-1.7B-Instruct-GGUF",
    "tinyllama-1.1b-chat":        "TheBloke/TinyLlama-1.1B-Chat-v1.0-GGUF",
    "llama-3.2-1b-instruct":      "bartowski/Llama-3.2-1B-Instruct-GGUF",
    "llama-3.2-3b-instruct":      "bartowski/Llama-3.2-3B-Instruct-GGUF",
    "llama-3.1-8b-instruct":      "bartowski/Meta-Llama-3.1-8B-Instruct-GGUF",
    "llama-3-8b-instruct":        "bartowski/Meta-Llama-3-8B-Instruct-GGUF",
    "llama-2-7b-chat":            "TheBloke/Llama-2-7B-Chat-GGUF",
    "codellama-7b-instruct":      "TheBloke/CodeLlama-7B-Instruct-GGUF",
    "mistral-7b-instruct-v0.3":   "bartowski/Mistral-7B-Instruct-v0.3-GGUF",
    # Short names of the same.
    "smollm2-360m":               "bartowski/SmolLM2-360M-Instruct-GGUF",
    "tinyllama":                  "TheBloke/TinyLlama-1.1B-Chat-v1.0-GGUF",
})  # fmt: skip

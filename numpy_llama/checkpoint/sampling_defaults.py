"""The sampling options that come with a model: generation_config.json, and general.sampling.* in a GGUF.

They are advice for a conversation. So the model also runs with a value that cannot be used: the value is left
out, with a warning.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import NumpyLlamaError, ParameterError
from ..generation.sampling import Sampler
from .gguf.file import GGUFFile
from .json_file import JsonFile

_log = logging.getLogger(__name__)

KINDS = {"temperature": float, "top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float}
IN_HF = {option: option for option in KINDS}
IN_GGUF = {option: f"general.sampling.{option}" for option in KINDS} | {
    "temperature": "general.sampling.temp",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


def of_generation_config(config: JsonFile) -> dict[str, Any]:
    """The options of generation_config.json. do_sample false is temperature 0."""

    def read(key: str, kind: type) -> Any:
        greedy = key == "temperature" and config.get("do_sample", bool) is False
        return 0.0 if greedy else config.get(key, kind)

    return _options(config, IN_HF, read)


def of_gguf(file: GGUFFile) -> dict[str, Any]:
    """The options of general.sampling.*, as llama.cpp's converter writes them."""

    def read(key: str, kind: type) -> Any:
        if key not in file.metadata:
            return None
        return file.decimal(key) if kind is float else file.get(key, kind)

    return _options(file, IN_GGUF, read)


def _options(
    file: JsonFile | GGUFFile, keys: Mapping[str, str], read: Callable[[str, type], Any]
) -> dict[str, Any]:
    """Options of `Sampler` by their names. top_k 0 is None: both programs leave the filter out."""
    found: dict[str, Any] = {}
    for option, key in keys.items():
        try:
            if (value := read(key, KINDS[option])) is None:
                continue
            one: dict[str, Any] = {option: None if option == "top_k" and value == 0 else value}
            Sampler(**one)
            found |= one
        except ParameterError as error:  # of the sampler, which has not seen the file
            _log.warning("%s, %s: %s; it is left out", file.path, key, error)
        except NumpyLlamaError as error:
            _log.warning("%s; it is left out", error)
    return found

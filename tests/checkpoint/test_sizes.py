"""A size in a header: one function reads it for all formats. Its message has path, key, value and range."""

from pathlib import Path

import pytest

from numpy_llama.checkpoint import huggingface, meta
from numpy_llama.checkpoint.base import size
from numpy_llama.checkpoint.json_file import JsonFile
from numpy_llama.config import LIMITS
from numpy_llama.errors import ConfigError

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
}
PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "multiple_of": 32, "vocab_size": 100, "norm_eps": 1e-5}
SIZES = {
    "hidden_size": "dim", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers",
    "num_key_value_heads": "n_kv_heads", "intermediate_size": "hidden_dim", "multiple_of": "hidden_dim",
}  # fmt: skip


@pytest.mark.parametrize("key", [*list(CONFIG)[1:-1], "num_key_value_heads", "head_dim"])
def test_config_json(key):
    _refuses_what_is_out_of_range(huggingface.model_args, CONFIG, key)


@pytest.mark.parametrize("key", [*list(PARAMS)[:-1], "n_kv_heads", "head_dim", "hidden_dim"])
def test_params_json(key):
    _refuses_what_is_out_of_range(meta.model_args, PARAMS, key)


def _refuses_what_is_out_of_range(model_args, values, key):
    limit = LIMITS[SIZES.get(key, key)]
    model_args(JsonFile(Path("file.json"), values=values))
    for wrong in (0, limit + 1, -2, 10**100):
        with pytest.raises(ConfigError) as error:
            model_args(JsonFile(Path("file.json"), values=values | {key: wrong}))
        wanted = f"it must be a whole number from 1 to {limit}"
        assert str(error.value).startswith(f"file.json: {key} is {str(wrong)[:20]}")
        assert str(error.value).endswith(wanted)


def test_a_default_stands_for_an_absent_size_and_is_checked_too():
    file = JsonFile(Path("file.json"), values={})
    assert size(file, "head_dim", "head_dim", 64) == 64
    with pytest.raises(ConfigError, match="head_dim is 4096, it must be a whole number from 1 to 1024"):
        size(file, "head_dim", "head_dim", 4096)
    with pytest.raises(ConfigError, match=r"file\.json has no hidden_size"):
        size(file, "hidden_size", "dim")


def test_a_size_without_a_limit():
    assert size(JsonFile(Path("file.json"), values={"window": 1 << 40}), "window") == 1 << 40

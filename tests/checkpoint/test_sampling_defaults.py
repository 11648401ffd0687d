"""The sampling that a model's files recommend: as each program writes it, and never a danger."""

import struct
from pathlib import Path

import gguf
import pytest
import torch
from helpers.generations import with_tokenizer, write_hf
from helpers.gguf_writer import Raw, gguf_bytes
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

import numpy_llama as nl
from numpy_llama.checkpoint.gguf.file import GGUFFile
from numpy_llama.checkpoint.gguf.model import GGUFCheckpoint
from numpy_llama.checkpoint.json_file import JsonFile
from numpy_llama.checkpoint.sampling_defaults import KINDS, of_generation_config, of_gguf
from numpy_llama.generation.sampling import Sampler

WANTED = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1}
CONFIG = Path("generation_config.json")


def of_config(**values) -> dict:
    return of_generation_config(JsonFile(CONFIG, values=values))


def of_keys(path: Path, **values) -> dict:
    path.write_bytes(gguf_bytes({f"general.sampling.{key}": value for key, value in values.items()}, {}))
    return of_gguf(GGUFFile(path))


def test_generation_config_as_transformers_writes_it(tmp_path):
    folder = with_tokenizer(write_hf("Llama 3", tmp_path, torch.float32))
    GenerationConfig(do_sample=True, **WANTED).save_pretrained(folder)
    llama = nl.load(folder)
    assert llama.sampling_defaults == WANTED
    sampled = llama.generate("hi", max_tokens=9, seed=7, **llama.sampling_defaults)
    assert sampled.tokens != llama.generate("hi", max_tokens=9).tokens  # which does not use them
    (folder / CONFIG).unlink()
    assert nl.load(folder).sampling_defaults == {}


def test_a_gguf_as_its_package_writes_it(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_sampling_temp(0.6)
    writer.add_sampling_top_k(20)
    writer.add_sampling_top_p(0.95)
    writer.add_sampling_min_p(0.05)
    writer.add_sampling_penalty_repeat(1.1)
    writer.add_sampling_mirostat(2)  # which is not computed here
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert GGUFCheckpoint(tmp_path / "m.gguf").sampling_defaults() == WANTED  # 0.95, no 0.949999988


def test_what_is_off(tmp_path, caplog):
    assert of_config() == of_config(temperature=None, do_sample=True) == {}
    assert of_config(top_k=0) == of_keys(tmp_path / "m.gguf", top_k=0) == {"top_k": None}
    assert of_config(do_sample=False, temperature=0.6, top_k=5) == {"temperature": 0, "top_k": 5}
    assert not caplog.records


HOSTILE = [
    ({"temperature": -1.0}, "temperature is -1.0, it must be a finite number, 0 or above"),
    ({"temperature": "hot\x1b[2J"}, r"temperature is 'hot\x1b[2J', wanted float"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": 10**400}, "temperature is 1000"),
    ({"temperature": True}, "temperature is True, wanted float"),
    ({"top_k": -1}, "top_k is -1"),
    ({"top_k": 1.5}, "top_k is 1.5, wanted int"),
    ({"top_p": 1.5}, "top_p is 1.5"),
    ({"min_p": [0.1]}, "min_p is [0.1], wanted float"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0.0"),
    ({"do_sample": "no"}, "do_sample is 'no', wanted bool"),
]


@pytest.mark.parametrize("values, words", HOSTILE)
def test_a_value_of_no_use_is_left_out_with_a_warning(values, words, caplog):
    assert of_config(**values) == {}
    (message,) = caplog.messages
    assert message.startswith(str(CONFIG)) and words in message and message.endswith("; it is left out")


def test_so_it_is_in_a_gguf(tmp_path, caplog):
    path = tmp_path / "m.gguf"
    odd = {"temp": "hot", "top_k": 2.0, "top_p": float("nan"), "min_p": True, "penalty_repeat": -1.0}
    assert of_keys(path, **odd) == {}
    assert len(caplog.messages) == len(odd)
    for key, message in zip(odd, caplog.messages, strict=True):
        assert str(path) in message and f"general.sampling.{key}" in message
    infinite = Raw(6, struct.pack("<f", float("inf")))
    assert of_keys(path, temp=infinite, top_p=0.5) == {"top_p": 0.5}


ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())


@given(st.dictionaries(st.sampled_from(["do_sample", *KINDS]), ANYTHING))
def test_what_is_kept_is_an_option_of_the_sampler(values):
    Sampler(**of_config(**values))

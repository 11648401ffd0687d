"""Manners of the Python face: every argument with odd values; copies and pickles; paths and environment."""

import copy
import inspect
import json
import os
import pathlib
import pickle
from dataclasses import replace

import numpy as np
import pytest
from helpers.tiny_models import SPEAKER as ARGS
from helpers.tiny_models import float_weights, write_speaker
from helpers.tokenizers import sentence_piece

import numpy_llama as nl
from numpy_llama import errors
from numpy_llama.checkpoint import download
from numpy_llama.checkpoint.huggingface import model_args
from numpy_llama.checkpoint.json_file import JsonFile
from numpy_llama.errors import (
    ConfigError,
    DownloadError,
    MismatchError,
    NumpyLlamaError,
    ParameterError,
    UnsupportedError,
)
from numpy_llama.rope import Llama3Scaling
from numpy_llama.text.chat import CHAT_FORMATS

TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_speaker(tmp_path_factory.mktemp("api") / "m.gguf")


@pytest.fixture(scope="module", params=["c", "numpy"])
def llama(request, path):
    llama = nl.load(path, backend=request.param)
    llama.chat_format = nl.ChatTemplate(TEMPLATE)
    return llama


# ---------------------------------------------------------------- every argument, with odd values


class Odd:
    """What a path-like object is, but not to a file."""

    def __fspath__(self):
        return b"/no/such/file"


ODD = {
    "None": None, "True": True, "1.5": 1.5, "nan": float("nan"), "-1": -1, "2": 2, "10**30": 10**30,
    "text": "x", "empty": "", "bytes": b"x", "[]": [], "['a']": ["a"], "[1, 2]": [1, 2], "[None]": [None],
    "{}": {}, "object": object(), "int64": np.int64(3), "float32": np.float32(0.5), "0-d": np.array(3),
    "1-d": np.array([1, 2]), "2-d": np.ones((2, 2)), "Path": pathlib.Path("no/such/file"), "type": int,
    "path-like": Odd(), "function": len, "iterator": iter(()), "nested": [[[]]],
}  # fmt: skip


CALLS = {
    nl.load: "model dtype backend threads progress cache_dtype adapter",
    nl.load_tokenizer: "path",
    nl.pull: "name progress",
    nl.Llama: "model tokenizer max_context check_unchanged",
    nl.Llama.new_session: "max_seq_len",
    nl.Llama.new_drafter: "llama",
    nl.Llama.generate: "prompt max_tokens stop session on_prefill draft special temperature top_k top_p "
    "min_p repetition_penalty seed top_logprobs logit_bias dry_breakers",
    nl.Llama.chat: "messages stop session draft",
    nl.Llama.encode_chat: "messages add_generation_prompt",
    nl.Llama.generate_batch: "prompts max_tokens stop draft seed",
    nl.Llama.chat_batch: "conversations",
    nl.Llama.log_likelihoods: "context continuations",
    nl.Llama.save_session: "session path",
    nl.Llama.load_session: "path max_seq_len",
    nl.Tokenizer.encode: "text bos eos special",
    nl.Tokenizer.decode: "ids start_of_text",
    nl.Tokenizer.token_bytes: "token_id",
    nl.Tokenizer.piece: "token_id",
    nl.Sampler: " ".join(nl.Sampler.__dataclass_fields__),
    nl.KVCache: "args batch max_seq_len",
    nl.Session: "model max_seq_len",
    nl.Transformer.new_cache: "batch max_seq_len",
    nl.Transformer.__call__: "tokens",
    nl.ChatTemplate: "source",
    nl.ModelArgs: " ".join(nl.ModelArgs.__dataclass_fields__),
    nl.trace: "llama pattern",
    nl.edit: "llama pattern change",
}


@pytest.fixture
def call(llama, path, tmp_path, monkeypatch):
    """A function that calls any of these with what it needs, but for what is given."""
    (tmp_path / f"{download.DEFAULT_MODEL}.gguf").touch()  # it is there, and is not fetched
    monkeypatch.setenv("NUMPY_LLAMA_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # a path that works is a file here
    usual = {
        nl.load: {"model": path},
        nl.load_tokenizer: {"path": path},
        nl.pull: {"name": download.DEFAULT_MODEL},
        nl.Llama: {"model": llama.model, "tokenizer": llama.tokenizer},
        nl.Llama.generate: {"prompt": "hi", "max_tokens": 2},
        nl.Llama.chat: {"messages": MESSAGES, "max_tokens": 2},
        nl.Llama.encode_chat: {"messages": MESSAGES},
        nl.Llama.generate_batch: {"prompts": ["hi"], "max_tokens": 2},
        nl.Llama.chat_batch: {"conversations": [MESSAGES], "max_tokens": 2},
        nl.Llama.log_likelihoods: {"context": "hi", "continuations": ["you"]},
        nl.Llama.save_session: {"session": llama.new_session(4), "path": tmp_path / "a.session"},
        nl.Llama.load_session: {"path": tmp_path / "a.session"},
        nl.Tokenizer.encode: {"text": "hi"},
        nl.Tokenizer.decode: {"ids": [1]},
        nl.KVCache: {"args": ARGS, "batch": 1, "max_seq_len": 8},
        nl.Session: {"model": llama.model, "max_seq_len": 8},
        nl.Transformer.new_cache: {"max_seq_len": 8},
        nl.ModelArgs: dict(vars(ARGS)),
    }
    owners = {"Llama": llama, "Tokenizer": llama.tokenizer, "Transformer": llama.model}

    def make(function, name, value):
        given = usual.get(function, {}) | {name: value}
        if function in (nl.trace, nl.edit):
            some = {"llama": llama, "pattern": "layers.0"} | ({"change": abs} if function is nl.edit else {})
            with function(*(some | {name: value}).values()):
                return llama.model(np.array([[1]]))
        owner = owners.get(function.__qualname__.partition(".")[0])
        if "." in function.__qualname__:
            return function(owner, **given)
        return function(**given)

    return make


@pytest.mark.parametrize(
    "function, name",
    [(function, name) for function, names in CALLS.items() for name in names.split()],
    ids=lambda x: x if isinstance(x, str) else x.__qualname__,
)
def test_an_argument_works_or_is_refused_in_our_words(function, name, call):
    for label, value in ODD.items():
        if name in ("on_prefill", "change") and callable(value):
            continue  # what a user's own function raises is the user's
        if isinstance(value, type(iter(()))):
            value = iter(())
        try:
            call(function, name, value)
        except NumpyLlamaError as error:
            assert str(error), label
            parameter = inspect.signature(function).parameters.get(name)
            if parameter is not None and parameter.default is parameter.empty:
                assert "left out" not in str(error), label  # it cannot be
        except Exception as error:
            pytest.fail(f"{label}: {type(error).__name__}: {error}")


def test_every_public_name_is_tried():
    classes = {
        nl.Completion,
        nl.Lookup,
        nl.RopeScaling,
        nl.Piece,
        nl.Score,
        nl.NumpyLlamaError,
        nl.Tokenizer,
        nl.Transformer,
    }  # made by others, or without arguments
    tried = {function.__qualname__.partition(".")[0] for function in CALLS}
    assert {getattr(nl, name).__name__ for name in nl.__all__} == tried | {c.__name__ for c in classes}


@pytest.mark.parametrize("name", ["stop", "session", "on_prefill", "draft", "max_tokens", "top_k", "seed"])
def test_none_is_as_if_it_were_left_out(name, llama):
    plain = llama.generate("hi", max_tokens=5)
    if name == "max_tokens":
        plain = llama.generate("hi")
    got = llama.generate("hi", **{"max_tokens": 5} | {name: None})
    assert (got.text, got.tokens) == (plain.text, plain.tokens)


def test_no_progress_is_asked_for_by_none(path):
    assert nl.load(path, progress=None).generate("hi", max_tokens=1).tokens
    assert nl.pull.__defaults__ == (None,)


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.uint16])
def test_numbers_of_numpy_are_numbers(kind, llama):
    wanted = llama.generate([1, 2, 3], max_tokens=4, temperature=1.0, top_k=5, seed=7).tokens
    numbers = {"max_tokens": kind(4), "top_k": kind(5), "seed": kind(7), "temperature": np.float32(1)}
    assert llama.generate(np.array([1, 2, 3], kind), **numbers).tokens == wanted
    assert llama.new_session(kind(9)).cache.max_seq_len == 9


# ---------------------------------------------------------------- copies and pickles

WAYS = {"pickle": lambda x: pickle.loads(pickle.dumps(x)), "copy": copy.copy, "deepcopy": copy.deepcopy}
EVERY_WAY = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@EVERY_WAY
def test_a_tokenizer_is_copied(way, llama):
    for tokenizer in (llama.tokenizer, sentence_piece()):
        copied = way(tokenizer)
        for text in ("Hello world", "", "  ä🦙<|user|>"):
            assert copied.encode(text, special=True) == tokenizer.encode(text, special=True)
            assert copied.decode(copied.encode(text)) == tokenizer.decode(tokenizer.encode(text))
        assert (copied.eos_ids, copied.bos_id, copied.source) == (
            tokenizer.eos_ids,
            tokenizer.bos_id,
            tokenizer.source,
        )


@EVERY_WAY
def test_a_conversation_is_copied(way, llama):
    session = llama.new_session(32)
    llama.generate("hi", max_tokens=4, session=session)
    copied = way(session)
    assert copied.ids == session.ids and copied.user is None
    before = copy.deepcopy(session).cache.k
    answers = [llama.generate("hi you", max_tokens=4, session=one).tokens for one in (copied, session)]
    assert answers[0] == answers[1]
    if way is not copy.copy:
        np.testing.assert_array_equal(before[:, :, :, :2], session.cache.k[:, :, :, :2])


@EVERY_WAY
def test_what_is_only_data_is_copied(way, llama):
    completion = llama.generate("hi", max_tokens=2)
    for thing in (completion, nl.Piece("x", 1, completion), nl.Sampler(top_k=3), ARGS, Llama3Scaling(8.0)):
        assert way(thing) == thing
    cache = way(llama.model.new_cache(1, 8))
    assert (cache.max_seq_len, cache.filled, cache.k.shape) == (8, [0, 0], (2, 1, 2, 8, 16))
    template = nl.ChatTemplate(TEMPLATE, TEMPLATE)
    assert template.code and template.tool_use.code  # compiled, as after a conversation
    for format in (*CHAT_FORMATS.values(), template):
        assert type(way(format)) is type(format)
    for name, error in inspect.getmembers(errors, inspect.isclass):
        if issubclass(error, NumpyLlamaError):
            assert repr(way(error("a message"))) == f"{name}('a message')"


def test_another_model_is_checked_like_the_first(llama):
    """Its vocabulary must fit the tokenizer, and the context is its own or what memory has room for."""
    own = nl.Llama(llama.model, llama.tokenizer, max_context=95)
    longer = nl.Transformer(replace(ARGS, max_seq_len=100), float_weights(ARGS))
    for model, context in ((llama.model, 64), (longer, 95)):
        own.model = model
        assert own.model is model and own.max_context == own.new_session().cache.max_seq_len == context
    for wrong in (None, 3, "model"):
        with pytest.raises(ParameterError, match=f"model is {wrong!r}, it must be a Transformer"):
            own.model = wrong
    few = replace(ARGS, vocab_size=5)
    with pytest.raises(MismatchError, match="rows"):
        own.model = nl.Transformer(few, float_weights(few))
    assert own.model is longer


@pytest.mark.parametrize("way", ["copy", "deepcopy"])
def test_a_model_is_copied_in_the_process(way, llama):
    wanted = llama.generate("hi", max_tokens=4).tokens
    assert WAYS[way](llama).generate("hi", max_tokens=4).tokens == wanted
    tokens = np.array([[1, 2, 3]])
    np.testing.assert_array_equal(WAYS[way](llama.model)(tokens), llama.model(tokens))


def test_a_model_from_a_file_is_not_pickled_and_says_why(llama):
    with pytest.raises(UnsupportedError, match=r"a model cannot be pickled, .* load it in each process"):
        pickle.dumps(llama)


def test_a_model_of_arrays_is_pickled():
    model = nl.Transformer(ARGS, float_weights(ARGS))
    tokens = np.array([[1, 2, 3]])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model))(tokens), model(tokens))


# ---------------------------------------------------------------- paths and environment


@pytest.mark.parametrize(
    "environment, folder",
    [
        ({"NUMPY_LLAMA_HOME": "~/models"}, "/home/u/models"),
        ({"NUMPY_LLAMA_HOME": "/models"}, "/models"),
        ({"NUMPY_LLAMA_HOME": "models"}, "models"),
        ({"NUMPY_LLAMA_HOME": ""}, "/home/u/.cache/numpy_llama"),
        ({"XDG_CACHE_HOME": "~/caches"}, "/home/u/caches/numpy_llama"),
        ({"XDG_CACHE_HOME": "/caches"}, "/caches/numpy_llama"),
        (
            {"XDG_CACHE_HOME": "caches"},
            "/home/u/.cache/numpy_llama",
        ),  # relative: ignored
        ({}, "/home/u/.cache/numpy_llama"),
    ],
)
def test_the_folder_of_models(environment, folder, monkeypatch):
    for name in ("NUMPY_LLAMA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/home/u"} | environment).items():
        monkeypatch.setenv(name, value)
    assert download.cache_folder() == pathlib.Path(folder)


@pytest.mark.parametrize("name", ["NUMPY_LLAMA_HOME", "XDG_CACHE_HOME"])
def test_a_home_that_nobody_has_is_an_error(name, monkeypatch):
    monkeypatch.delenv("NUMPY_LLAMA_HOME", raising=False)
    monkeypatch.setenv(name, "~no-such-user/models")
    with pytest.raises(DownloadError, match=r"no folder for models: .*; NUMPY_LLAMA_HOME can name one"):
        download.cache_folder()


@pytest.mark.parametrize("arguments", ["convert {m} ~/o --dtype f16", "convert ~/m.gguf ~/o --dtype f16"])
def test_a_tilde_in_an_argument_is_the_home_folder(arguments, path, tmp_path, monkeypatch, main):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").write_bytes(path.read_bytes())
    assert main(arguments.format(m=path).split()) == 0
    assert sorted(os.listdir(tmp_path)) == ["m.gguf", "o"]


def test_every_path_of_the_command_line_knows_the_tilde():
    from numpy_llama.cli import common, parser

    verbs = next(action for action in parser()._actions if action.choices).choices
    for verb in verbs.values():
        for action in verb._actions:
            assert action.type is not pathlib.Path
            if action.dest in ("out", "file"):
                assert action.type is common.path


# ---------------------------------------------------------------- null in a configuration

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5, "vocab_size": 260, "max_position_embeddings": 64, "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "hidden_act": "silu", "attention_bias": False,
    "tie_word_embeddings": False, "quantization_config": None, "quantization": None,
}  # fmt: skip


def config(**changes):
    return JsonFile(pathlib.Path("config.json"), values=json.loads(json.dumps(CONFIG | changes)))


@pytest.mark.parametrize("key", CONFIG)
def test_null_is_as_if_the_key_were_absent(key):
    absent = {name: value for name, value in CONFIG.items() if name != key}

    def outcome(values):
        try:
            return model_args(JsonFile(pathlib.Path("config.json"), values=values))
        except (ConfigError, UnsupportedError) as error:
            return str(error)

    assert outcome(CONFIG | {key: None}) == outcome(absent)


@pytest.mark.parametrize(
    "quantized, words",
    [
        ({"quantization": {"group_size": 64, "bits": 4}}, "by MLX (quantization is"),
        ({"quantization_config": {"group_size": 64, "bits": 4}}, "by MLX (quantization_config is"),
        ({"quantization_config": {"quant_method": "exl2", "bits": 4, "group_size": 128}}, "by 'exl2' ("),
        ({"quantization_config": {"load_in_2bit": True}}, "by a method without a name ("),
        ({"quantization_config": "gptq"}, "by 'gptq' ("),
        ({"compression_config": {"quant_method": "aqlm"}}, "by 'aqlm' ("),
    ],
)
def test_who_quantised_the_weights_is_named(quantized, words):
    with pytest.raises(UnsupportedError) as caught:
        model_args(config(**quantized))
    assert f"config.json: the weights are quantized {words}" in str(caught.value)
    assert "None" not in str(caught.value)

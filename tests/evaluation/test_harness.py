"""The model as the harness calls it, against its own model `hf` with the same weights and vocabulary."""

import json
import logging
from dataclasses import replace

import pytest
import tokenizers
from helpers.tiny_models import float_weights
from helpers.tokenizers import CORPUS, byte_level_metadata, hugging_face
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance

import numpy_llama as nl
from numpy_llama.errors import ContextOverflowError, ParameterError, UnsupportedError
from numpy_llama.evaluation.harness import HarnessModel
from numpy_llama.evaluation.store import Store
from numpy_llama.proof.oracle import transformers_model
from numpy_llama.proof.tiny import TINY
from numpy_llama.text.tokenizer import tokenizer_from_gguf

ROUNDED = 1e-3  # a sum of float32 log-probabilities, each about 6, in another order
CONTEXT = 48
METADATA = byte_level_metadata()
ARGS = replace(TINY, vocab_size=len(METADATA["tokenizer.ggml.tokens"]), max_seq_len=CONTEXT)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def llama_of(add_bos: bool = False) -> nl.Llama:
    tokenizer = tokenizer_from_gguf(METADATA | {"tokenizer.ggml.add_bos_token": add_bos}, "small.gguf")
    return nl.Llama(nl.Transformer(ARGS, float_weights(ARGS)), tokenizer, nl.ChatTemplate(TEMPLATE))


def hf_of(llama: nl.Llama):
    """The harness's own model with the weights and the vocabulary of `llama`."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    ours = llama.tokenizer
    theirs = hugging_face(METADATA)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    bos, eos = ours.tokens[ours.bos_id], ours.tokens[ours.eos_ids[0]]
    if ours.add_bos:
        template = tokenizers.processors.TemplateProcessing
        theirs.post_processor = template(single=f"{bos} $A", special_tokens=[(bos, ours.bos_id)])
    fast = PreTrainedTokenizerFast(tokenizer_object=theirs, bos_token=bos, eos_token=eos, pad_token=eos)
    fast.chat_template = TEMPLATE
    model = transformers_model(ARGS, float_weights(ARGS))
    model.generation_config.eos_token_id = list(ours.eos_ids)
    return HFLM(pretrained=model, tokenizer=fast, device="cpu", batch_size=3)


@pytest.fixture(scope="module", params=[False, True], ids=["without BOS", "with BOS"])
def both(request):
    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    llama = llama_of(request.param)
    return llama, hf_of(llama)


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def log_likelihoods(model, pairs, **options):
    return model.loglikelihood(instances("loglikelihood", pairs), **options)


# Pieces without the names of control tokens, which `hf` always reads as these tokens.
WORDS = [
    "the",
    " quick",
    " fox",
    "  ",
    " ",
    "\n",
    "12",
    " dogs",
    "isn't",
    "é",
    "🦙",
    ".",
    " they'll",
    "x ** 2",
]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=30).map("".join)
CONTINUATIONS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map("".join)


def can_be_asked(llama: nl.Llama, context: str, continuation: str) -> bool:
    """Whether `hf` takes the request: it asserts that context and continuation have an id or more."""
    encode = HarnessModel(llama).tok_encode
    if not context:
        ids = encode(continuation, add_special_tokens=False)
        return len(ids) > (ids[0] == HarnessModel(llama).prefix_token_id)
    before = encode(context.rstrip())
    return bool(before) and len(encode(context + continuation)) > len(before)


@given(requests=st.lists(st.tuples(TEXTS, CONTINUATIONS), min_size=1, max_size=6))
def test_log_likelihoods_are_those_of_hf(both, requests):
    llama, hf = both
    requests = [one for one in requests if can_be_asked(llama, *one)]
    ours, theirs = (
        log_likelihoods(HarnessModel(llama), requests),
        log_likelihoods(hf, requests, disable_tqdm=True),
    )
    for (value, greedy), (wanted, as_greedy) in zip(ours, theirs, strict=True):
        assert value == pytest.approx(wanted, abs=ROUNDED)
        assert greedy == as_greedy


CASES = {
    "the boundary lies in a token": ("the quick bro", "wn fox jumps over"),
    "spaces at the end of the context": ("the quick  ", "fox"),
    "no context": ("", "the quick"),
    "no context, and BOS first": ("", "<|begin_of_text|>the quick"),
    "longer than the context": ("the quick brown fox " * 30, "jumps"),
    "a continuation as long as the context": ("the", "é" * (CONTEXT // 2)),
    "one token": ("the quick brown", " fox"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_ids_are_those_of_hf(case, both, monkeypatch):
    """Of every request, also with the names of control tokens in the context of a chat."""
    llama, hf = both
    chats = [CASES[case], (f"<|begin_of_text|><|im_start|>user\n{CASES[case][0]}", CASES[case][1])]
    model = HarnessModel(llama, chat=True)
    asked: list[list] = [[], []]
    for seen, one in zip(asked, (model, hf), strict=True):
        monkeypatch.setattr(
            one, "_loglikelihood_tokens", lambda requests, seen=seen, **_: seen.extend(requests)
        )
        log_likelihoods(one, chats)
    assert asked[0] == asked[1]
    monkeypatch.undo()
    pairs = [(value, greedy) for value, greedy in log_likelihoods(model, chats)]
    for (value, greedy), (wanted, as_greedy) in zip(pairs, log_likelihoods(hf, chats), strict=True):
        assert (value, greedy) == (pytest.approx(wanted, abs=ROUNDED), as_greedy)


def test_a_name_of_a_control_token_in_a_plain_task_is_text():
    model = HarnessModel(llama_of())
    assert model.tok_encode("<|im_end|>") == model.llama.tokenizer.encode("<|im_end|>")
    assert HarnessModel(model.llama, chat=True).tok_encode("<|im_end|>") == [2]


@given(
    texts=st.lists(
        st.lists(st.sampled_from(WORDS), min_size=1, max_size=90).map("".join), min_size=1, max_size=3
    )
)
def test_rolling_log_likelihoods_are_those_of_hf(both, texts):
    llama, hf = both
    texts = [text for text in texts if text.strip()]
    asked = instances("loglikelihood_rolling", [(text,) for text in texts])
    ours = HarnessModel(llama).loglikelihood_rolling(asked)
    assert ours == pytest.approx(hf.loglikelihood_rolling(asked, disable_tqdm=True), abs=10 * ROUNDED)


GENERATIONS = {
    "greedy": {"max_gen_toks": 12, "until": ["\n\n"], "num_beams": 1},
    "an alias": {"max_new_tokens": 5, "until": "e", "do_sample": False, "temperature": 0.7},
    "no end text": {"max_gen_toks": 20},
    "a penalty": {"max_gen_toks": 9, "until": [], "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("name", GENERATIONS)
def test_generations_are_those_of_hf(name, both):
    llama, hf = both
    contexts = [
        "the quick brown",
        "   def f(x):\n",
        "the quick brown fox jumps " * 20,
        "the",
        "isn't it? They'll",
    ]
    asked = instances("generate_until", [(context, dict(GENERATIONS[name])) for context in contexts])
    model = HarnessModel(llama)
    ours = model.generate_until(asked)
    assert ours == hf.generate_until(asked, disable_tqdm=True)
    assert any(ours) and model.cut == 1


def test_a_chat_prompt_is_that_of_hf(both):
    llama, hf = both
    model = HarnessModel(llama, chat=True)
    chat = [
        {"role": "system", "content": "Be brief. é 🦙"},
        {"role": "user", "content": " the quick\n"},
        {"role": "assistant", "content": " fox: "},
    ]
    bos = "<|begin_of_text|>" if llama.tokenizer.add_bos else ""
    assert model.apply_chat_template(chat[:2]) == bos + hf.apply_chat_template(chat[:2])
    begun = model.apply_chat_template(chat, add_generation_prompt=False)
    assert begun == bos + hf.apply_chat_template(chat, add_generation_prompt=False)
    assert begun.endswith("fox: ")
    assert model.tok_encode(begun) == hf.tok_encode(begun) == hf.tok_encode(begun.removeprefix(bos))
    asked = [(model.apply_chat_template(chat[:2]), "fox")]
    assert log_likelihoods(model, asked)[0][0] == pytest.approx(log_likelihoods(hf, asked)[0][0], abs=ROUNDED)


def test_each_prefix_is_computed_once_and_each_request_is_asked_once():
    model = HarnessModel(llama_of())
    encode = model.llama.tokenizer.encode
    context, choices = "the quick brown fox jumps over the", [" lazy dog", " naïve café", " 1234 dogs"]
    requests = [(context, choice) for choice in choices]
    log_likelihoods(model, [*requests, *requests])
    n, more = len(encode(context)), sum(len(encode(context + choice)) - 1 for choice in choices)
    assert (model.requests, model.tokens) == (6, 2 * more)
    assert model.computed == more - 2 * n  # and the residual stream of the context's last id is kept
    log_likelihoods(model, requests)
    assert (model.requests, model.computed) == (9, more - 2 * n)


def test_what_cannot_be_asked_is_refused():
    model = HarnessModel(llama_of())
    with pytest.raises(ParameterError, match="'ck' adds no token"):
        log_likelihoods(model, [("the qui", "ck")])
    with pytest.raises(ContextOverflowError, match=f"the context {CONTEXT}"):
        log_likelihoods(model, [("the", " 1" * CONTEXT)])
    for kwargs, kind, words in (
        ({}, ContextOverflowError, "256 new tokens"),
        ({"max_gen_toks": 4, "num_beams": 2}, UnsupportedError, "asks for num_beams"),
        ({"max_gen_toks": 4, "do_sample": True, "temperature": -1.0}, ParameterError, "temperature"),
    ):
        with pytest.raises(kind, match=words):
            model.generate_until(instances("generate_until", [("the", kwargs)]))


def test_samples_of_one_prompt_differ_and_are_not_kept(tmp_path):
    llama = llama_of()
    kwargs = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 20}
    asked = instances("generate_until", [("the quick", kwargs)] * 4)
    store = Store(llama.model, tmp_path / "results.jsonl")
    texts = HarnessModel(llama, store).generate_until(asked)
    store.close()
    assert len(set(texts)) > 1
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1


def test_prompts_that_do_not_fit_memory_together_run_in_smaller_groups(monkeypatch):
    llama = llama_of()
    contexts = [text[:20] for text in CORPUS[:3]] * 2
    asked = instances("generate_until", [(context, {"max_gen_toks": 5}) for context in contexts])
    wanted = HarnessModel(llama).generate_until(asked)
    one = llama.model.new_cache(max_seq_len=1)
    room = 2 * 40 * (one.k.nbytes + one.v.nbytes)
    monkeypatch.setattr("numpy_llama.llama.available_memory", lambda *_: room)
    assert HarnessModel(llama).generate_until(asked) == wanted


# ---------------------------------------------------------------- the file of results


@pytest.mark.parametrize("cut", [0, 1, 20, 30, 60, 100, None])
def test_results_in_a_file_are_used_again(cut, tmp_path):
    """Wherever a killed process has cut the file."""
    path, llama = tmp_path / "results.jsonl", llama_of()
    requests = [("the quick", " fox"), ("the quick", " brown"), ("", "the")]

    def run() -> tuple[list, int]:
        store = Store(llama.model, path)
        model = HarnessModel(llama, store)
        results = log_likelihoods(model, requests)
        store.close()
        return results, model.computed

    first, _ = run()
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    left = len(whole[:cut].splitlines()) - (cut is not None) - 1
    again, computed = run()
    assert again == first
    assert path.read_bytes() == whole
    assert (computed == 0) == (left >= len(requests))
    assert run() == (first, 0)


def test_a_file_of_another_model_or_another_kind_stays_as_it_is(tmp_path):
    path, llama = tmp_path / "results.jsonl", llama_of()
    other = nl.Transformer(ARGS, float_weights(ARGS, seed=1))
    Store(other, path).close()
    damaged = path.read_text().splitlines()
    Store(llama.model, path := tmp_path / "own.jsonl").close()
    head = path.read_text()
    for content, words in (
        ("\n".join(damaged) + "\n", "the results of another model"),
        ("1,2,3\n", "'1,2,3"),
        ("\n" + head, "no results of `eval`"),
        (head + '{"request": "a"}\n', "line 2 is"),
        (head + "[]\n", "line 2 is"),
        (head + '{"request": [], "result": 1}\n', "line 2 is"),
        (head + "{\n", "line 2 is no JSON"),
    ):
        path.write_text(content)
        with pytest.raises(nl.errors.NumpyLlamaError) as caught:
            Store(llama.model, path)
        assert words in str(caught.value) and str(path) in str(caught.value)
        assert path.read_text() == content
    with pytest.raises(nl.errors.FormatError, match="cannot be used"):
        Store(llama.model, tmp_path)
    assert json.loads(head).keys() == {"results of"}

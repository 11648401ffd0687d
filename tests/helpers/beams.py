"""Beam searches, by us and by transformers."""

import warnings
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from numpy_llama.generation.beam import BeamSearch
from numpy_llama.generation.generate import Request, prefill
from numpy_llama.generation.sampling import Sampler
from numpy_llama.generation.session import Session
from numpy_llama.model import Transformer

LENGTH_PENALTIES = -1.0, 0.0, 1.0, 2.0
EARLY_STOPPING = False, True, "never"
SCORES = 1e-5


@dataclass(frozen=True)
class Search:
    """A prompt and the settings of its search."""

    prompt: list[int]
    beams: int
    length_penalty: float
    early_stopping: bool | str
    num_return_sequences: int
    max_tokens: int
    repetition_penalty: float
    stop_ids: list[int]


def searches(V: int, ends: list[list[int]], each: int = 5) -> list[Search]:
    """Each length penalty with each rule of stopping, `each` times; what else there is comes by chance."""
    rng, found = np.random.default_rng(5), []
    for length_penalty, early_stopping in each * list(product(LENGTH_PENALTIES, EARLY_STOPPING)):
        beams = int(rng.integers(2, 7))
        found.append(
            Search(
                prompt=rng.integers(3, V, rng.integers(1, 9)).tolist(),
                beams=beams,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
                num_return_sequences=int(rng.choice([1, beams])),
                max_tokens=int(rng.integers(1, 17)),
                repetition_penalty=float(rng.choice([1.0, 1.0, 1.3])),
                stop_ids=ends[rng.integers(len(ends))],
            )
        )
    return found


def by_us(model: Transformer, search: Search) -> list[tuple[list[int], float]]:
    """The new ids of each text, to its end id, and its score."""
    sampler = Sampler(repetition_penalty=search.repetition_penalty)
    session = Session(model, len(search.prompt) + search.max_tokens)
    request = Request(search.prompt, session, sampler, search.max_tokens, search.stop_ids)
    options = search.beams, search.length_penalty, search.early_stopping, search.num_return_sequences
    found = BeamSearch(*options)(model, request, prefill(model, request))
    return [(beam.ids, beam.score) for beam in found]


def assert_same(model: Transformer, search: Search, expected: list[tuple[list[int], float]]) -> None:
    """The same ids, and scores within the rounding of float32 logits and of sums of float32."""
    found = by_us(model, search)
    assert [ids for ids, _ in found] == [ids for ids, _ in expected], search
    scores = [[score for _, score in texts] for texts in (found, expected)]
    np.testing.assert_allclose(*scores, rtol=SCORES, err_msg=str(search))


def by_transformers(model: LlamaForCausalLM, search: Search) -> list[tuple[list[int], float]]:
    """The same."""
    config = GenerationConfig(
        num_beams=search.beams,
        length_penalty=search.length_penalty,
        early_stopping=search.early_stopping,
        num_return_sequences=search.num_return_sequences,
        max_new_tokens=search.max_tokens,
        repetition_penalty=search.repetition_penalty,
        eos_token_id=search.stop_ids or None,
        pad_token_id=model.config.vocab_size,  # no id of a text
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    model.generation_config.eos_token_id = None  # it would take the place of no end id
    prompt = torch.tensor([search.prompt])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        found = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    texts = [
        [i for i in ids if i < config.pad_token_id][prompt.shape[1] :] for ids in found.sequences.tolist()
    ]
    return list(zip(texts, found.sequences_scores.tolist(), strict=True))

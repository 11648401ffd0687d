"""A tiny language, and a tiny model of it: the experiments of chapters 18 to 20 take seconds.

A sentence has eight words: number colour animal verb number colour animal and a full stop, as in "two red
foxes see one black hen ." All sentences are equally likely, so the lowest possible loss is known.
"""

from functools import cache
from itertools import chain

import numpy as np

from numpy_llama import functional as F
from numpy_llama.learner import Learner
from numpy_llama.model import Transformer
from numpy_llama.training.examples import Example
from numpy_llama.training.lora import TARGETS, with_lora
from numpy_llama.training.models import new_args, new_weights
from numpy_llama.training.objectives import NextToken
from numpy_llama.training.optimizer import AdamW, Hyperparameters, adamw
from numpy_llama.training.order import Order
from numpy_llama.training.trainer import Schedule, Trainer

NUMBERS, COLOURS = ["one", "two"], ["red", "blue", "green", "black"]
ANIMALS = [["dog", "dogs"], ["cat", "cats"], ["fox", "foxes"], ["hen", "hens"], ["cow", "cows"]]
VERBS = [["sees", "see"], ["hears", "hear"], ["likes", "like"]]  # of one animal, of two
BOS = "<s>"
WORDS = [BOS, *NUMBERS, *COLOURS, *chain(*ANIMALS, *VERBS), "."]  # a word is a token
LENGTH = 8
SENTENCES = len(VERBS) * (len(NUMBERS) * len(COLOURS) * len(ANIMALS)) ** 2
FLOOR = np.log(SENTENCES) / LENGTH  # nats a token: no model can have a lower loss on new sentences


def sentence(rng):
    """A random sentence of the grammar, as a list of words."""
    first, second = rng.integers(2, size=2)
    colours = rng.choice(COLOURS, 2)
    animals = [ANIMALS[i] for i in rng.integers(len(ANIMALS), size=2)]
    verb = VERBS[rng.integers(len(VERBS))][first]
    return [
        *(NUMBERS[first], str(colours[0]), animals[0][first], verb),
        *(NUMBERS[second], str(colours[1]), animals[1][second], "."),
    ]


def is_sentence(words):
    """Whether the grammar allows it."""
    if len(words) != LENGTH or words[0] not in NUMBERS or words[4] not in NUMBERS:
        return False
    first, second = NUMBERS.index(words[0]), NUMBERS.index(words[4])
    allowed = [NUMBERS, COLOURS, [a[first] for a in ANIMALS], [v[first] for v in VERBS]]
    allowed += [NUMBERS, COLOURS, [a[second] for a in ANIMALS], ["."]]
    return all(word in words for word, words in zip(words, allowed, strict=True))


def example(words, begin=0):
    """BOS and the words. The words from `begin` on are trained."""
    ids = np.array([WORDS.index(word) for word in [BOS, *words]])
    return Example(ids, np.arange(len(words)) >= begin, " ".join(words))


def rows(n, seed):
    """n random sentences, each a row of its own."""
    rng = np.random.default_rng(seed)
    return [(example(sentence(rng)),) for _ in range(n)]


def new_learner(seed=0, frozen=False, weights=None):
    """A model of two layers that has read nothing yet, or one with these weights."""
    args = new_args(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=len(WORDS), max_seq_len=64)
    if weights is None:
        weights = new_weights(args, seed)
        # Words of one group stay apart, so that an adapter can choose one of them while the output is frozen.
        weights["tok_embeddings.weight"] *= 10
    return Learner(Transformer(args, weights), frozen=frozen)


@cache
def learnt(steps=120, lr=1e-2, update=adamw):
    """A model that has read 32 sentences a step, and its losses."""
    learner, read = new_learner(), rows(2000, seed=1)
    optimizer = AdamW(learner.parameters(), Hyperparameters(lr), update)
    schedule = Schedule(steps, warmup=10)
    trainer = Trainer(learner, optimizer, read, Order(len(read), 32), NextToken(), schedule, 4096)
    return learner, [step.loss for step in trainer.steps()]


def continued(learner, prompts, rng):
    """Sampled sentences: (n, t) ids, BOS first -> (n, 1 + LENGTH) ids."""
    ids = np.array(prompts)
    while ids.shape[1] <= LENGTH:
        p = F.softmax(learner(ids)[:, -1].astype(np.float64))
        drawn = (p.cumsum(axis=1) > rng.random((len(ids), 1))).argmax(axis=1)
        ids = np.concatenate([ids, drawn[:, None]], axis=1)
    return ids


def words_of(ids):
    """The words behind BOS."""
    return [WORDS[i] for i in ids[1:]]


def frozen_base():
    """The learnt model as a base that does not learn, for adapters. It shares the weights of `learnt`."""
    weights = learnt()[0].parameters()
    return new_learner(frozen=True, weights=weights | {"output.weight": weights["tok_embeddings.weight"]})


def with_adapter(base, rank=8, alpha=16):
    """The base with LoRA beside every matrix of its layers."""
    return with_lora(base, [*TARGETS], rank, alpha / rank)


def pairs(n, seed):
    """Two endings of one sentence: the chosen one names foxes, the rejected one another animal."""
    rng, made = np.random.default_rng(seed), []
    others = [animal for animal in ANIMALS if animal[0] != "fox"]
    for _ in range(n):
        words = sentence(rng)
        number = NUMBERS.index(words[4])
        endings = ["fox", "foxes"][number], others[rng.integers(len(others))][number]
        made.append(tuple(example([*words[:6], animal, "."], begin=6) for animal in endings))
    return made

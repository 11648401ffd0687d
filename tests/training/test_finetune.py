"""Fine-tuning a model of a file by LoRA, all weights, or preferences: its results, and resumed runs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_models import SPEAKER, float_weights, write_speaker

import numpy_llama as nl
from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.checkpoint.adapters import open_adapter
from numpy_llama.errors import ContextOverflowError, MismatchError, ParameterError
from numpy_llama.lora import adapted
from numpy_llama.training.compute import numpy_compute
from numpy_llama.training.data import read_data
from numpy_llama.training.finetune import RESULT, LoRA, finetune
from numpy_llama.training.lora import TARGETS, low_ranks, scale_of, with_lora
from numpy_llama.training.optimizer import Hyperparameters
from numpy_llama.training.run import open_folder, prompt_of, sample
from numpy_llama.training.trainer import Schedule

FACTS = [{"prompt": f"{a} is", "completion": f" {b}"} for a, b in ("a1", "b2", "c3", "d4")]
PAIRS = [{"prompt": f"{a}?", "chosen": "yes", "rejected": "no"} for a in "abcd"]
STEPS = 4
IDS = np.array([[1, 5, 9, 200, 7]])


def write(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    write_speaker(folder / "model.gguf")
    write(folder / "lora.jsonl", FACTS)
    write(folder / "dpo.jsonl", PAIRS)
    write(folder / "full.jsonl", FACTS)
    return folder


def begin(folder: Path, out: Path, method: str = "lora", resume: bool = False, data=None, **options):
    options = {"seq_len": 24, "batch_size": 3} | options
    steps, lora = options.pop("steps", STEPS), options.pop("lora", LoRA(4, 8.0, False, ["q_proj", "v_proj"]))
    with open_folder(out, resume) as opened:
        return finetune(
            open_checkpoint(folder / "model.gguf"),
            read_data(folder / f"{method}.jsonl" if data is None else data),
            opened,
            method,
            numpy_compute(),
            Hyperparameters(1e-2, beta2=0.999, weight_decay=0.01),
            Schedule(steps),
            lora,
            **options,
        )[0]


def finish(run) -> None:
    run.run(lambda report: None, eval_every=2, save_every=2)


def model_of(path: Path):
    return nl.load(path, backend="numpy").model


@pytest.mark.parametrize("rslora", [False, True])
def test_the_adapter_that_is_saved_is_the_one_that_was_trained(rslora, folder, tmp_path):
    """Its scale too, and the rows of q_proj, which the folder has in another order. K is less than H."""
    run = begin(folder, tmp_path / "run", lora=LoRA(4, 6.0, rslora, [*TARGETS]))
    finish(run)
    adapter = open_adapter(tmp_path / "run")
    base = model_of(folder / "model.gguf")
    with_it = adapted(base, [adapter.low_ranks(SPEAKER)])
    expected = run.trainer.learner(IDS)
    np.testing.assert_allclose(with_it(IDS), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(base(IDS) - expected).max() > 0.05
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 4


def test_full_fine_tuning_writes_a_model_with_the_tokenizer_of_its_source(folder, tmp_path):
    run = begin(folder, tmp_path / "run", "full")
    assert run.trainer.optimizer.parameters["layers.0.attention.wq.weight"].dtype == np.float32
    finish(run)
    written = nl.load(tmp_path / "run" / RESULT, backend="numpy")
    np.testing.assert_allclose(written.model(IDS), run.trainer.learner(IDS), rtol=1e-5, atol=1e-5)
    assert np.abs(written.model(IDS) - model_of(folder / "model.gguf")(IDS)).max() > 0.05
    assert written.tokenizer.encode("abc", bos=True) == [256, 97, 98, 99]


@pytest.mark.parametrize("method", ["lora", "full", "dpo"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(method, folder, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(begin(folder, whole, method))

    def interrupt(report):
        if report.step.number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin(folder, cut, method).run(interrupt, eval_every=2, save_every=2)
    resumed = begin(folder, cut, method, resume=True)
    assert resumed.trainer.optimizer.t == 3
    finish(resumed)
    result = RESULT if method == "full" else "adapter_model.safetensors"
    for name in ("state.safetensors", result):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name


def test_a_run_is_resumed_with_its_own_model_and_adapter(folder, tmp_path):
    finish(begin(folder, tmp_path / "run"))
    with pytest.raises(MismatchError, match="begun with rank 4, and is now to have 2"):
        begin(folder, tmp_path / "run", resume=True, lora=LoRA(2, 8.0, False, ["q_proj", "v_proj"]))
    with pytest.raises(MismatchError, match="begun with method 'lora', and is now to have 'full'"):
        begin(folder, tmp_path / "run", "full", resume=True)
    (tmp_path / "other").mkdir()
    from helpers.gguf_writer import byte_vocabulary, write_llama

    write_llama(
        tmp_path / "other" / "model.gguf", SPEAKER, float_weights(SPEAKER, seed=1), **byte_vocabulary(259)
    )
    write(tmp_path / "other" / "lora.jsonl", FACTS)
    with pytest.raises(MismatchError, match=r"begun with other model: give the old model"):
        begin(tmp_path / "other", tmp_path / "run", resume=True)


def test_memory_is_planned_for_the_longest_row_of_all_splits(folder, tmp_path):
    """Validation and test keep the activations of a row, as training does."""
    for split, text in (("train", "a"), ("valid", "b" * 30), ("test", "c" * 40)):
        write(tmp_path / f"{split}.jsonl", [{"prompt": "p", "completion": text}])
    run = begin(folder, tmp_path / "run", data=tmp_path, seq_len=64)
    assert run.trainer.most_tokens == max(len(one) for (one,) in run.test) > 40


def test_the_numbers_of_dpo_are_in_the_log(folder, tmp_path):
    finish(begin(folder, tmp_path / "run", "dpo", steps=8))
    lines = (tmp_path / "run" / "log.csv").read_text().splitlines()
    at = lines[0].split(",").index("rewards/margins")
    assert float(lines[1].split(",")[at]) == 0 < float(lines[-1].split(",")[at])


def test_a_model_learns_facts(folder, tmp_path):
    """And answers them: the stop token ends each answer."""
    lora = LoRA(8, 16.0, False, [*TARGETS])
    run = begin(folder, tmp_path / "run", steps=60, batch_size=4, lora=lora)
    finish(run)
    tokenizer = open_checkpoint(folder / "model.gguf").tokenizer()
    for fact, (example,) in zip(FACTS, run.trainer.rows, strict=True):
        assert sample(run.trainer.learner, tokenizer, prompt_of(example)) == fact["completion"]


@pytest.mark.parametrize(
    "method, data, options, error, found",
    [
        ("dpo", FACTS, {}, ParameterError, "line 1 has completions; --method dpo takes prompt, chosen"),
        ("lora", PAIRS, {}, ParameterError, "line 1 has preferences; --method lora takes"),
        ("lora", FACTS, {"seq_len": 65}, ContextOverflowError, "--seq-len is 65, .* has 64 tokens"),
        ("lora", FACTS, {"seq_len": 2}, ParameterError, "no example has a target within --seq-len 2"),
        ("dpo", PAIRS, {"beta": 0.0}, ParameterError, "beta is 0.0, it must be above 0"),
        (
            "dpo",
            PAIRS,
            {"lora": LoRA(65, 8.0, False, [*TARGETS])},
            ParameterError,
            "--rank is 65, .* up to 64",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(method, data, options, error, found, folder, tmp_path):
    path = write(tmp_path / "data.jsonl", data)
    with pytest.raises(error, match=found):
        begin(folder, tmp_path / "run", method, data=path, **options)


def test_a_row_is_no_longer_than_the_sliding_window(folder, tmp_path):
    write_speaker(tmp_path / "model.gguf", replace(SPEAKER, sliding_window=20))
    data, wanted = folder / "lora.jsonl", "--seq-len is 21, .* has a sliding window of 20 tokens"
    begin(tmp_path, tmp_path / "run", data=data, seq_len=20)
    with pytest.raises(ParameterError, match=wanted):
        begin(tmp_path, tmp_path / "other", data=data, seq_len=21)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_an_adapter_that_could_have_no_effect_is_refused(alpha):
    with pytest.raises(ParameterError, match=r"alpha is .*, it must be above 0"):
        LoRA(4, alpha, False, [*TARGETS])


@pytest.mark.parametrize(
    "targets, found", [(["q_proj", "wq"], "targets has 'wq', wanted names"), ([], "empty")]
)
def test_an_adapter_stands_beside_matrices_that_there_are(targets, found):
    with pytest.raises(ParameterError, match=found):
        LoRA(4, 8.0, False, targets)


def test_an_adapter_begins_without_effect_and_has_the_shapes_of_its_matrices():
    from helpers.training import tiny_learner

    base = tiny_learner(frozen=True)
    learner = with_lora(base, [*TARGETS], 3, scale_of(3, 6.0), 0, np.float64)
    ids = np.array([[1, 2, 3]])
    np.testing.assert_array_equal(learner(ids), base(ids))
    assert base.parameters() == {} and len(learner.parameters()) == 2 * 7 * base.args.n_layers
    updates = low_ranks(learner)
    assert updates["layers.1.attention.wk.weight"].b.shape == (12, 3)  # two key heads of 6
    assert {one.scale for one in updates.values()} == {2.0} and scale_of(4, 6.0, rslora=True) == 3.0

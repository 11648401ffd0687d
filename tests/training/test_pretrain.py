"""Training from scratch: the folder that comes out, runs that are resumed or killed, and PyTorch's losses."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers.training import CORPUS, STEPS, begin, finish

import numpy_llama as nl
from numpy_llama.backend.formats import StoredTensor
from numpy_llama.checkpoint import load_tokenizer, open_checkpoint
from numpy_llama.checkpoint.files import part_beside
from numpy_llama.errors import (
    ConfigError,
    FormatError,
    MismatchError,
    NumericsError,
    ParameterError,
    ResourceLimitError,
    TextError,
    TokenizerError,
)
from numpy_llama.training import run as runs
from numpy_llama.training.models import float_weights, new_args, new_weights, trained_tokenizer
from numpy_llama.training.optimizer import AdamW, Hyperparameters
from numpy_llama.training.state import save_state


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(CORPUS)
    return path


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    finish(begin(out, corpus))
    return out


def same_files(left: Path, right: Path) -> bool:
    names = ("state.safetensors", "model.safetensors", "config.json", "tokenizer.model")
    return all((left / name).read_bytes() == (right / name).read_bytes() for name in names)


def losses(out: Path) -> list[str]:
    return [line.split(",")[1] for line in (out / "log.csv").read_text().splitlines()]


def test_the_result_is_a_folder_that_runs_here_and_in_transformers(finished):
    llama = nl.load(finished, backend="numpy")
    assert llama.generate("The quick", max_tokens=3).tokens
    ids = np.array([llama.tokenizer.encode("The old cat", bos=True)])
    theirs = transformers.LlamaForCausalLM.from_pretrained(finished, dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(
        llama.model(ids), logits, rtol=1e-4, atol=1e-5
    )  # float32, sums in other orders


def test_the_losses_of_a_run_fall_and_are_written(finished):
    rows = [line.split(",") for line in (finished / "log.csv").read_text().splitlines()]
    assert rows[0][:4] == ["step", "loss", "lr", "grad_norm"] and rows[0][-1] == "valid_loss"
    assert [row[0] for row in rows[1:]] == [str(i) for i in range(1, STEPS + 1)]
    assert float(rows[-1][1]) < float(rows[1][1]) and [bool(row[-1]) for row in rows[1:]] == [False, True] * 3
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_losses_are_pytorchs(finished, corpus, tmp_path):
    """The same weights, rows and steps in transformers, with PyTorch's AdamW, clipping and schedule."""
    run = begin(tmp_path / "run", corpus)
    trainer, args = run.trainer, run.trainer.learner.args
    run.write_result()
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.float32)
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    groups = [
        {"params": matrices},
        {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    h = trainer.optimizer.hyperparameters
    optimizer = torch.optim.AdamW(groups, 1.0, (h.beta1, h.beta2), h.eps, h.weight_decay)
    assert args.n_layers * 7 + 1 == len(matrices)  # the output is the embedding
    for step in range(STEPS):
        rows = [trainer.rows[i] for i in trainer.order(step)]
        ours = trainer.step()
        loss = 0
        for example in (one for row in rows for one in row):
            logits = theirs(torch.tensor(example.ids[None, :-1].astype(int))).logits[0]
            target = torch.tensor(example.ids[1:].astype(int))
            loss = loss + torch.nn.functional.cross_entropy(logits, target, reduction="sum")
        loss = loss / sum(len(one) for row in rows for one in row)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), h.max_norm)
        for group in optimizer.param_groups:
            group["lr"] = ours.lr
        optimizer.step()
        assert abs(ours.loss - loss.item()) < 2e-4  # float32; AdamW divides by the size of tiny gradients


@pytest.mark.parametrize("at", [1, 4])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(at, finished, corpus, tmp_path):
    out = tmp_path / "run"

    def interrupt(report):
        if report.step.number == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin(out, corpus).run(interrupt, eval_every=2, save_every=100)
    resumed = begin(out, corpus, resume=True)
    assert resumed.trainer.optimizer.t == at
    finish(resumed)
    assert same_files(out, finished) and losses(out) == losses(finished)


@pytest.mark.parametrize("moment", ["while AdamW changes the numbers", "before the validation loss"])
def test_a_step_that_is_saved_has_its_row(moment, finished, corpus, tmp_path, monkeypatch):
    """Whenever Ctrl-C comes. Only its validation loss may be missing."""
    out = tmp_path / "run"
    run = begin(out, corpus)
    update, evaluate = run.trainer.optimizer.update, run.trainer.evaluate

    def updated(p, g, m, v, t, *others):
        update(p, g, m, v, t, *others)
        if t == 4 and moment.startswith("while"):
            signal.raise_signal(signal.SIGINT)

    def evaluated(rows):
        if run.trainer.optimizer.t == 4:
            raise KeyboardInterrupt
        return evaluate(rows)

    monkeypatch.setattr(run.trainer.optimizer, "update", updated)
    monkeypatch.setattr(run.trainer, "evaluate", evaluated)
    with pytest.raises(KeyboardInterrupt):
        finish(run)
    assert losses(out) == losses(finished)[: 1 + 4]
    resumed = begin(out, corpus, resume=True)
    assert resumed.trainer.optimizer.t == 4
    finish(resumed)
    assert same_files(out, finished) and losses(out) == losses(finished)


PROGRAM = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from helpers.training import begin
out, corpus, kill_at, place = sys.argv[2:]
run = begin(Path(out), Path(corpus))
renames = 0
rename = os.replace
def replace(source, to):
    if str(to).endswith("state.safetensors"):
        global renames
        renames += 1
        if renames == int(kill_at) and place == "before": os.kill(os.getpid(), 9)
    rename(source, to)
    if str(to).endswith("state.safetensors") and renames == int(kill_at): os.kill(os.getpid(), 9)
os.replace = replace
run.run(lambda report: None, eval_every=2, save_every=1)
"""


@pytest.mark.parametrize("kill_at, place", [(1, "before"), (3, "after")])
def test_a_run_that_was_killed_while_saving_goes_on_with_the_same_bits(
    kill_at, place, finished, corpus, tmp_path
):
    out = tmp_path / "run"
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parents[1]), str(out), str(corpus)]
    done = subprocess.run([*command, str(kill_at), place], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    saved = kill_at - (place == "before")
    resumed = begin(out, corpus, resume=True)
    assert resumed.trainer.optimizer.t == saved
    assert not [name for name in os.listdir(out) if name.endswith(".part")]
    finish(resumed)
    assert same_files(out, finished)


def test_a_full_disk_ends_the_run_and_the_last_state_stands(corpus, tmp_path, monkeypatch):
    out = tmp_path / "run"
    run = begin(out, corpus)
    free = type("Usage", (), {"free": 100})

    def fill(report):
        if report.step.number == 3:
            monkeypatch.setattr("shutil.disk_usage", lambda path: free)

    with pytest.raises(ResourceLimitError, match=r"state.safetensors needs .* bytes, the disk has 100 left"):
        run.run(fill, eval_every=2, save_every=2)
    monkeypatch.undo()
    assert begin(out, corpus, resume=True).trainer.optimizer.t == 2


def test_a_run_can_be_made_longer_but_not_changed(finished, corpus, tmp_path):
    out = tmp_path / "run"
    finish(begin(out, corpus))
    longer = begin(out, corpus, resume=True, steps=STEPS + 1)
    finish(longer)
    assert longer.trainer.optimizer.t == STEPS + 1
    with pytest.raises(MismatchError, match="begun with seed 3, and is now to have 4"):
        begin(out, corpus, resume=True, seed=4)
    (tmp_path / "corpus.txt").write_text(CORPUS.replace("fox", "box"))
    with pytest.raises(MismatchError, match="begun with n_layers 2, and is now to have 3"):
        begin(out, corpus, resume=True, layers=3)
    with pytest.raises(MismatchError, match="begun with other data: give the old data, or"):
        begin(out, tmp_path / "corpus.txt", resume=True)
    with pytest.raises(ParameterError, match=rf"has made {STEPS + 1} steps, --iters is 2: a larger --iters"):
        begin(out, corpus, resume=True, steps=2)


def test_a_run_is_resumed_with_its_own_tokenizer(finished, corpus, tmp_path):
    """Without --tokenizer too, because the folder has it."""
    out = tmp_path / "run"
    finish(begin(out, corpus, steps=1))
    given = {"resume": True, "vocab_size": None}
    begin(out, corpus, tokenizer_path=finished / "tokenizer.model", **given)
    (tmp_path / "tokenizer.model").write_bytes(trained_tokenizer([CORPUS], 310))
    with pytest.raises(MismatchError, match=r"model is not the tokenizer that the run was begun with: leave"):
        begin(out, corpus, tokenizer_path=tmp_path / "tokenizer.model", **given)
    shutil.copyfile(finished / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(MismatchError, match="is not the tokenizer"):
        begin(out, corpus, tokenizer_path=tmp_path, **given)


def test_a_run_is_resumed_by_its_own_command(corpus, tmp_path):
    optimizer = AdamW({}, Hyperparameters(1e-2))
    save_state(tmp_path / "state.safetensors", optimizer, {"method": "lora"})
    with pytest.raises(MismatchError, match="begun with method 'lora', and is now to have 'train'"):
        begin(tmp_path, corpus, resume=True)


def test_a_folder_with_files_is_not_overwritten(finished, corpus):
    with pytest.raises(ParameterError, match="has files already: --resume continues"):
        begin(finished, corpus)


def test_a_run_that_was_killed_in_its_first_file_is_begun_anew(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    part = part_beside(tmp_path / "log.csv").name.replace(f"-{os.getpid()}-", f"-{ended.pid}-")
    (tmp_path / part).touch()
    with runs.open_folder(tmp_path, False) as folder:
        assert folder.state is None and os.listdir(tmp_path) == []


def test_files_that_are_not_of_a_run_are_never_replaced(corpus, tmp_path):
    """Not with `resume` either: config.json and model.safetensors may be a model that somebody needs."""
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(ParameterError, match="has files, and no run that can be resumed"):
        begin(tmp_path, corpus, resume=True)
    assert (tmp_path / "config.json").read_text() == "mine" and len(os.listdir(tmp_path)) == 1


def test_weights_that_are_not_finite_are_never_saved(corpus, tmp_path):
    """After a step no loss has shown them yet."""
    run = begin(tmp_path / "run", corpus, steps=5)

    def spoil(report):
        if report.step.number == 3:
            run.trainer.learner.norm.weight[0] = np.inf
            raise KeyboardInterrupt

    with pytest.raises(NumericsError, match=r"after step 3 a weight is not finite.* lower --lr"):
        run.run(spoil, eval_every=9, save_every=2)
    assert begin(tmp_path / "run", corpus, steps=5, resume=True).trainer.optimizer.t == 2
    run = begin(tmp_path / "other", corpus, steps=5)
    run.trainer.optimizer.update = lambda p, *others: p.fill(np.nan)
    with pytest.raises(NumericsError, match=r"after step 1 a weight is not finite"):
        run.run(lambda report: None, eval_every=1, save_every=9)


def test_an_interrupted_last_save_is_made_up_for(corpus, tmp_path, monkeypatch):
    run = begin(tmp_path / "run", corpus, steps=2)
    write, calls = run.write_result, []

    def interrupted():
        calls.append(None)
        if len(calls) == 1:
            raise KeyboardInterrupt
        write()

    run.write_result = interrupted
    with pytest.raises(KeyboardInterrupt):
        finish(run, save_every=9)
    assert run.saved == 2 and (tmp_path / "run" / "model.safetensors").exists()


def test_a_result_that_a_killed_run_did_not_write_is_written_by_a_resumed_one(finished, corpus, tmp_path):
    """The state of the last step is saved before the result."""
    out = tmp_path / "run"
    finish(begin(out, corpus))
    (out / "model.safetensors").unlink()
    finish(begin(out, corpus, resume=True))
    assert same_files(out, finished)


def test_half_a_surrogate_pair_is_named_with_its_line(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n{"text": "a \\ud800"}\n')
    with pytest.raises(TextError, match=r"line 2: character 2 of the text is U\+D800"):
        begin(tmp_path / "run", tmp_path / "data.jsonl")


def test_an_existing_tokenizer_is_copied(finished, corpus, tmp_path):
    run = begin(tmp_path / "run", corpus, tokenizer_path=finished / "tokenizer.model", vocab_size=None)
    assert run.trainer.learner.args.vocab_size == 300
    assert (tmp_path / "run" / "tokenizer.model").read_bytes() == (finished / "tokenizer.model").read_bytes()
    with pytest.raises(TokenizerError, match=r"wanted tokenizer.model or tokenizer.json"):
        begin(tmp_path / "other", corpus, tokenizer_path=corpus)
    with pytest.raises(TokenizerError, match="cannot make 100 pieces"):
        begin(tmp_path / "other", corpus, vocab_size=100)
    assert not (tmp_path / "other").exists()  # so another attempt needs no --resume
    with pytest.raises(ParameterError, match=r"--vocab-size is 301, .* has 300 tokens"):
        begin(tmp_path / "third", corpus, tokenizer_path=finished, vocab_size=301)


def test_one_run_at_a_time_uses_a_folder(tmp_path):
    """From before its first file to its end."""
    out = tmp_path / "run"
    for resume in (False, True):
        with runs.open_folder(out, resume):
            for other in (False, True):
                with (
                    pytest.raises(ParameterError, match="run: a run trains in it now: wait for its end"),
                    runs.open_folder(out, other),
                ):
                    pass
            (out / runs.LOG).touch()
    assert os.listdir(out) == [runs.LOG]


def test_an_attempt_that_failed_before_its_first_step_is_begun_anew(finished, corpus, tmp_path, monkeypatch):
    """With corrected options, and without the tokenizer of the first attempt."""
    out = tmp_path / "run"
    shutil.copyfile(finished / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with monkeypatch.context() as patch, pytest.raises(ResourceLimitError):
        patch.setattr("numpy_llama.training.pretrain.available_memory", lambda: 0)
        begin(out, corpus, tokenizer_path=tmp_path / "tokenizer.model", vocab_size=None)
    assert (out / "tokenizer_config.json").exists()
    with pytest.raises(ParameterError, match="--resume begins its run anew, which saved no step"):
        begin(out, corpus)
    finish(begin(out, corpus, resume=True))
    assert same_files(out, finished) and not (out / "tokenizer_config.json").exists()


def test_a_run_is_resumed_with_its_own_number_of_tokens(corpus, tmp_path):
    finish(begin(tmp_path / "run", corpus, steps=1))
    with pytest.raises(ParameterError, match=r"--vocab-size is 301, the tokenizer of .*run has 300 tokens"):
        begin(tmp_path / "run", corpus, steps=1, vocab_size=301, resume=True)


def test_only_texts_train_a_new_model(tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    with pytest.raises(ParameterError, match="line 1: training from scratch takes texts"):
        begin(tmp_path / "run", tmp_path / "data.jsonl")
    assert not (tmp_path / "run").exists()


# --- what a run begins with ---


def test_a_vocabulary_is_made_as_llamas(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(trained_tokenizer([CORPUS], 300))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    text = "The old fox, 1234!\n\n  日本 <s>"
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.add_bos
    assert len(tokenizer.encode("1234")) == 5  # a space, and digits that stand alone
    assert tokenizer.bos_id == 1 and tokenizer.eos_ids[0] == 2 and tokenizer.vocab_size == 300


@pytest.mark.parametrize("size, found", [(100, "too small|smaller"), (5000, "too high|less|<=")])
def test_an_impossible_vocabulary_is_refused_with_the_reason(size, found):
    with pytest.raises(
        TokenizerError, match=f"cannot make {size} pieces of the corpus: .*({found}).*--vocab-size"
    ):
        trained_tokenizer([CORPUS], size)


def test_new_weights_keep_the_residual_stream_small():
    args = new_args(64, 5, 8, 4, 512, 256)
    assert (args.head_dim, args.hidden_dim) == (8, 192)
    weights = new_weights(args, 0)
    assert weights["output.weight"] is weights["tok_embeddings.weight"]
    assert abs(weights["layers.0.attention.wq.weight"].std() / 0.02 - 1) < 0.05
    assert abs(weights["layers.4.feed_forward.w_down.weight"].std() * np.sqrt(10) / 0.02 - 1) < 0.05
    assert all(w.dtype == np.float32 for w in weights.values()) and (weights["norm.weight"] == 1).all()
    with pytest.raises(ConfigError, match="n_heads is 8, it must be a multiple of n_kv_heads 3"):
        new_args(64, 5, 8, 3, 512, 256)


def test_weights_that_learn_are_float32_and_tied_ones_stay_one(finished):
    weights = float_weights(open_checkpoint(finished).weights())
    assert weights["output.weight"] is weights["tok_embeddings.weight"]
    assert all(w.dtype == np.float32 and w.flags.writeable for w in weights.values())


def test_weights_of_fewer_bits_move_by_steps_that_these_cannot_hold():
    stored = StoredTensor.quantize(np.linspace(0.5, 1, 64, dtype=np.float32).reshape(2, 32), "BF16")
    weights = float_weights({"w": stored})
    before = weights["w"].copy()
    AdamW(weights, Hyperparameters(1e-5)).step({"w": np.ones((2, 32), np.float32)}, 1e-5)
    assert (weights["w"] < before).all()
    assert (StoredTensor.quantize(weights["w"], "BF16").data == stored.data).mean() > 0.9


def test_the_room_of_a_run_is_named_when_it_cannot_be_made(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="run cannot be made"):
        begin(tmp_path / "file" / "run", corpus)
    with runs.open_folder(tmp_path / "new", True) as folder:
        assert folder.state is None
    assert not (tmp_path / "new").exists()

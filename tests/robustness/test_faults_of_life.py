"""What befalls a program in life, what its user then gets, and the test that shows it.

Closed pipe (`| head`): it ends without a word, exit code 0, and computes no further.
    test_cli.py::test_a_pipe_that_closes_early_ends_it_quietly, hostile U02
No terminal: no colours, no bar, no sign to type at; streams that are closed make no traceback.
    test_without_a_terminal_there_is_only_text, test_cli.py::test_closed_streams_make_no_traceback
Nothing on standard input, or /dev/null: one line that there is nothing to do, exit code 2.
    test_cli.py::test_nothing_to_do_is_refused, hostile U04
Input that is not UTF-8: the byte, its offset and the way out, exit code 2.
    test_cli.py::test_input_that_is_no_text_is_refused, hostile U01
Ctrl-C while a model of 8B's shapes loads, reads its prompt or writes: the end within 250 ms, exit code 130.
    test_ctrl_c_ends_it_at_once, hostile U03, test_imports.py::test_ctrl_c_during_the_imports_is_quiet,
    test_numpy_is_called_for_short_times_only, test_weights_are_expanded_some_rows_at_a_time
Ctrl-C while it writes: what was written stays, and its line is ended.
    test_ctrl_c_ends_it_at_once, test_cli.py::test_ctrl_c_while_it_writes_keeps_what_was_written
Ctrl-C in a program that uses the library: KeyboardInterrupt; model and session can be used again.
    hostile U03, test_generate.py::test_an_interrupted_session_can_be_used_again
A second Ctrl-C: the end, at once, whatever was still being tidied up.
    test_a_second_ctrl_c_kills, test_cli.py::test_ctrl_c_in_a_conversation_cuts_the_answer_and_then_ends_it
NaN or infinity on the way: it stops with position, token and first bad layer; the text so far is kept.
    test_numbers_that_are_none_stop_it_where_they_begin, test_the_first_of_many_bad_positions_is_named,
    test_generate.py::test_logits_that_are_no_numbers_stop_it,
    test_batch.py::test_the_sequence_that_fails_is_named, hostile C14
Context full before it begins: refused with both numbers. While it writes: it stops, "length", exit code 0.
    test_cli.py::test_a_prompt_beyond_the_context_is_refused_with_both_numbers, hostile U05,
    test_generate.py::test_a_full_context_ends_with_length
Half a download: one line with both sizes, before any weight is read.
    test_half_an_8b_model_is_refused_at_once, test_cli.py::test_half_a_download_is_refused,
    hostile G23, hostile S10
File cut under the mapping: one line that names it, exit code 1, no core dump.
    hostile F02, test_kernels.py::test_a_file_that_is_cut_under_the_kernels_is_named
File replaced, written to or removed under the mapping: FileChangedError at the next use.
    hostile F03, test_convert.py::test_a_source_that_changes_meanwhile_is_noticed
EIO: a mapped file gives the signal of one that was cut. A terminal that is gone gives one line, exit code 1.
    hostile F02, test_a_terminal_that_is_gone_is_an_error
A path that is no file: one line, no waiting.
    hostile F01
Wrong tokenizer: refused on loading, if it has more ids than the embedding rows, or control ids that it lacks.
    test_a_tokenizer_of_another_model_is_refused, hostile G26, hostile G27,
    test_generate.py::test_a_tokenizer_larger_than_the_embedding_is_refused
Too little memory, of the machine, the container or `ulimit -v`: refused with the numbers and what would fit.
    test_a_container_that_is_too_small_is_an_error_before_loading, hostile U06,
    test_memory.py::test_loading_beyond_a_limit_is_refused_in_one_line,
    test_memory.py::test_a_container_has_a_limit_and_gives_back_what_only_caches
A CPU that lacks AVX-512, AVX_VNNI or AVX2: the next best kernels, in the end the scalar ones; never SIGILL.
    test_the_kernels_are_those_that_the_cpu_has, test_kernels.py::test_the_scalar_kernels_are_always_there,
    test_kernels.py::test_the_instruction_set_can_be_chosen_from_outside, hostile U07
Two threads with one model: each gets what it gets alone.
    test_two_threads_share_a_model, test_layer.py::test_two_python_threads_may_use_one_model
Two threads, or two generations, in one session: refused, and nobody's answer is spoilt.
    test_a_session_at_work_is_refused_to_another_thread,
    test_generate.py::test_two_generations_in_one_session_are_refused
A fork after use: the child computes the same, and does not hang.
    test_a_forked_child_says_the_same,
    test_kernels.py::test_a_forked_child_computes_the_same_and_does_not_hang
Disk full: one line, exit code 1; of `convert` the old file is whole and nothing else is left.
    test_cli.py::test_a_full_disk_is_an_error, test_convert.py::test_a_full_disk_leaves_the_old_file,
    test_convert.py::test_a_disk_without_room_is_seen_beforehand, hostile U08
Ctrl-C, SIGTERM or SIGKILL during `convert`: the old file is whole.
    test_convert.py::test_a_signal_leaves_the_old_file
Names and templates that mean harm: escapes are spelt out, templates run in a sandbox with limits.
    test_a_name_does_not_reach_the_terminal_as_it_is, hostile J01, hostile J05
An upgrade that changes results: golden ids, which change only together with the release notes.
    test_the_default_model_says_what_it_always_said,
    test_readme.py::test_the_first_command_prints_what_is_shown
"""

import ast
import base64
import os
import platform
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import PROGRAM, assert_refused, run
from helpers.generations import write_source
from helpers.gguf_writer import byte_vocabulary, write_llama
from helpers.tiny_models import float_weights, stored
from robustness.hostile.command_line import cpu_seconds, interrupted

import numpy_llama as nl
from numpy_llama import functional
from numpy_llama.backend import build, formats, interruptible, limits
from numpy_llama.backend.formats import FORMATS, StoredTensor
from numpy_llama.checkpoint import memory
from numpy_llama.checkpoint.convert import model_metadata
from numpy_llama.checkpoint.gguf.write import layout
from numpy_llama.checkpoint.names import expected_shape, tensor_names
from numpy_llama.checkpoint.presets import PRESETS
from numpy_llama.errors import NumericsError, ParameterError, ResourceLimitError, TruncatedError
from numpy_llama.generation.generate import generate
from numpy_llama.generation.sampling import Sampler
from numpy_llama.generation.session import Session
from numpy_llama.proof.tiny import TINY_BLOCKS

HERE = Path(__file__).parent


def test_every_row_has_its_test():
    """And each test of this file stands in a row."""
    named = set(re.findall(r"(?:(\w+\.py)::)?(test_\w+)(?!\w*\.py)", __doc__))
    there = {
        (name, test.name)
        for name in {file or Path(__file__).name for file, _ in named}
        for path in HERE.parent.rglob(name)
        for test in ast.parse(path.read_text()).body
        if isinstance(test, ast.FunctionDef)
    }
    assert {(file or Path(__file__).name, test) for file, test in named} <= there
    own = {test for file, test in there if file == Path(__file__).name and test.startswith("test_")}
    assert own - {test for _, test in named} == {"test_every_row_has_its_test"}
    cases = "".join(path.read_text() for path in (HERE / "hostile").glob("*.py"))
    asked = set(re.findall(r"hostile (\w\d\d)", __doc__))
    assert asked == {case for case in asked if f'@case("{case}"' in cases} != set()
    assert {"U01", "U02", "U03", "U04", "U05", "U06", "U07", "U08", "F01", "F02", "F03", "C14"} <= asked


# ---------------------------------------------------------------- Ctrl-C


def sparse_llama(path: Path, args: nl.ModelArgs, format: str = "Q4_0") -> Path:
    """A model of zeros: holes in a file, which take no time to write. It says "a" for ever."""
    tokens = ["a", "<s>", "</s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += [f"word{i}" for i in range(args.vocab_size - len(tokens))]
    vocabulary = {
        "model": "llama",
        "tokens": tokens,
        "scores": np.zeros(len(tokens), np.float32),
        "token_type": np.int32([1, 3, 3, 2] + [6] * 256 + [1] * (len(tokens) - 260)),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    plan = []
    for ours, theirs in tensor_names(args, "gguf").items():
        shape = expected_shape(ours, args)
        plan.append((theirs, FORMATS["F32" if len(shape) == 1 else format], shape))
    metadata = model_metadata(args) | {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}
    head, infos = layout(plan, metadata)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(infos[-1].offset + infos[-1].nbytes)
    return path


@pytest.fixture(scope="module")
def llama_3_8b(tmp_path_factory):
    """Its shapes, of 2 layers for C and of 1 for NumPy, who expands all weights, and so gets few words."""
    args, folder = PRESETS["llama-3-8b"].args, tmp_path_factory.mktemp("8b")
    short = replace(args, n_layers=1, vocab_size=512)
    models = {
        "c": sparse_llama(folder / "c.gguf", replace(args, n_layers=2)),
        "numpy": sparse_llama(folder / "numpy.gguf", short),
    }
    yield models
    for path in models.values():
        path.unlink()


# The program, except that it prints "." when it begins a forward pass, and "!" when it begins to tidy up.
SIGNALLING = """
import os, sys, time
from numpy_llama import __main__, cli
from numpy_llama.generation import generate
def signalling(function, sign, seconds):
    def called(*arguments):
        os.write(1, sign)
        time.sleep(seconds)
        return function(*arguments)
    return called
generate.forward = signalling(generate.forward, b".", 0)
cli._quietly = signalling(cli._quietly, b"!", float(os.environ.get("TIDY_UP_SECONDS", "0")))
sys.exit(__main__.main())
"""
LONG_PROMPT = ",".join(["1"] + ["100"] * 3000)


def generating(model: Path, backend: str, prompt: str) -> list[str]:
    command = [sys.executable, "-c", SIGNALLING, "generate", "--backend", backend, "-n", "4000"]
    return [*command, "-m", str(model), "--prompt-ids", prompt]


@pytest.mark.parametrize("backend", ["c", "numpy"])
@pytest.mark.parametrize("phase", ["load", "prefill", "decode"])
def test_ctrl_c_ends_it_at_once(phase, backend, llama_3_8b):
    """Within 250 ms, in the best of three attempts: beside other work each of ours waits for a CPU too."""
    model, delays = llama_3_8b[backend], iter([0.1, 0.3, 0.6])

    def ready(process: subprocess.Popen) -> bytes:
        seen = b""
        if phase == "load":
            while str(model) not in Path(f"/proc/{process.pid}/maps").read_text():
                time.sleep(0.001)
        elif phase == "prefill":
            seen = process.stdout.read(1)
        else:
            seen = process.stdout.read(4)
        time.sleep(next(delays))
        return seen

    kept = {"load": b"", "prefill": b".", "decode": b".a.a"}[phase]
    interrupted(generating(model, backend, LONG_PROMPT if phase == "prefill" else "1,100"), ready, kept=kept)


def test_a_second_ctrl_c_kills(llama_3_8b):
    """Though all that is left to do would take a minute."""
    command = generating(llama_3_8b["c"], "c", LONG_PROMPT)
    for pause in (0.0, 0.05):
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"TIDY_UP_SECONDS": "60"},
        )
        assert process.stdout.read(1) == b"."
        process.send_signal(signal.SIGINT)
        while process.stdout.read(1) != b"!":
            pass
        time.sleep(pause)
        began, used = time.monotonic(), cpu_seconds(process)
        process.send_signal(signal.SIGINT)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        took = min(time.monotonic() - began, cpu_seconds(process) - used + 0.1)
        _, err = process.communicate()
        assert (process.returncode, err) == (-signal.SIGINT, b"")  # which a shell shows as 130
        assert took < 0.25


@pytest.mark.parametrize("T, S", [(1, 600), (512, 600)])
def test_numpy_is_called_for_short_times_only(T, S, monkeypatch, rng):
    """The same bits or nearly, in several calls, none of them of more work than is meant."""
    calls = []

    def counted(function):
        def call(*arrays):
            out = function(*arrays)
            calls.append(out.size * (arrays[1].shape[1]))  # of w: IN; of k: S
            return out

        return call

    q = rng.standard_normal((1, T, 8, 16), dtype=np.float32)
    k, v = rng.standard_normal((2, 1, S, 4, 16), dtype=np.float32)
    x, w = rng.standard_normal((1, T, 64), dtype=np.float32), rng.standard_normal((777, 64), dtype=np.float32)
    wanted = functional.linear(x, w), functional.attention(q, k, v)
    assert np.array_equal(interruptible.linear(x, w), wanted[0])  # small arguments are not cut
    assert np.array_equal(interruptible.attention(q, k, v), wanted[1])
    monkeypatch.setattr(functional, "linear", counted(functional.linear))
    monkeypatch.setattr(functional, "attention", counted(functional.attention))
    monkeypatch.setattr(interruptible, "LINEAR_WORK", limit := 100 * 64 * max(T, 32))
    np.testing.assert_allclose(interruptible.linear(x, w), wanted[0], rtol=0, atol=1e-4)
    assert len(calls) == 8 and max(calls) <= limit
    calls.clear()
    monkeypatch.setattr(interruptible, "ATTENTION_WORK", limit := q.size * S // 4)
    np.testing.assert_array_equal(interruptible.attention(q, k, v), wanted[1])
    assert calls == [limit] * 4
    calls.clear()
    model = build(ARGS, stored(float_weights(ARGS)), backend="numpy")
    model(np.array([[1, 2]]))
    assert len(calls) == 8 * ARGS.n_layers + 1  # it is they that the readable path runs on


def test_weights_are_expanded_some_rows_at_a_time(monkeypatch, rng):
    tensor, sizes = StoredTensor.quantize(rng.standard_normal((70, 64), dtype=np.float32), "Q8_0"), []
    wanted = tensor.dequantize()

    def dequantize(rows):
        sizes.append(len(rows))
        return FORMATS["Q8_0"].dequantize(rows)

    tensor.format = replace(tensor.format, dequantize=dequantize)
    monkeypatch.setattr(formats, "WEIGHTS_AT_ONCE", 20 * 64)
    tensor.row_order = order = rng.permutation(70)
    np.testing.assert_array_equal(tensor.dequantize(np.float64), wanted[order])
    assert sizes == [20, 20, 20, 10]


# ---------------------------------------------------------------- numbers that are none

# It spells the alphabet. The embedding of a letter is 1 in a place of its own, and the output matrix leads
# from there to the next letter. The layers add nothing, but a "c" overflows in the middle one.
ALPHABET = replace(TINY_BLOCKS, n_layers=3, vocab_size=320, max_seq_len=2048)


def alphabet(folder: Path, bad_layer: int | None = 1, bad_embedding: bool = False) -> Path:
    weights = {n: 0 * w for n, w in float_weights(ALPHABET).items()}
    for w in weights.values():
        if w.ndim == 1:
            w += 1
    for i, letter in enumerate(b"abcdefghij"):
        weights["tok_embeddings.weight"][letter, i] = 1
        weights["output.weight"][letter + 1, i] = 1
    if bad_layer is not None:
        ffn = f"layers.{bad_layer}.feed_forward"
        weights[f"{ffn}.w_gate.weight"][0, 2] = weights[f"{ffn}.w_up.weight"][0, 2] = 1e20
        weights[f"{ffn}.w_down.weight"][0, 0] = 1
    if bad_embedding:
        weights["tok_embeddings.weight"][ord("c"), 7] = np.nan
    return write_llama(folder / "alphabet.gguf", ALPHABET, weights, **byte_vocabulary(320))


@pytest.mark.parametrize("backend", ["c", "numpy"])
def test_numbers_that_are_none_stop_it_where_they_begin(backend, tmp_path):
    """What came before is there, on the command line and in the library; and nothing is drawn from it."""
    path = alphabet(tmp_path)
    done = run("generate", "-m", str(path), "--backend", backend, "a")
    assert (done.returncode, done.stdout) == (1, b"bc\n")
    assert done.stderr.decode().count("\n") == 1
    assert "position 2, token 99: what comes out of layer 1, the first to go wrong," in done.stderr.decode()

    llama, pieces = nl.load(path, backend=backend), []
    session = llama.new_session()
    with pytest.raises(NumericsError, match=r"position 2, token 99: .* layer 1"):
        pieces.extend(llama.stream("a", session=session))
    assert "".join(piece.text for piece in pieces) == "bc"
    assert llama.generate("d", max_tokens=3, session=session).text == "efg"  # the model and the session go on

    llama = nl.load(alphabet(tmp_path, None, bad_embedding=True), backend=backend)
    with pytest.raises(NumericsError, match="position 2, token 99: its embedding is not finite"):
        llama.generate("a")


def test_the_first_of_many_bad_positions_is_named(tmp_path):
    """Whoever looks back at it goes wrong as well, in later layers even at once."""
    llama = nl.load(alphabet(tmp_path, 0))
    with pytest.raises(NumericsError, match=r"position 3, token 99: .* layer 0, the first"):
        llama.generate("abacadc")


# ---------------------------------------------------------------- files, memory, processor


def test_half_an_8b_model_is_refused_at_once(llama_3_8b, tmp_path):
    """None of its weights is read, and the refusal takes less than 1 s of CPU time."""
    whole = llama_3_8b["c"].stat().st_size
    half = tmp_path / "half.gguf"
    with llama_3_8b["c"].open("rb") as file:
        half.write_bytes(file.read(8 << 20))
    os.truncate(half, whole // 2)
    before, began = memory.peak_memory(), time.process_time()
    with pytest.raises(TruncatedError, match="incomplete copy or download") as caught:
        nl.load(half)
    assert time.process_time() - began < 1
    assert str(whole // 2) in str(caught.value) and str(half) in str(caught.value)
    assert memory.peak_memory() - before < 100 << 20


def test_a_terminal_that_is_gone_is_an_error(smollm2_path):
    """To write to it is an EIO. (Nobody hangs up on a program that was started with nohup.)"""
    master, slave = pty.openpty()
    command = [PROGRAM, "generate", "-m", str(smollm2_path), "-n", "4000", "Once upon a time"]
    process = subprocess.Popen(
        command,
        stdout=slave,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(slave)
    os.read(master, 10)
    os.close(master)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, b"numpy-llama: [Errno 5] Input/output error\n")


def mkdir(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    """It has more ids than there are rows. If it has no more, nothing shows that it is wrong."""
    folder = write_source("Llama 3", "HF, sharded", mkdir(tmp_path / "m"))
    nl.load(folder)
    lines = (folder / "tokenizer.model").read_text()
    pairs = (base64.b64encode(bytes([a, b])).decode() for a in range(2) for b in range(200))
    more = "".join(f"{pair} {256 + i}\n" for i, pair in enumerate(pairs))
    (folder / "tokenizer.model").write_text(lines + more)
    assert_refused(run("generate", "-m", str(folder), "hi"), 1, "the tokenizer has", "the embedding 576 rows")


def test_a_container_that_is_too_small_is_an_error_before_loading(llama_3_8b, tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text(f"{700 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{100 << 20}\n")
    monkeypatch.setattr(limits, "CGROUP", tmp_path)
    monkeypatch.setattr(limits, "PROC", tmp_path)
    monkeypatch.setattr("numpy_llama.llama.build", None)  # nothing is loaded
    with pytest.raises(
        ResourceLimitError,
        match=r"weights 797\.7 MiB, .* in all 1\.1 GiB; 600\.0 MiB are available; no other",
    ):
        nl.load(llama_3_8b["c"])
    with pytest.raises(ResourceLimitError, match=r"what would fit: `--backend c` \("):
        nl.load(llama_3_8b["numpy"], backend="numpy")


CPU = """
#include <stdio.h>
#include <stdlib.h>
#include "cpu.c"
static cpu_features made_up;
#define cpu_has() made_up
#include "dispatch.c"
#undef cpu_has
int main(int argc, char **argv) {
#ifdef X86
    unsigned r[5];
    for (int i = 0; i < 5; i++) r[i] = strtoul(argv[1 + i], NULL, 16);
    made_up = features_of(r[0], r[1], r[2], r[3], r[4]);
#endif
    for (int i = 0; nl_isa_name(i); i++) printf("%s ", nl_isa_name(i));
#if defined(X86) && defined(__GNUC__) && !defined(__clang__)
    const cpu_features here = cpu_has();
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
        && __builtin_cpu_supports("avx512vnni");
    if (here.avx2 != avx2 || here.avx512 != avx512) printf("but gcc finds %d %d", avx2, avx512);
#endif
    return 0;
}
"""
C_1 = {"fma": 1 << 12, "f16c": 1 << 29}  # the bits of CPUID, as in Intel's manual, volume 2, CPUID
B_7 = {"avx2": 1 << 5, "f": 1 << 16, "dq": 1 << 17, "bw": 1 << 30, "vl": 1 << 31}
REGISTERS = C_1, B_7, {"vnni": 1 << 11}, {"avxvnni": 1 << 4}, {"ymm": 0x06, "zmm": 0xE0}
HASWELL = "fma f16c avx2 ymm"
CASCADE_LAKE = f"{HASWELL} f dq bw vl vnni zmm"


def test_the_kernels_are_those_that_the_cpu_has(tmp_path):
    """csrc/cpu.c reads registers of CPUID and XGETBV; here a CPU is made up instead."""
    (tmp_path / "cpu_test.c").write_text(CPU)
    csrc = Path(nl.__file__).parents[1] / "csrc"
    command = [os.environ.get("CC", "cc"), "-no-pie", f"-I{csrc}", "cpu_test.c", "-o", "cpu"]
    # The kernels themselves are not linked: only their names are wanted.
    subprocess.run([*command, "-Wl,--unresolved-symbols=ignore-all"], cwd=tmp_path, check=True)
    x86, arm = (platform.machine() in names for names in (("x86_64", "AMD64"), ("aarch64", "arm64")))
    lacks = {f"{CASCADE_LAKE} -{name}": "avx2 scalar" for name in ["f", "dq", "bw", "vl", "vnni", "zmm"]}
    lacks |= {f"{CASCADE_LAKE} avxvnni -{name}": "scalar" for name in HASWELL.split()}
    for features, wanted in {
        "": "scalar",
        HASWELL: "avx2 scalar",
        CASCADE_LAKE: "avx512 avx2 scalar",
        f"{HASWELL} avxvnni": "avx_vnni avx2 scalar",
        f"{CASCADE_LAKE} avxvnni": "avx512 avx_vnni avx2 scalar",
        **lacks,
    }.items():
        has = {name for name in features.split() if f"-{name}" not in features}
        registers = [f"{sum(bits[name] for name in bits.keys() & has):x}" for bits in REGISTERS]
        found = subprocess.run([tmp_path / "cpu", *registers], capture_output=True, text=True, check=True)
        wanted = wanted if x86 else "neon scalar" if arm else "scalar"
        assert found.stdout == f"{wanted} ", features


# ---------------------------------------------------------------- threads and processes

ARGS = replace(ALPHABET, vocab_size=64, max_seq_len=128)


@pytest.fixture(params=["c", "numpy"])
def model(request, rng):
    return build(ARGS, stored(float_weights(ARGS)), backend=request.param)


def aside(work) -> list:
    """work() in another thread: -> what it returned or raised."""
    came = []

    def run():
        try:
            came.append(work())
        except Exception as error:
            came.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive()
    return came


def test_two_threads_share_a_model(model):
    def speak(seed):
        prompt = np.random.default_rng(seed).integers(0, 64, 20).tolist()
        sampler = Sampler(temperature=1.0, seed=seed)
        return list(generate(model, prompt, Session(model), sampler, max_tokens=60))

    alone, together = [speak(seed) for seed in range(4)], {}
    work = [threading.Thread(target=lambda i=i: together.update({i: speak(i)})) for i in range(4)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert [together[i] for i in range(4)] == alone


def in_the_midst(model, do) -> list:
    """When layer 1 is next begun, `do` is done in another thread: -> that it was, and what came of it."""
    layer, came = model.layers[1], []

    def interposed(*arguments):
        if not came:
            came.append("done")
            came.extend(aside(do))
        return layer(*arguments)

    model.layers[1] = interposed
    return came


def test_a_session_at_work_is_refused_to_another_thread(model):
    """Who is at work goes on, and gets what it gets alone."""
    session = Session(model)

    def speak(prompt, session):
        return list(generate(model, prompt, session, Sampler(), max_tokens=5))

    wanted = speak([1, 2, 3], Session(model))
    came = in_the_midst(model, lambda: speak([4, 5, 6, 7], session))
    assert speak([1, 2, 3], session) == wanted
    assert isinstance(came[1], ParameterError) and "the session is in use by another thread" in str(came[1])
    assert speak([1, 2, 3], session) == wanted


FORK = """
import os, sys, numpy_llama as nl
llama = nl.load(sys.argv[1], backend=sys.argv[2], threads=2 if sys.argv[2] == "c" else None)
before = llama.generate("abc", max_tokens=6).tokens
child = os.fork()
if child == 0:
    os._exit(0 if llama.generate("abc", max_tokens=6).tokens == before else 1)
assert llama.generate("abc", max_tokens=6).tokens == before
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("backend", ["c", "numpy"])
def test_a_forked_child_says_the_same(backend, smollm2_path, tmp_path):
    path = smollm2_path if backend == "c" else alphabet(tmp_path, None)  # NumPy would take its time
    command = [sys.executable, "-W", "ignore", "-c", FORK, str(path), backend]
    done = subprocess.run(command, capture_output=True, timeout=120)  # a child that hangs runs into it
    assert (done.stdout, done.stderr) == (b"0\n", b"")


# ---------------------------------------------------------------- terminals, names, upgrades


def test_without_a_terminal_there_is_only_text(smollm2_path, tmp_path):
    """No bar while it expands weights and reads a prompt of several chunks, no colour, nothing to type at."""
    path = alphabet(tmp_path, None)
    environment = {k: v for k, v in os.environ.items() if k != "FORCE_COLOR"} | {"TERM": "xterm-256color"}
    command = ["generate", "-m", str(path), "--backend", "numpy", "-n", "3"]
    done = run(*command, stdin=b"a" * 1500, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"bcd\n", b"")
    done = run("chat", "-m", str(smollm2_path), "-n", "8", stdin=b"Hello\n", env=environment)
    assert (done.returncode, done.stderr) == (0, b"") and not done.stdout.startswith(b">")
    assert b"\x1b" not in done.stdout


def test_a_name_does_not_reach_the_terminal_as_it_is(tmp_path):
    """It could change the window's title, or write to the clipboard."""
    evil = tmp_path / "\x1b]0;evil\x07\x1b[31m\u202eggu.\n.gguf"
    missing = run("generate", "-m", str(evil), "hi")
    path = alphabet(tmp_path, None).rename(evil)
    commands = [
        ("info", str(path)),
        ("tokenize", "-m", str(path), "ab"),
        ("generate", "-m", str(path), "-n", "3", "a"),
        ("generate", "-m", str(path), "--prompt-ids", "99999"),
        ("convert", str(path), str(path), "--dtype", "q8"),
        ("perplexity", "-m", str(path), str(path)),
        ("generate", "a", str(path)),
        (str(path),),
    ]
    done = [missing, *(run(*command) for command in commands)]
    assert [one.returncode for one in done] == [1, 0, 0, 0, 2, 2, 2, 2, 2]
    for one in done:
        output = (one.stdout + one.stderr).decode()
        assert "\x1b" not in output and "\x07" not in output and "\u202e" not in output
        assert one.stderr.count(b"\n") == (one.returncode != 0)


# Greedy, after "The three laws of robotics are". When they change, the release notes say so and why.
GOLDEN = [42, 1116, 33, 30, 378, 4375, 282, 31589, 42, 330, 8085, 28, 645, 357, 314, 441]
GOLDEN += [2724, 288, 5619, 28, 314, 2724, 288, 4237, 2973, 30, 198, 34, 30, 378, 4375, 282]


@pytest.mark.parametrize(
    "options, n",  # with 8 bits the next one is as likely as another
    [({}, 15), ({"activation_bits": 15}, 32), ({"exact": True}, 32)],
    ids=["8 bits", "15 bits", "exact"],
)
def test_the_default_model_says_what_it_always_said(options, n, smollm2_path):
    llama = nl.load(smollm2_path, **options)
    assert llama.generate("The three laws of robotics are", max_tokens=n).tokens == GOLDEN[:n]

"""The contestants of the two races, each in processes of its own.

    PYTHON benchmarks/contestants.py NAME ARGUMENTS

All but ik_llama.cpp run this file: it answers questions on standard input. ARGUMENTS are in JSON.
ik_llama.cpp runs its own llama-bench.
"""

import ctypes
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from copy import deepcopy
from typing import NamedTuple

OURS, LLAMA_CPP, IK = "numpy_llama", "llama.cpp", "ik_llama.cpp"
TRAINING, PYTORCH = "numpy_llama.training", "PyTorch"  # of training_against_pytorch.py
RANK = 8  # of LoRA
DRAWN = 256  # rows of a matrix that does not learn
PROBE = 384_000_000  # operations of a thread


class Test(NamedTuple):
    """One prompt (pp) or the decoding (tg) of `length` tokens, as often as `times` in a turn."""

    group: str  # the tests of a group run with the same settings
    kind: str
    length: int
    times: int = 1

    def __str__(self) -> str:
        return f"{self.kind}{self.length}"


class Ours:
    """numpy_llama with its default options."""

    def __init__(self, file: str, threads: int, depth: int, room: int):
        import numpy_llama as nl
        from numpy_llama.inspect import bench

        self.bench, self.depth = bench, depth
        self.model, self.machine = nl.load(file, threads=threads).model, bench.Machine(threads)
        task = bench.Task("tg", room, depth)
        rng = bench.np.random.default_rng(0)
        self.ids = rng.integers(0, self.model.args.vocab_size, (1, room))
        self.cache = bench.filled_cache(self.model, task, rng)
        self.pieces = bench.probed(self.model)

    def about(self) -> str:
        return f"numpy_llama, {self.machine.isa}"

    def limits(self) -> list[float]:
        """The machine's limits: bytes and float32 operations a second."""
        return [self.machine.read_bandwidth(self.pieces), self.machine.fma_peak()]

    def run(self, kind: str, length: int) -> float:
        task = self.bench.Task(kind, length, self.depth)
        return self.bench.once(self.model, self.ids, self.cache, task, task.steps)

    def cost(self, kind: str, length: int) -> list[int]:
        """The bytes and the operations of one run."""
        kv = (self.cache.k.nbytes + self.cache.v.nbytes) // self.cache.max_seq_len
        cost = self.bench.cost(self.model, self.bench.Task(kind, length, self.depth), kv)
        return [cost.nbytes, cost.operations]


class LlamaCpp:
    """llama.cpp with its default options, except the number of threads, flash attention and repacking."""

    def __init__(self, file: str, threads: int, depth: int, room: int, flash: int, repack: int):
        import llama_cpp

        self.lib, self.depth = llama_cpp, depth
        self.silent = llama_cpp.llama_log_callback(lambda level, text, user: None)
        llama_cpp.llama_log_set(self.silent, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.use_extra_bufts = bool(repack)
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), options)
        if not self.model:
            raise ValueError(f"it cannot load {file}")
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        rng = random.Random(0)
        self.ids = [rng.randrange(vocabulary) for _ in range(max(depth, room))]
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = depth + room
        params.n_batch = max(params.n_batch, room)
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = flash
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        for begin in range(0, depth, params.n_batch):
            self.decode(self.ids[begin : min(begin + params.n_batch, depth)])

    def about(self) -> str:
        features = self.lib.llama_print_system_info().decode().strip(" |\n")
        return f"llama-cpp-python {self.lib.__version__}, {features}"

    def decode(self, ids: list[int]) -> None:
        tokens = (self.lib.llama_token * len(ids))(*ids)  # the batch only points to them
        batch = self.lib.llama_batch_get_one(tokens, len(ids))
        if (code := self.lib.llama_decode(self.context, batch)) != 0:
            raise ValueError(f"llama_decode returned {code}")

    def run(self, kind: str, length: int) -> float:
        self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.context), 0, self.depth, -1)
        step = length if kind == "pp" else 1
        began = time.perf_counter()
        for begin in range(0, length, step):
            self.decode(self.ids[begin : begin + step])
        self.lib.llama_synchronize(self.context)
        return time.perf_counter() - began


def peak_memory() -> int:
    """The most bytes of memory that this process has had."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def stored_weights(args, format: str, rng) -> dict:
    """Random weights that do not learn, in the memory that the mapped pages of a packed file take.

    A matrix repeats its first rows: to draw all of them takes a minute for each billion.
    """
    import numpy as np

    from numpy_llama.backend.formats import PackedTensor, StoredTensor
    from numpy_llama.backend.kernels import pack, packs
    from numpy_llama.checkpoint.names import expected_shape, tensor_names

    stored = {}
    for name in tensor_names(args, "ours"):
        shape = expected_shape(name, args)
        if len(shape) == 1:
            stored[name] = StoredTensor.quantize(np.ones(shape, np.float32), "F32")
        elif name != "output.weight":
            few = StoredTensor.quantize(0.02 * rng.standard_normal((DRAWN, shape[1]), np.float32), format)
            rows = np.resize(few.data, (shape[0], few.data.shape[1]))
            if packs(few.format):
                stored[name] = PackedTensor(few.format, shape, pack(rows, few.format, 1))
            else:
                stored[name] = StoredTensor(few.format, shape, rows)
    return stored | {"output.weight": stored["tok_embeddings.weight"]}


class Training:
    """Steps of numpy_llama's Trainer on a model of random weights.

    base: the format of the weights that LoRA stands beside, or None if all weights learn.
    """

    def __init__(self, shape: list[int], rows: int, length: int, base: str | None, threads: int):
        import numpy as np

        from numpy_llama.backend import kernels
        from numpy_llama.config import ModelArgs
        from numpy_llama.training.compute import c_compute
        from numpy_llama.training.examples import Example
        from numpy_llama.training.lora import TARGETS, scale_of, with_lora
        from numpy_llama.training.models import frozen_weights, new_weights
        from numpy_llama.training.objectives import NextToken
        from numpy_llama.training.optimizer import AdamW, Hyperparameters
        from numpy_llama.training.order import Order
        from numpy_llama.training.plan import Work
        from numpy_llama.training.trainer import Schedule, Trainer

        args = ModelArgs(*shape, norm_eps=1e-6, rope_theta=1e4, max_seq_len=length)
        self.kernels, self.threads, compute = kernels, threads, c_compute(threads)
        rng = np.random.default_rng(0)
        if base is None:
            learner = compute.learner(args, new_weights(args, seed=0), False)
        else:
            weights = frozen_weights(stored_weights(args, base, rng), compute)
            learner = compute.learner(args, weights, False, frozen=True)
            learner = with_lora(learner, list(TARGETS), RANK, scale_of(RANK, RANK))
        ids = rng.integers(0, args.vocab_size, (rows, length + 1))
        examples = [(Example(row, np.ones(length, bool), "a row"),) for row in ids]
        work = Work.of(args, all_learns=base is None).operations(examples)
        self.trainer = Trainer(
            learner,
            AdamW(learner.parameters(), Hyperparameters(1e-4), compute.adamw),
            examples,
            Order(rows, rows),
            NextToken(),
            Schedule(1 << 30),
            rows * length,
            compute.squares,
        )
        self.about = lambda: f"numpy_llama, {kernels.isa()}"
        self.operations = lambda: work
        self.peak_memory = peak_memory

    def step(self) -> float:
        return self.trainer.step().seconds

    def fma_peak(self) -> float:
        """Float32 operations a second, of all threads together."""
        began = time.perf_counter()
        self.kernels.fma_probe(PROBE, self.threads)
        return self.threads * PROBE / (time.perf_counter() - began)


class PyTorch:
    """The same steps in PyTorch, with the model of transformers.

    base: F32, or Q4_0 for NF4 of bitsandbytes, which has 4 bits too. dtype: that of the products.
    """

    def __init__(self, shape: list[int], rows: int, length: int, base: str | None, threads: int, dtype: str):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        self.torch, self.peak_memory, self.dtype = torch, peak_memory, getattr(torch, dtype)
        torch.set_num_threads(threads)
        dim, layers, heads, kv_heads, head_dim, hidden_dim, vocab_size = shape
        config = LlamaConfig(
            hidden_size=dim,
            num_hidden_layers=layers if base != "Q4_0" else 1,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=hidden_dim,
            vocab_size=vocab_size,
            max_position_embeddings=length,
            tie_word_embeddings=True,
        )
        self.model = LlamaForCausalLM(config)
        if base == "Q4_0":
            self.quantize(layers)
        if base is not None:
            from peft import LoraConfig, get_peft_model

            self.model = get_peft_model(
                self.model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
            )
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.1, betas=(0.9, 0.95))
        ids = torch.randint(0, vocab_size, (rows, length + 1))
        self.ids, self.targets = ids[:, :-1].contiguous(), ids[:, 1:].reshape(-1).contiguous()

    def quantize(self, layers: int) -> None:
        """Copies of the only layer, with matrices in NF4: so there is never a whole model in float32."""
        from bitsandbytes.nn import Linear4bit, Params4bit

        (layer,) = self.model.model.layers
        for part in (layer.self_attn, layer.mlp):
            for name, one in list(part.named_children()):
                if isinstance(one, self.torch.nn.Linear):
                    quantized = Linear4bit(
                        one.in_features, one.out_features, False, self.dtype, device="meta"
                    )
                    weight = Params4bit(one.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
                    quantized.weight = weight
                    setattr(part, name, quantized)
        self.model.model.layers = self.torch.nn.ModuleList(deepcopy(layer) for _ in range(layers))
        self.model.config.num_hidden_layers = layers
        self.model.is_loaded_in_4bit = True  # PEFT asks for it

    def about(self) -> str:
        import transformers

        dtype = str(self.dtype).removeprefix("torch.")
        return f"PyTorch {self.torch.__version__}, transformers {transformers.__version__}, {dtype}"

    def step(self) -> float:
        began = time.perf_counter()
        with self.torch.autocast("cpu", self.dtype, enabled=self.dtype != self.torch.float32):
            logits = self.model(input_ids=self.ids, use_cache=False).logits
            loss = self.torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.targets)
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()
        return time.perf_counter() - began


def answer(name: str, arguments: list) -> None:
    """The loop of a contestant: a call a line, [name of a method, its arguments], and a result a line."""
    try:
        contestant = {OURS: Ours, LLAMA_CPP: LlamaCpp, TRAINING: Training, PYTORCH: PyTorch}[name](*arguments)
        for line in sys.stdin:
            method, *values = json.loads(line)
            print(json.dumps(getattr(contestant, method)(*values)), flush=True)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)


class Process:
    """A process that ends with its block. Ctrl-C in the terminal does not reach it."""

    def __init__(self, command: list):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.popen = subprocess.Popen([str(word) for word in command], start_new_session=True, **pipes)

    def wait(self) -> int:
        """The exit code. `peak` becomes the most bytes of memory that the process has had."""
        if self.popen.returncode is None:
            _, status, usage = os.wait4(self.popen.pid, 0)
            self.popen.returncode = os.waitstatus_to_exitcode(status)
            self.peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return self.popen.returncode

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        if self.popen.returncode is None:
            os.kill(self.popen.pid, signal.SIGKILL)
            self.wait()
        for pipe in (self.popen.stdin, self.popen.stdout):
            with suppress(BrokenPipeError):
                pipe.close()


class Child(Process):
    """A contestant in a process of its own, which waits between its turns."""

    def __init__(self, name: str, python: str, *arguments):
        super().__init__([python, __file__, name, json.dumps(arguments)])
        self.name = name

    def ask(self, *question):
        with suppress(BrokenPipeError):  # then there is no answer either
            print(json.dumps(question), file=self.popen.stdin, flush=True)
        if not (line := self.popen.stdout.readline()):
            sys.exit(f"{self.name} gave no answer, its exit code is {self.wait()}")
        with suppress(ValueError):
            result = json.loads(line)
            if not isinstance(result, dict):
                return result
            line = result["error"]
        sys.exit(f"{self.name}: {line.strip()}")

    def about(self) -> str:
        return self.ask("about")

    def run(self, test: Test, fresh: bool = False) -> float:
        """Seconds for one time, the median."""
        return statistics.median(self.ask("run", test.kind, test.length) for _ in range(test.times))


class Ik:
    """ik_llama.cpp: its llama-bench, a process for each call of `run`, which loads the file anew."""

    def __init__(self, name: str, bench: str, file: str, threads: int, depth: int, room: int, *settings):
        flash, repack = settings
        self.command = [bench, "-m", file, "-t", threads, "-fa", flash, "-rtr", repack, "-o", "json"]
        self.depth, self.peak = depth, 0

    def about(self) -> str:
        return f"{IK} {self.build}"

    def run(self, test: Test, fresh: bool = False) -> float | None:
        """Seconds for one time, the median. None for a prompt behind positions: llama-bench has no such test.

        It warms up with one token only, which is too little. So the first time is not counted here. Behind
        positions their prompt has warmed up. A `fresh` process does not warm up.
        """
        what = {"-p": 0, "-n": 0, {"pp": "-p", "tg": "-n"}[test.kind]: test.length}
        if self.depth:
            if test.kind == "pp":
                return None
            what = {"-p": 0, "-n": 0, "-gp": f"{self.depth},{test.length}"}
        skipped = 0 if fresh or self.depth else 1
        what |= {"-r": skipped + test.times, "-w": int(not fresh)}
        with Process([*self.command, *(word for pair in what.items() for word in pair)]) as process:
            text = process.popen.stdout.read()
            if code := process.wait():
                sys.exit(f"{IK}: {self.command[0]} failed, its exit code is {code}")
        try:
            (result,) = json.loads(text)
        except ValueError:
            sys.exit(f"{IK}: {self.command[0]} printed no result in JSON")
        self.build, self.peak = result["build_commit"], max(self.peak, process.peak)
        return statistics.median(result["samples_ns"][skipped:]) / 1e9

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None: ...


if __name__ == "__main__":
    answer(sys.argv[1], json.loads(sys.argv[2]))

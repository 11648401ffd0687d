"""csrc/pool/pool.c in the place of OpenMP's library: the same bits for any number of threads.

It is built by clang or zig, whichever is installed; the package ziglang is one of the project's test tools.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import numpy_llama

ZIG = f"{sys.executable} -m ziglang cc"
COMPILERS = {"clang": shutil.which("clang"), "zig": importlib.util.find_spec("ziglang") and ZIG}
BUILD = """
import os, runpy, sys
os.environ["CC"], os.environ["LDSHARED"] = sys.argv[1], sys.argv[1] + " -shared"
builder = runpy.run_path("csrc/build_kernels.py")
pool = builder["pool_flags"]()
print(builder["make_ffi"]("pool_kernels", pool=[*pool, "-O1", "-DSCALAR_ONLY"]).compile())
"""
# Every kind of loop that the kernels have: shares of rows, dynamic, static, single, barriers, reductions.
USE = """
import os, sys, threading
import numpy as np
sys.path.insert(0, sys.argv[1])
from pool_kernels import ffi, lib
rng = np.random.default_rng(0)
draw = lambda *shape: rng.standard_normal(shape, dtype="f")
at = lambda a: ffi.cast("void *", a.ctypes.data)
T, IN, OUT, H, Dh, S = 9, 96, 200, 4, 32, 2500
x, w, q, k, v = draw(T, IN), draw(OUT, IN), draw(T, H, Dh), draw(S, H, Dh), draw(S, H, Dh)
low = draw(8, IN), draw(OUT, 8)

def results(threads):
    y, out, dw, norm = np.zeros((T, OUT), "f"), np.zeros_like(q), np.zeros_like(w), np.zeros_like(x)
    m = ffi.new("nl_matrix *", (at(w), 0, OUT, IN))
    assert lib.nl_linear_exact(at(y), at(x), T, m, 0, OUT, threads) == 0
    dims = [1, T, S, H, H, Dh]
    a = ffi.new("nl_attention_args *", [at(out), at(q), at(k), at(v), 0, *dims])
    a.k_strides = a.v_strides = [S * H * Dh, H * Dh, Dh]
    a.begin, a.end = 0, T
    assert lib.nl_attention(a, threads) == 0
    assert lib.nl_linear_dw(at(dw), at(y), at(x), T, OUT, IN, 0, OUT, 0, threads) == 0
    part = ffi.new("nl_lora_part *", (at(low[0]), at(low[1]), 0.5, 8, IN, OUT))
    assert lib.nl_add_lora(at(y), at(x), part, T, threads) == 0
    dx, da, db = np.zeros_like(x), np.zeros_like(low[0]), np.zeros_like(low[1])
    gradients = ffi.new("nl_lora_gradients *", [at(a) for a in (dx, da, db, y, x)])
    assert lib.nl_lora_backward(gradients, part, T, threads) == 0
    lib.nl_rms_norm(at(norm), at(x), at(w), 1e-5, T, IN, threads)
    quantized = np.zeros((OUT, IN // 32 * 34), np.uint8)
    assert lib.nl_convert(at(quantized), 8, at(w), 0, OUT, IN, threads) == 0
    broken = w.copy()
    broken[37, 5] = np.nan
    assert lib.nl_convert(at(quantized), 8, at(broken), 0, OUT, IN, threads) == 38  # the row, from 1
    return b"".join(a.tobytes() for a in (y, out, dw, dx, da, db, norm, quantized))

def check():
    for threads in [*range(1, 9), 2, 40, 1]:
        assert results(threads) == wanted, threads

room = ffi.new("int64_t[2]")
assert lib.nl_openmp() == 1 and lib.nl_form_team(8, 1, 0, room) == 8
wanted = results(1)
check()
several = [threading.Thread(target=check) for _ in range(4)]
failed = []
threading.excepthook = failed.append
for one in several: one.start()
for one in several: one.join()
assert not failed, failed
for _ in range(3):
    child = os.fork()
    if not child:
        check()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
check()
print("right")
"""


@pytest.mark.parametrize("compiler", [name for name, command in COMPILERS.items() if command])
def test_threads_without_openmp(compiler, tmp_path):
    """Also from several Python threads at once, and in a process that was forked."""
    shutil.copytree(Path(numpy_llama.__file__).parents[1] / "csrc", tmp_path / "csrc")
    command = [sys.executable, "-c", BUILD, COMPILERS[compiler]]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    used = subprocess.run([sys.executable, "-c", USE, tmp_path], capture_output=True, text=True, timeout=300)
    assert used.stdout == "right\n", used.stderr

"""The C kernels against NumPy: exact data bit for bit, real data within the rounding of the sums.

Every test that computes runs on every instruction set that this machine has.
"""

import mmap
import os
import shutil
import signal
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import numpy as np
import pytest
from helpers.kernels import (
    FLOAT32_D,
    HALVES,
    Guarded,
    bits,
    exact_weight,
    for_each,
    real_weight,
    seeds,
    sizes,
    unaligned,
    whole_blocks,
)
from hypothesis import example, given
from hypothesis import strategies as st
from numpy_llama.backend._kernels import ffi, lib

import numpy_llama
from numpy_llama import functional as F
from numpy_llama.backend import kernels
from numpy_llama.backend.formats import FORMATS, PACKED_ROWS, QK, StoredTensor
from numpy_llama.backend.kernels import Kernels, KernelWeight
from numpy_llama.errors import MismatchError, ParameterError
from numpy_llama.proof.blocks import all_pairs_of_scales, packed_scales
from numpy_llama.proof.bounds import U32, assert_within, g

KC = 256  # csrc/linear_gemm.c: KC products are summed one after another, and then such chunks
pytestmark = pytest.mark.usefixtures("threads_even_for_little_work")


@pytest.fixture(params=FORMATS, scope="module")
def format(request):
    return FORMATS[request.param]


def exact_kernels(threads: int) -> Kernels:
    """Those that multiply floats; tests/kernels/test_quantized_activations.py has the others."""
    return Kernels(threads, exact=True)


# ---------------------------------------------------------------- linear


@for_each
@given(
    T=sizes,
    OUT=sizes,
    blocks=st.integers(1, 36),
    threads=st.integers(1, 3),
    by=st.integers(0, 63),
    seed=seeds,
)
@example(T=1, OUT=4, blocks=16, threads=1, by=0, seed=0)  # one whole chunk
@example(T=3, OUT=17, blocks=17, threads=2, by=1, seed=0)  # a chunk and one block, a panel and one row
@example(T=193, OUT=5, blocks=1, threads=2, by=0, seed=0)  # a block of tokens and one
def test_linear_is_exact_on_exact_data(isa, format, T, OUT, blocks, threads, by, seed):
    rng = np.random.default_rng(seed)
    # Formats of single numbers may have any IN; the others come in whole blocks.
    IN = whole_blocks(format, blocks * QK - (int(rng.integers(0, QK)) if format.block == 1 else 0))
    w = exact_weight(rng, format, OUT, IN)
    w = StoredTensor(format, w.shape, unaligned(w.data, by if format.name != "F32" else by // 4 * 4))
    x = unaligned(rng.integers(-8, 9, (T, IN)).astype(np.float32), by // 4 * 4)
    expected = F.linear(x.astype(np.float64), w.dequantize(np.float64))
    np.testing.assert_array_equal(exact_kernels(threads).linear(x, KernelWeight(w)), expected)


def linear_bound(isa: str, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """|error| <= g * sum |x w|: the chunks and then their sums, or one long sum."""
    IN = x.shape[-1]
    chunk = KC if isa != "scalar" else IN
    roundings = g(min(IN, chunk)) + -(-IN // chunk) * U32
    return roundings * (np.abs(x.astype(np.float64)) @ np.abs(w.astype(np.float64)).T)


@for_each
@given(T=sizes, OUT=sizes, IN=st.integers(1, 1500), seed=seeds)
def test_linear_is_within_the_rounding_of_its_sum(isa, format, T, OUT, IN, seed):
    rng = np.random.default_rng(seed)
    IN = whole_blocks(format, IN)
    w, x = real_weight(rng, format, OUT, IN), rng.standard_normal((T, IN), dtype=np.float32)
    expected = F.linear(x.astype(np.float64), w.dequantize(np.float64))
    assert_within(exact_kernels(1).linear(x, KernelWeight(w)), expected, linear_bound(isa, x, w.dequantize()))


def test_linear_error_is_as_small_as_chance_allows(isa, format, rng):
    """The bound above is for the worst case. Here the typical error, which grows like a random walk."""
    T, OUT, IN = 64, 64, 4096
    w, x = real_weight(rng, format, OUT, IN), rng.standard_normal((T, IN), dtype=np.float32)
    expected = F.linear(x.astype(np.float64), w.dequantize(np.float64))
    error = exact_kernels(1).linear(x, KernelWeight(w)) - expected
    length = IN if isa == "scalar" else KC + IN / KC
    assert np.sqrt(np.mean(error**2)) < 4 * np.sqrt(length) * U32 * np.sqrt(np.mean(expected**2))


@for_each
@given(
    T=st.integers(1, 40),
    OUT=st.integers(1, 70),
    blocks=st.integers(1, 40),
    cut=st.integers(0, 40),
    seed=seeds,
)
@example(T=200, OUT=33, blocks=33, cut=195, seed=0)
def test_linear_gives_the_same_bits_however_it_is_split(isa, format, T, OUT, blocks, cut, seed):
    rng = np.random.default_rng(seed)
    IN = whole_blocks(format, blocks * QK)
    w, x = KernelWeight(real_weight(rng, format, OUT, IN)), rng.standard_normal((T, IN), dtype=np.float32)
    whole = exact_kernels(1).linear(x, w)
    for threads in (2, 3):
        np.testing.assert_array_equal(bits(exact_kernels(threads).linear(x, w)), bits(whole))
    parts = [exact_kernels(2).linear(part, w) for part in (x[:cut], x[cut:])]
    np.testing.assert_array_equal(bits(np.concatenate(parts)), bits(whole))
    one_by_one = [exact_kernels(1).linear(row, w) for row in x]
    np.testing.assert_array_equal(bits(np.stack(one_by_one)), bits(whole))


@given(shape=st.lists(st.integers(1, 4), max_size=3), OUT=st.integers(1, 40), seed=seeds)
def test_rows_may_lie_in_another_order(isa, format, shape, OUT, seed):
    """The outputs come in the model's order, and in one piece: RoPE reads neighbours as complex numbers."""
    rng = np.random.default_rng(seed)
    plain = exact_weight(rng, format, OUT, format.block * 2 if format.block > 1 else 40)
    order = rng.permutation(OUT)
    w = StoredTensor(format, plain.shape, plain.data, order)
    np.testing.assert_array_equal(w.dequantize(), plain.dequantize()[order])
    x = rng.integers(-8, 9, (*shape, plain.shape[1])).astype(np.float32)
    y = exact_kernels(2).linear(x, KernelWeight(w))
    assert y.flags.c_contiguous
    np.testing.assert_array_equal(y, exact_kernels(2).linear(x, KernelWeight(plain))[..., order])


def test_sums_that_vanish_have_the_same_sign(isa, format):
    """-1e-30 * 1e-30 is -0, and the sum of such is too: for one token as for many."""
    w = StoredTensor.quantize(np.full((4, QK), -1e-30, np.float32), "F32")
    x = np.full((2, QK), 1e-30, np.float32)
    np.testing.assert_array_equal(
        bits(exact_kernels(1).linear(x[:1], w)), bits(exact_kernels(1).linear(x, w)[:1])
    )


def test_linear_gives_the_same_bits_in_short_calls(isa, format, rng, monkeypatch):
    IN = whole_blocks(format, 96)
    w, x = KernelWeight(real_weight(rng, format, 37, IN)), rng.standard_normal((5, IN), dtype=np.float32)
    whole = exact_kernels(2).linear(x, w)
    for work in (1, IN * 5 * 3, IN * 5 * 5):  # so short that a call computes 1, 3 or 5 rows a thread
        monkeypatch.setattr(kernels, "WORK_PER_CALL", work)
        np.testing.assert_array_equal(bits(exact_kernels(2).linear(x, w)), bits(whole))


def test_every_half_is_read_rightly(isa):
    """All 65,536 float16 and bfloat16, NaN and subnormal ones too."""
    for name in ("F16", "BF16"):
        rows = np.zeros((1 << 16, QK), "<u2")
        rows[:, 0] = np.arange(1 << 16)
        w = StoredTensor(FORMATS[name], rows.shape, rows.view(np.uint8))
        one = np.eye(1, QK, dtype=np.float32)
        for chosen in (exact_kernels(2), Kernels(2)):
            np.testing.assert_array_equal(chosen.linear(one, w)[0], w.dequantize()[:, 0])


@pytest.mark.parametrize("name", HALVES)
def test_every_scale_times_every_number_is_read_rightly(isa, name, rng):
    """All finite float16 scales with all small numbers, and some minimum: bit for bit as formats.py.

    A K format has too many: there, all scales and, of everything else, any bytes."""
    format = FORMATS[name]
    scales = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    scales = scales[np.isfinite(scales)]
    scales = scales[:: 1 if isa != "scalar" else 37].copy()  # the scalar form takes its time
    numbers = (
        32 if name == "Q8_0" else 16 if format.block == QK else 0
    )  # bytes of a block that take all values
    n_blocks = 256 // numbers if numbers else 1
    blocks = rng.integers(256, size=(len(scales), n_blocks, format.block_bytes), dtype=np.uint8)
    blocks[..., format.block_bytes - numbers :] = np.arange(n_blocks * numbers).reshape(n_blocks, numbers)
    second = rng.integers(0, 32, len(scales)).astype("<f2") if name == "Q4_Z" else rng.permutation(scales)
    for at, half in zip(HALVES[name], (scales, second), strict=False):
        blocks[..., at : at + 2] = half.view(np.uint8).reshape(-1, 1, 2)
    assert_read_rightly(StoredTensor(format, (len(scales), n_blocks * format.block), blocks.reshape(-1)))


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K"])
def test_every_scale_of_a_sub_block_is_read_rightly(isa, name, rng):
    """All pairs of 6-bit scale and minimum at each of their 8 places, all signed bytes at each of 16."""
    format = FORMATS[name]
    sc, m = all_pairs_of_scales()
    blocks = rng.integers(256, size=(len(sc), format.block_bytes), dtype=np.uint8)
    if name == "Q6_K":
        blocks[:, 192:208] = (np.arange(len(sc))[:, None] + 17 * np.arange(16)) % 256
    else:
        blocks[:, 4:16] = packed_scales(sc, m)
    for at in HALVES[name]:
        blocks[:, at : at + 2] = rng.normal(size=(len(sc), 1)).astype("<f2").view(np.uint8)
    assert_read_rightly(StoredTensor(format, (len(sc), format.block), blocks.reshape(-1)))


@pytest.mark.parametrize("name", FLOAT32_D)
def test_every_code_is_read_rightly(isa, name, rng):
    """All bytes, with float32 scales of all sizes: bit for bit as formats.py."""
    format = FORMATS[name]
    codes = format.block_bytes - 4
    n_blocks = 256 // codes
    blocks = np.empty((256, n_blocks, format.block_bytes), np.uint8)
    d = np.ldexp(rng.uniform(-2, 2, (256, n_blocks, 1)), rng.integers(-149, 118, (256, n_blocks, 1)))
    blocks[..., :4] = d.astype("<f4").view(np.uint8)
    blocks[..., 4:] = np.arange(256).reshape(n_blocks, codes)
    assert_read_rightly(StoredTensor(format, (256, n_blocks * format.block), blocks.reshape(-1)))


def assert_read_rightly(w: StoredTensor):
    """Times the unit matrix every weight comes out as it is."""
    one = np.eye(w.shape[1], dtype=np.float32)
    for begin in range(0, len(w), 2048):  # what fits the cache is fast
        some = w.data[begin : begin + 2048]
        part = StoredTensor(w.format, (len(some), w.shape[1]), some)
        np.testing.assert_array_equal(exact_kernels(2).linear(one, part).T, part.dequantize())


def test_linear_takes_any_array(isa, rng):
    """Strided, reversed, Fortran order, big-endian, float64, read-only, one vector, many axes."""
    w = exact_weight(rng, FORMATS["F32"], 5, 40).dequantize()
    x = rng.integers(-8, 9, (4, 3, 40)).astype(np.float32)
    read_only = x.copy()
    read_only.flags.writeable = False
    wide = np.repeat(x, 2, axis=-1)
    for same in (
        x,
        read_only,
        wide[..., ::2],
        x[..., ::-1][..., ::-1],
        np.asfortranarray(x),
        x.astype(">f4"),
        x.astype("f8"),
    ):
        np.testing.assert_array_equal(exact_kernels(1).linear(same, w), F.linear(x, w))
    for same in (w, np.asfortranarray(w), w.astype(">f4"), np.repeat(w, 3, axis=0)[::3]):
        np.testing.assert_array_equal(exact_kernels(1).linear(x[0, 0], same), F.linear(x[0, 0], w))


@pytest.mark.parametrize("T, OUT, IN", [(0, 3, 32), (2, 0, 32), (2, 3, 0), (0, 0, 0)])
def test_linear_of_nothing(isa, T, OUT, IN):
    y = exact_kernels(2).linear(np.ones((T, IN), np.float32), np.ones((OUT, IN), np.float32))
    assert y.shape == (T, OUT) and not y.any()


def test_linear_refuses_what_does_not_fit(rng):
    with pytest.raises(MismatchError, match="x has 31 columns, the weight 32"):
        Kernels(1).linear(np.ones((1, 31), np.float32), np.ones((2, 32), np.float32))
    with pytest.raises(MismatchError, match="2 axes"):
        KernelWeight(StoredTensor.quantize(np.ones(32, np.float32), "F32"))


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2", 1025])
def test_threads_are_checked(threads):
    with pytest.raises(ParameterError, match="threads is"):
        Kernels(threads)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("at_end", [True, False])
def test_linear_touches_nothing_beside_its_arrays(isa, format, at_end, rng):
    for T, OUT, blocks in [(1, 1, 1), (1, 5, 17), (2, 3, 16), (3, 17, 1), (7, 19, 33), (5, 4, 2)]:
        guarded, IN = Guarded(), whole_blocks(format, blocks * QK)
        w = exact_weight(rng, format, OUT, IN)
        rows = guarded.copy(KernelWeight(w).rows, at_end)
        x = guarded.copy(rng.integers(-8, 9, (T, IN)).astype(np.float32), at_end)
        for multiply in (lib.nl_linear, lib.nl_linear_exact):
            y = guarded.copy(np.full((T, OUT), np.nan, np.float32), at_end)
            y_, x_, w_ = (ffi.cast("void *", a.ctypes.data) for a in (y, x, rows))
            assert multiply(y_, x_, T, ffi.new("nl_matrix *", (w_, format.code, OUT, IN)), 0, OUT, 2) == 0
            np.testing.assert_array_equal(y, F.linear(x, w.dequantize()))


@pytest.mark.parametrize("name", ["F32", "F16", "Q8_0", "Q4_K"])
def test_rows_beyond_4_gib_are_found(isa, name, rng):
    """Offsets are 64 bits wide. The weight is nearly all hole, and its last rows are multiplied."""
    format, IN = FORMATS[name], 1 << 16
    row_bytes, T, some = format.row_bytes(IN), 1, PACKED_ROWS
    OUT = (1 << 32) // row_bytes // some * some + 7 * some
    area = np.frombuffer(mmap.mmap(-1, OUT * row_bytes), np.uint8).reshape(OUT, row_bytes)
    last = exact_weight(rng, format, some, IN)
    area[-some:] = KernelWeight(last).rows
    x = rng.integers(-8, 9, (T, IN)).astype(np.float32)
    y = np.full((T, OUT), np.nan, np.float32)
    y_, x_, w_ = (ffi.cast("void *", a.ctypes.data) for a in (y, x, area))
    matrix = ffi.new("nl_matrix *", (w_, format.code, OUT, IN))
    assert lib.nl_linear_exact(y_, x_, T, matrix, OUT - some, OUT, 2) == 0
    np.testing.assert_array_equal(y[:, -some:], F.linear(x, last.dequantize()))
    assert np.isnan(y[:, :-some]).all()


# ---------------------------------------------------------------- the choice of a kernel, its surroundings


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)


def test_the_instruction_set_can_be_chosen_from_outside():
    code = "from numpy_llama.backend import kernels; print(kernels.isa())"
    for name in kernels.available_isas():
        assert run(code, NUMPY_LLAMA_ISA=name).stdout == f"{name}\n"
    assert run(code).stdout == f"{kernels.available_isas()[0]}\n"
    failed = run(code, NUMPY_LLAMA_ISA="avx9")
    assert "instruction set 'avx9' is not available; there are" in failed.stderr


WAITS = "from numpy_llama.backend import kernels\n"
WAITS += "print(*map(os.environ.get, ('GOMP_SPINCOUNT', 'KMP_BLOCKTIME')))"


def test_how_long_threads_wait_is_not_told_to_child_processes():
    unset = "import os; [os.environ.pop(name, 0) for name in ('GOMP_SPINCOUNT', 'KMP_BLOCKTIME')]\n"
    assert run(unset + WAITS).stdout == "None None\n"
    assert run(f"import os\n{WAITS}", GOMP_SPINCOUNT="7", KMP_BLOCKTIME="9").stdout == "7 9\n"


@pytest.mark.skipif(not (LLVM := find_library("omp")), reason="LLVM's OpenMP is not installed")
@pytest.mark.parametrize("asked, found", [({}, "1"), ({"KMP_BLOCKTIME": "9"}, "9")])
def test_threads_of_llvms_openmp_wait_for_a_millisecond(asked, found):
    """It takes the place of GNU OpenMP here, and prints its settings when it has read them."""
    code = "from numpy_llama.backend import kernels; kernels.team(2)"
    done = run(code, LD_PRELOAD=LLVM, KMP_SETTINGS="1", **asked)
    assert f"KMP_BLOCKTIME={found}\n" in done.stderr and "KMP_BLOCKTIME=200" not in done.stderr


def test_the_scalar_kernels_are_always_there():
    assert kernels.available_isas()[-1] == "scalar"


def test_tiny_numbers_are_not_flushed_to_zero(isa):
    """-Ofast in any loaded library would do that, to the loading thread or to the workers."""
    tiny = np.float32(1e-40)
    assert tiny > 0 and np.finfo(np.float32).smallest_subnormal > 0
    one = np.eye(1, QK, dtype=np.float32)
    w = np.full((64, QK), tiny)
    for threads in (1, 2):
        np.testing.assert_array_equal(Kernels(threads).linear(one, w), np.full((1, 64), tiny))


def test_a_forked_child_computes_the_same_and_does_not_hang(rng):
    code = """
import os, numpy as np
from numpy_llama.backend import kernels
from numpy_llama.backend.kernels import Kernels
kernels.WORK_FOR_THREADS = 0  # threads even for little work
rng = np.random.default_rng(0)
x, w = rng.standard_normal((3, 64), dtype="f"), rng.standard_normal((40, 64), dtype="f")
before = Kernels(2).linear(x, w)
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(Kernels(2).linear(x, w), before) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(code, PYTHONWARNINGS="ignore").stdout == "0\n"  # a child that hangs runs into the timeout


CUT = """
import mmap, os, sys, tempfile
from numpy_llama.backend.kernels import watch

def mapped(text, left=mmap.PAGESIZE):
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(bytes(3 * mmap.PAGESIZE))
    with open(file.name, "r+b") as file:
        area = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if text: watch(area, text)
        file.truncate(left)
    os.remove(file.name)
    return area

"""


@pytest.mark.parametrize("left, at", [(0, 0), (0, -1), (1, 1), (1, -1)])
def test_a_file_that_is_cut_while_it_is_in_use_is_named(left, at):
    """The first byte that is gone and the last; what is still there can be read."""
    code = f"""
left = {left} * mmap.PAGESIZE
first, second = mapped("a.gguf"), mapped("b/wéights.gguf", left)
print(sum(second[:left]), flush=True)
second[{at} * mmap.PAGESIZE if {at} >= 0 else -1]
"""
    done = run(CUT + code)
    assert done.returncode == 1
    assert done.stdout == "0\n"
    assert done.stderr == "numpy-llama: b/wéights.gguf was cut while it was in use; its weights are gone\n"


def test_a_file_that_is_cut_under_the_kernels_is_named():
    """On a thread of OpenMP, in the middle of a product."""
    code = """
import numpy as np
from numpy_llama.backend import kernels
from numpy_llama.backend.formats import FORMATS, StoredTensor
kernels.WORK_FOR_THREADS = 0
area = mapped("w.gguf")
w = StoredTensor(FORMATS["F32"], (48, mmap.PAGESIZE // 64), np.frombuffer(area, np.uint8))
kernels.Kernels(3).linear(np.ones((1, w.shape[1]), "f"), w)
"""
    done = run(CUT + code)
    assert done.returncode == 1
    assert done.stderr == "numpy-llama: w.gguf was cut while it was in use; its weights are gone\n"


@pytest.mark.parametrize(
    "code",
    [
        'other, watched = mapped(None), mapped("w.gguf"); other[mmap.PAGESIZE]',
        'watched = mapped("w.gguf"); os.kill(os.getpid(), 7)',
        'watched = mapped("w.gguf"); del watched; other = mapped(None); other[mmap.PAGESIZE]',
    ],
    ids=["elsewhere", "sent", "no longer watched"],
)
def test_any_other_sigbus_still_kills(code):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
    done = run(CUT + limit + code.replace("7)", f"{signal.SIGBUS:d})"))
    assert done.returncode == -signal.SIGBUS
    assert done.stderr == ""


def test_a_handler_that_was_there_is_still_asked():
    """More than once, and the watch goes on."""
    code = """
import signal
signal.signal(signal.SIGBUS, lambda *_: print("asked", flush=True))
watched = mapped("w.gguf")
os.kill(os.getpid(), signal.SIGBUS)
os.kill(os.getpid(), signal.SIGBUS)
watched[mmap.PAGESIZE]
"""
    done = run(CUT + code)
    assert (done.returncode, done.stdout) == (1, "asked\nasked\n")
    assert done.stderr.startswith("numpy-llama: w.gguf was cut")


def test_only_so_many_files_are_watched_at_once():
    """And those beyond are used all the same; when some are gone there is room again."""
    code = """
maps = [mapped(f"{i}.gguf") for i in range(300)]
del maps[:10]
late = mapped("late.gguf")
late[mmap.PAGESIZE]
"""
    done = run(CUT + code)
    assert (done.returncode, done.stderr.split()[1]) == (1, "late.gguf")


def test_the_kernels_build_and_agree_without_openmp(tmp_path):
    """No vector form has OpenMP, so the scalar forms are enough."""
    shutil.copytree(Path(numpy_llama.__file__).parents[1] / "csrc", tmp_path / "csrc")
    code = """
import runpy, sys, numpy as np
builder = runpy.run_path("csrc/build_kernels.py")
builder["make_ffi"]("serial_kernels", openmp=["-O1", "-DSCALAR_ONLY"]).compile()
sys.path.insert(0, ".")
from serial_kernels import ffi, lib
from numpy_llama.backend import kernels
kernels.use_isa("scalar")
rng = np.random.default_rng(0)
x, w = rng.standard_normal((5, 96), dtype="f"), rng.standard_normal((17, 96), dtype="f")
y = np.empty((5, 17), "f")
y_, x_, w_ = (ffi.cast("void *", a.ctypes.data) for a in (y, x, w))
lib.nl_linear(y_, x_, 5, ffi.new("nl_matrix *", (w_, 0, 17, 96)), 0, 17, 2)
print(lib.nl_openmp(), np.array_equal(y, kernels.Kernels(2).linear(x, w)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1:] == ["0 True"], done.stderr

"""The room `system`: each of its functions on Windows and macOS, as far as Linux can imitate them."""

import ctypes
import fcntl
import os
import select
import shlex
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from subprocess import list2cmdline

import pytest
from helpers.other_systems import CPU_NAME, CPUS, MEMORY_LEFT, PEAK, interpreter, printed

from numpy_llama.errors import ParameterError
from numpy_llama.system import quote
from numpy_llama.training.run import open_folder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux imitates the others")
SYSTEMS = ["windows", "macos", "linux"]
TEMPORARY = {"HOME": "/home/u", "XDG_CACHE_HOME": "", "XDG_STATE_HOME": ""}


@pytest.mark.parametrize("system", ["windows", "macos"])
def test_the_machine(system):
    code = "print(system.free_memory(), system.peak_memory(), system.affinity(), system.cpu_name())"
    assert printed(system, code) == [f"{MEMORY_LEFT} {PEAK} {CPUS} {CPU_NAME}"]


def test_the_machine_where_the_system_says_nothing():
    """An older Mac has no kinds of cores. Windows' mask is empty if the CPUs are in several groups."""
    code = """
import ctypes, os
from types import SimpleNamespace
from helpers.other_systems import macos_sysctl
ctypes.CDLL = lambda name: SimpleNamespace(sysctlbyname=macos_sysctl({"hw.memsize": 7, "hw.pagesize": 16384}))
print(system.free_memory(), system.affinity() == os.cpu_count(), system.cpu_name() == "")
"""
    assert printed("macos", code) == ["7 True True"]
    code = "import os; system.kernel32.GetProcessAffinityMask = lambda *_: 1\n"
    assert printed("windows", code + "print(system.affinity() == os.cpu_count())") == ["True"]


def test_structures_are_laid_out_as_in_the_headers_of_windows():
    """MEMORYSTATUSEX of sysinfoapi.h and PROCESS_MEMORY_COUNTERS of psapi.h, on 64 bits."""
    code = "from ctypes import sizeof; s, c = system.MemoryStatus, system.MemoryCounters\n"
    code += "print(sizeof(s), s.physical.offset, s.physical_left.offset, sizeof(c), c.peak.offset)"
    assert printed("windows", code) == ["64 8 16 72 8"] and ctypes.sizeof(ctypes.c_size_t) == 8


@pytest.mark.parametrize("system", SYSTEMS)
def test_processes(system):
    """One that runs, one that has ended, and one of another user."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    code = "import os; print(*map(system.is_running, (os.getpid(), *given)))"
    assert printed(system, code, ended.pid) == ["True False"]
    other = "system.kernel32.OpenProcess = lambda *_: 0; import ctypes; ctypes.last_error = 5\n"
    if system == "windows":
        assert printed(system, other + "print(system.is_running(4))") == ["True"]


# ---------------------------------------------------------------- locks


@contextmanager
def held(path: Path):
    """A lock as another process would hold it: Windows locks a file in the place of a folder."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


TRY = """
from pathlib import Path
try:
    with system.locked(Path(given[0]), wait=False):
        print("locked")
except BlockingIOError:
    print("busy")
"""


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_file_is_locked_by_one_process_at_a_time(system, tmp_path):
    path = tmp_path / "x.lock"
    with held(path):
        assert printed(system, TRY, str(path)) == ["busy"]
    assert printed(system, TRY, str(path)) == ["locked"]


def test_a_folder_is_locked_by_one_process_at_a_time(tmp_path):
    for system in SYSTEMS:
        assert printed(system, TRY, str(tmp_path)) == ["locked"] and not list(tmp_path.iterdir())
    with held(tmp_path / ".lock"):
        assert printed("windows", TRY, str(tmp_path)) == ["busy"]
    place = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(place, fcntl.LOCK_EX)
    assert printed("macos", TRY, str(tmp_path)) == ["busy"]
    os.close(place)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_second_process_waits(system, tmp_path):
    path = tmp_path / "x.lock"
    code = "from pathlib import Path; print('asks', flush=True)\n"
    code += f"with system.locked(Path({str(path)!r})): print('in')"
    command = interpreter(system, f"from numpy_llama import system\n{code}")
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        with held(path):
            assert process.stdout.readline() == b"asks\n"
            assert not select.select([process.stdout], [], [], 0.3)[0]
        assert process.stdout.read() == b"in\n"


@pytest.mark.parametrize("system", SYSTEMS)
def test_two_runs_do_not_train_in_one_folder(system, tmp_path):
    code = """
from pathlib import Path
from numpy_llama.errors import ParameterError
from numpy_llama.system import quote
from numpy_llama.training.run import open_folder
with open_folder(Path(given[0]), False):
    try:
        with open_folder(Path(given[0]), False):
            print("both")
    except ParameterError as error:
        print(error)
print(Path(given[0]).exists())
"""
    (message, left) = printed(system, code, str(tmp_path / "run"))
    assert "a run trains in it now: wait for its end" in message and left == "False"


def test_hidden_files_make_no_run(tmp_path):
    """Finder of macOS leaves .DS_Store in a folder that a person opens."""
    (tmp_path / ".DS_Store").touch()
    with open_folder(tmp_path, False) as folder:
        assert folder.state is None
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ParameterError, match="has files"), open_folder(tmp_path, False):
        pass


# ---------------------------------------------------------------- files


SYNC = """
from helpers import other_systems
from pathlib import Path
import fcntl, os
if given[1]:
    def refuse(*_):
        raise OSError(45, "Operation not supported")
    fcntl.fcntl = refuse
    os.fsync = lambda place: other_systems.synced.append("fsync")
with open(given[0] + "/x", "wb") as file:
    system.sync(file.fileno())
system.sync_folder(Path(given[0]))
print(*[one if given[1] else one[1] for one in other_systems.synced])
"""


def test_macos_writes_through_the_drives_own_memory(tmp_path):
    assert printed("macos", SYNC, str(tmp_path), False) == ["51 51"]  # F_FULLFSYNC
    assert printed("macos", SYNC, str(tmp_path), True) == ["fsync fsync"]  # a file system without it


@pytest.mark.parametrize(
    "system, environment, caches, states",
    [
        ("linux", {}, "/home/u/.cache", "/home/u/.local/state"),
        ("macos", {}, "/home/u/Library/Caches", "/home/u/Library/Application Support"),
        ("windows", {"LOCALAPPDATA": "/home/u/Local"}, "/home/u/Local", "/home/u/Local"),
        ("windows", {"LOCALAPPDATA": ""}, "/home/u/AppData/Local", "/home/u/AppData/Local"),
        ("macos", {"XDG_CACHE_HOME": "/c", "XDG_STATE_HOME": "~/s"}, "/c", "/home/u/s"),
        ("windows", {"LOCALAPPDATA": "/l", "XDG_CACHE_HOME": "/c", "XDG_STATE_HOME": "s"}, "/c", "/l"),
    ],
)
def test_the_folders_of_a_user(system, environment, caches, states):
    code = """
from numpy_llama.checkpoint.download import cache_folder
from numpy_llama.cli.lines import history_file
print(cache_folder())
print(history_file())
"""
    wanted = [f"{caches}/numpy_llama", f"{states}/numpy_llama/chat_history"]
    assert printed(system, code, NUMPY_LLAMA_HOME="", **TEMPORARY | environment) == wanted


# ---------------------------------------------------------------- signals, pipes, terminals


@pytest.mark.parametrize(
    "system, name", [("windows", "SIGBREAK"), ("macos", "SIGHUP"), ("windows", "SIGTERM")]
)
def test_a_signal_ends_the_program_with_its_number(system, name):
    """SIGBREAK is Ctrl-Break. Ctrl-C is 130 on every system."""
    code = f"""
import signal
from numpy_llama import cli
from numpy_llama.cli import doctor
def run(args):
    signal.raise_signal(signal.{name})
doctor.run = run
try:
    cli.main(["doctor"])
except SystemExit as end:
    print(end.code - signal.{name})
"""
    assert printed(system, code) == ["128"]


CLOSED = """
import errno, io, os, sys
class Closed(io.RawIOBase):
    def writable(self):
        return True
    def write(self, data):
        raise OSError(errno.EINVAL, "Invalid argument")
    def fileno(self):
        return 1
stream = io.TextIOWrapper(io.BufferedWriter(Closed(), 16), errors="replace")
"""


def test_a_closed_pipe_is_no_error_on_windows():
    """As `numpy-llama doctor | head -1` ends on other systems."""
    code = "sys.stdout = stream; from numpy_llama import cli; os._exit(cli.main(['doctor']))"
    assert printed("windows", CLOSED + code) == []


def test_a_closed_pipe_has_one_error_on_every_system():
    code = """
stream = system.piped(stream)
stream.write("x")  # it is kept
for call in (stream.flush, lambda: stream.write("x" * 99999)):
    try:
        call()
    except BrokenPipeError as error:
        print(error.errno == errno.EPIPE, flush=True)
os._exit(0)
"""
    assert printed("windows", CLOSED + code) == ["True", "True"]


@pytest.mark.parametrize("asked, found", [("", "utf-8"), ("latin-1", "iso8859-1")])
def test_what_windows_writes_to_a_pipe_is_utf_8(asked, found):
    """If PYTHONIOENCODING is set, it is what that says."""
    code = """
import codecs, sys
sys.stdout.reconfigure(encoding="latin-1")
sys.stdout = system.piped(sys.stdout)
print(codecs.lookup(sys.stdout.encoding).name)
"""
    assert printed("windows", code, PYTHONIOENCODING=asked) == [found]


def test_the_keys_that_end_a_conversation():
    code = "from numpy_llama.cli.conversation import COMMANDS; print(COMMANDS['quit'][1])"
    assert printed("windows", code) == ["end the conversation, as Ctrl-Z and Enter does"]
    assert printed("macos", code) == ["end the conversation, as Ctrl-D does"]


@pytest.mark.parametrize("text", ["run 1", "run", "a 'b'", "C:\\new models\\m.gguf", "a & b", ""])
def test_a_quoted_text_is_one_word_of_a_command_line(text):
    """The C library of Windows takes double quotes alone, and so does cmd."""
    assert printed("windows", "print(system.quote(given[0]))", text) == [list2cmdline([text])]
    assert "'" not in list2cmdline(["run 1"]) and shlex.split(quote(text)) == [text]


def test_mpiexec_is_refused_on_windows():
    """MPI of Microsoft sets the same variables."""
    code = "from numpy_llama import cli; import sys; sys.stderr = sys.stdout; print(cli.main(['doctor']))"
    wanted = (
        "numpy-llama: mpiexec has started 2 processes, but a model on several machines needs Linux or macOS"
    )
    assert printed("windows", code, PMI_SIZE="2", PMI_RANK="0") == [f"{wanted}: leave mpiexec out", "1"]

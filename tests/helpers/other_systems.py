"""This interpreter as one of Windows or macOS, for what the package's Python asks of a system.

What Windows and macOS lack is removed, and what they refuse is refused. What only they have is imitated. The
names are those of CPython 3.13 for Windows, and those of typeshed for macOS. The files, the processes and the
C library stay those of Linux.

    python other_systems.py windows    reads commands of the program as JSON, and prints what became of each

It changes the whole interpreter, so it runs in one of its own.
"""

import builtins
import contextlib
import ctypes
import errno
import fcntl
import importlib
import io
import json
import mmap
import os
import platform
import resource
import select
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import ModuleType, SimpleNamespace

GIB = 1 << 30
MEMORY_LEFT, PEAK, CPUS, CPU_NAME = 5 * GIB, 3 * GIB, 3, "A CPU of another system"  # as imitated here
ACCESS_DENIED, WAIT_TIMEOUT = 5, 258
synced: list[tuple[int, int]] = []  # files and commands that macOS was asked to write to the disk
# What Windows has of the names in capital letters; of all others it lacks these.
WINDOWS_CONSTANTS = """
    F_OK R_OK W_OK X_OK O_APPEND O_CREAT O_EXCL O_RDONLY O_RDWR O_TRUNC O_WRONLY P_NOWAIT P_NOWAITO P_WAIT
    SEEK_CUR SEEK_END SEEK_SET TMP_MAX EX_OK SIGABRT SIGFPE SIGILL SIGINT SIGSEGV SIGTERM SIG_DFL SIG_IGN
    NSIG ACCESS_COPY ACCESS_DEFAULT ACCESS_READ ACCESS_WRITE ALLOCATIONGRANULARITY PAGESIZE
"""
WINDOWS_LACKS = """
    chown chroot confstr copy_file_range ctermid environb eventfd fchdir fchown fdatasync fork forkpty
    fpathconf fstatvfs fwalk getegid getenvb geteuid getgid getgrouplist getgroups getloadavg getpgid
    getpgrp getpriority getrandom getresgid getresuid getsid getuid getxattr initgroups killpg lchown
    listxattr lockf login_tty major makedev memfd_create minor mkfifo mknod nice openpty pathconf
    pidfd_open pipe2 posix_fadvise posix_fallocate posix_spawn posix_spawnp pread preadv pwrite pwritev
    readv register_at_fork removexattr sched_getaffinity sched_getparam sched_getscheduler sched_param
    sched_rr_get_interval sched_setaffinity sched_setparam sched_setscheduler sched_yield sendfile setegid
    seteuid setgid setgroups setpgid setpgrp setpriority setregid setresgid setresuid setreuid setsid
    setuid setxattr spawnlp spawnvp splice statvfs sync sysconf tcgetpgrp tcsetpgrp ttyname uname wait
    wait3 wait4 waitid writev alarm getitimer pause pidfd_send_signal pthread_kill pthread_sigmask
    setitimer siginterrupt sigpending sigtimedwait sigwait sigwaitinfo epoll poll register unregister
    clock_getres clock_gettime clock_settime pthread_getcpuclockid tzset
"""
WINDOWS_LACKS_MODULES = ("fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty")
MACOS_LACKS = """
    eventfd copy_file_range fdatasync getrandom getresgid getresuid getxattr listxattr memfd_create
    pidfd_open pipe2 posix_fadvise posix_fallocate removexattr sched_getaffinity sched_getparam
    sched_getscheduler sched_rr_get_interval sched_setaffinity sched_setparam sched_setscheduler setresgid
    setresuid setxattr splice pidfd_send_signal sigtimedwait sigwaitinfo epoll prlimit
    pthread_getcpuclockid O_DIRECT O_LARGEFILE O_NOATIME O_PATH O_RSYNC O_TMPFILE SIGCLD SIGPOLL SIGPWR
    SIGRTMAX SIGRTMIN SIGSTKFLT MADV_DODUMP MADV_DOFORK MADV_DONTDUMP MADV_DONTFORK MADV_HUGEPAGE
    MADV_MERGEABLE MADV_NOHUGEPAGE MADV_REMOVE MADV_UNMERGEABLE MAP_POPULATE MAP_STACK
"""
OTHERS = ("csv", "multiprocessing", "socket", "zipfile", "cffi", "jinja2.sandbox", "llguidance", "numpy")
OTHERS += ("regex", "rich.console", "rich.progress", "sentencepiece", "tiktoken")
REAL_OPEN, REAL_OPEN_NUMBER, REAL_LOCK = io.open, os.open, fcntl.flock  # before anything is changed
REAL_KILL, REAL_SIGNAL, REAL_REPLACE, REAL_UNLINK = os.kill, signal.signal, os.replace, os.unlink


# ---------------------------------------------------------------- Windows


def windows() -> None:
    import_others()
    sys.platform = "win32"
    lacks, constants = WINDOWS_LACKS.split(), WINDOWS_CONSTANTS.split()
    for module in (os, signal, mmap, select, time):
        for name in dir(module):
            if name in lacks or (name.isupper() and name not in constants and name[0] != "_"):
                delattr(module, name)
    sys.modules.update(dict.fromkeys(WINDOWS_LACKS_MODULES))
    sys.modules.update(msvcrt=windows_msvcrt(), winreg=windows_registry())
    signal.SIGBREAK = 21  # a signal of Linux too, which shells send
    signal.signal, os.kill = windows_signal, windows_kill
    ctypes.WinDLL, ctypes.CDLL = windows_library, windows_no_library
    ctypes.get_last_error = lambda: ctypes.last_error
    without_proc()
    windows_files()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(encoding="cp1252")


def windows_signal(number, handler):
    if number not in (2, 4, 8, 11, 15, 21, 22):
        raise ValueError("invalid signal value")
    return REAL_SIGNAL(number, handler)


def windows_kill(process, number):
    assert number, "os.kill(process, 0) sends a Ctrl-C on Windows"
    REAL_KILL(process, number)


def windows_no_library(name, *options, **more):
    raise TypeError("bad argument type for built-in operation" if name is None else name)


def windows_library(name: str, use_last_error: bool = False) -> SimpleNamespace:
    """kernel32.dll, with the functions that the package calls."""
    assert name == "kernel32" and use_last_error

    def fill(structure, **values) -> int:
        for field, value in values.items():
            setattr(structure._obj, field, value)
        return 1

    def open_process(access: int, inherit: bool, process: int) -> int | None:
        ctypes.last_error = 87
        try:
            REAL_KILL(process, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            ctypes.last_error = ACCESS_DENIED
            return None
        return 64

    return SimpleNamespace(
        GetCurrentProcess=lambda: 2**64 - 1,
        GlobalMemoryStatusEx=lambda status: fill(status, physical_left=MEMORY_LEFT),
        K32GetProcessMemoryInfo=lambda process, counters, nbytes: fill(counters, peak=PEAK),
        GetProcessAffinityMask=lambda process, own, machine: fill(own, value=2**CPUS - 1),
        OpenProcess=open_process,
        WaitForSingleObject=lambda handle, milliseconds: WAIT_TIMEOUT,
        CloseHandle=lambda handle: 1,
    )


def windows_msvcrt() -> ModuleType:
    """msvcrt, whose locks are those of Linux."""
    msvcrt = ModuleType("msvcrt")
    msvcrt.LK_UNLCK, msvcrt.LK_LOCK, msvcrt.LK_NBLCK = 0, 1, 2

    def locking(place: int, mode: int, nbytes: int) -> None:
        assert mode != msvcrt.LK_LOCK, "it gives up after ten seconds"
        try:
            REAL_LOCK(place, fcntl.LOCK_UN if mode == msvcrt.LK_UNLCK else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    msvcrt.locking = locking
    msvcrt.SEM_NOGPFAULTERRORBOX, msvcrt.SetErrorMode = 2, lambda mode: 0
    return msvcrt


def windows_registry() -> ModuleType:
    winreg = ModuleType("winreg")
    winreg.HKEY_LOCAL_MACHINE = 0
    winreg.OpenKey = lambda key, path: contextlib.nullcontext(path)
    winreg.QueryValueEx = lambda key, name: (CPU_NAME + "  ", 1)
    return winreg


def windows_files() -> None:
    """No folder is opened or replaced, nor a mapped file. Text is cp1252, unless another is named."""

    def open_number(path, flags, *options, **more):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return REAL_OPEN_NUMBER(path, flags, *options, **more)

    def open_file(file, mode="r", buffering=-1, encoding=None, *options, **more):
        if "b" not in mode and encoding in (None, "locale"):
            encoding = "cp1252"
        return REAL_OPEN(file, mode, buffering, encoding, *options, **more)

    def replace(old, new):
        if os.path.isdir(new):
            raise PermissionError(errno.EACCES, "Access is denied", old, 5, new)
        check_closed(old, new)
        REAL_REPLACE(old, new)

    def unlink(path, **options):
        check_closed(path)
        REAL_UNLINK(path, **options)

    os.open, os.replace, os.rename, os.unlink, os.remove = open_number, replace, replace, unlink, unlink
    io.open = builtins.open = open_file


def check_closed(*paths) -> None:
    """PermissionError if this process has mapped one of these files, or a file below one of these folders."""
    with REAL_OPEN("/proc/self/maps", encoding="utf-8") as file:
        mapped = [line.rstrip("\n").split(maxsplit=5)[5] for line in file if "/" in line]
    for path in map(os.path.realpath, paths):
        if used := [one for one in mapped if f"{one}/".startswith(f"{path}/")]:
            raise PermissionError(errno.EACCES, "The process cannot access the file", used[0], 32)


# ---------------------------------------------------------------- macOS


def macos() -> None:
    import_others()
    sys.platform = "darwin"
    for module in (os, signal, mmap, select, time, resource):
        for name in MACOS_LACKS.split():
            with contextlib.suppress(AttributeError):
                delattr(module, name)
    sysctl = {
        "hw.pagesize": 16384,
        "hw.memsize": 16 * GIB,
        "vm.page_free_count": MEMORY_LEFT // 4 // 16384,
        "vm.page_purgeable_count": MEMORY_LEFT // 4 // 16384,
        "vm.page_pageable_external_count": MEMORY_LEFT // 2 // 16384,
        "hw.perflevel0.physicalcpu": CPUS,
        "machdep.cpu.brand_string": CPU_NAME,
    }
    ctypes.CDLL = lambda name: SimpleNamespace(sysctlbyname=macos_sysctl(sysctl))
    resource.getrusage = lambda who: SimpleNamespace(ru_maxrss=PEAK)
    resource.setrlimit = macos_no_limit
    fcntl.F_FULLFSYNC, fcntl.fcntl = 51, lambda place, command: synced.append((place, command))
    without_proc()


def macos_sysctl(values: dict[str, int | str]):
    def sysctlbyname(name: bytes, value, nbytes, new, new_bytes: int) -> int:
        found = values.get(name.decode())
        if found is None:
            return -1
        data = found.encode() + b"\0" if isinstance(found, str) else found.to_bytes(8, "little")
        value[: len(data)] = data
        nbytes._obj.value = len(data)
        return 0

    return sysctlbyname


def macos_no_limit(what: int, limits: tuple[int, int]) -> None:
    if what == resource.RLIMIT_AS:
        raise ValueError("current limit exceeds maximum limit")


# ---------------------------------------------------------------- both


def import_others() -> None:
    """Import what would read the names that go now. Its own way with another system is not tested here."""
    for name in OTHERS:
        importlib.import_module(name)
    platform.uname()
    platform.processor()
    shutil.which = lambda name: None
    sys.modules["matplotlib"] = None  # it reads the fonts of a system
    for module, name in ((shutil, "os"), (subprocess, "os"), (subprocess, "signal"), (tempfile, "_os")):
        setattr(module, name, copy_of(getattr(module, name)))
    selectors.select = copy_of(select)


def copy_of(module: ModuleType) -> ModuleType:
    """The module as it is now, for Python's own files, which Linux must serve."""
    copy = ModuleType(module.__name__)
    copy.__dict__.update(vars(module))
    return copy


def without_proc() -> None:
    """There is no /proc and no /sys."""

    def hide(function):
        def hidden(path=".", *options, **more):
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(("/proc", "/sys")):
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
            return function(path, *options, **more)

        return hidden

    os.stat, os.open, os.listdir, os.scandir = map(hide, (os.stat, os.open, os.listdir, os.scandir))
    io.open = builtins.open = hide(io.open)


SYSTEMS = {"windows": windows, "macos": macos, "linux": lambda: None}


# ---------------------------------------------------------------- commands


def run(command: list[str], stdin: str) -> tuple[int, str, str]:
    """Run one command in this process: -> its exit code, its output and what it says. UTF-8 is expected."""
    outputs = [io.TextIOWrapper(io.BytesIO(), encoding=sys.__stdout__.encoding) for _ in range(2)]
    sys.stdout, sys.stderr = outputs
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding=sys.__stdin__.encoding)
    try:
        from numpy_llama import cli

        code = cli.main(command)
    except SystemExit as end:
        code = end.code
    except BaseException:
        code = -1
        traceback.print_exc(file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code, *(one.buffer.getvalue().decode() for one in outputs)


def main(system: str) -> None:
    commands = json.load(sys.stdin)
    SYSTEMS[system]()
    results = [run(*command) for command in commands]
    sys.__stdout__.write(json.dumps(results))


def interpreter(system: str, code: str) -> list[str]:
    """The command of an interpreter of that system that runs code."""
    begin = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
    begin += f"from helpers import other_systems\nother_systems.SYSTEMS[{system!r}]()\n"
    return [sys.executable, "-W", "error", "-c", begin + code]


def python(system: str, code: str, stdin: str = "", **options) -> subprocess.CompletedProcess:
    """Run code in an interpreter of that system to its end."""
    command = interpreter(system, code)
    return subprocess.run(command, input=stdin, capture_output=True, encoding="utf-8", timeout=120, **options)


def printed(system: str, code: str, *values, stdin: str = "", **environment: str) -> list[str]:
    """The lines that code prints on a system. It has the room as `system`, and `values` as `given`.

    An empty variable of the environment is left out.
    """
    begin = f"from numpy_llama import system\ngiven = {values!r}\n"
    env = {name: value for name, value in (os.environ | environment).items() if value}
    done = python(system, begin + code, stdin, env=env)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.splitlines()


def commands(system: str, given: list[tuple[list[str], str]], folder: Path) -> list[tuple[int, str, str]]:
    """Run commands of the program in one interpreter of that system, one after another."""
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__, system],
        input=json.dumps(given),
        capture_output=True,
        encoding="utf-8",
        cwd=folder,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(result) for result in json.loads(done.stdout)]


if __name__ == "__main__":
    main(sys.argv[1])

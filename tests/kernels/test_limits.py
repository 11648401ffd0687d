"""The CPUs that control groups leave, and the threads that can be made."""

import os
import subprocess
import sys

import pytest

from numpy_llama.backend import kernels, limits

HALF, ONE, THREE_HALVES, TWO = (f"{quota} 100000" for quota in (50_000, 100_000, 150_000, 200_000))
FILES = ("cgroup/cpu.max", "cgroup/cpu/cpu.cfs_quota_us", "proc/cgroup", "proc/mountinfo")
OWN = "0::/a.slice/b.service\n"
MOUNTED = "41 31 0:38 {root} {folder} rw,relatime shared:1 - {kind} {kind} rw,{options}\n"


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A function that makes the files of a system with 8 CPUs, given as name -> text."""
    monkeypatch.setattr(limits, "PROC", tmp_path / "proc")
    monkeypatch.setattr(limits, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "affinity", lambda: 8)

    def make(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace("{folder}", str(tmp_path)))

    return make


def v1(folder, quota, period="100000"):
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}


def mounted(at, kind="cgroup2", root="/", options=""):
    return MOUNTED.format(folder="{folder}/" + at, kind=kind, root=root, options=options)


@pytest.mark.parametrize(
    "files, quota, cpus",
    [
        ({}, None, 8),
        ({"cgroup/cpu.max": "max 100000"}, None, 8),
        ({"cgroup/cpu.max": ONE}, 1, 1),
        ({"cgroup/cpu.max": HALF}, 0.5, 1),
        ({"cgroup/cpu.max": THREE_HALVES}, 1.5, 1),
        ({"cgroup/cpu.max": "9900000 100000"}, 99, 8),
        ({"cgroup/a.slice/b.service/cpu.max": TWO, "proc/cgroup": OWN}, 2, 2),
        ({"cgroup/a.slice/cpu.max": TWO, "proc/cgroup": OWN}, 2, 2),
        ({"cgroup/a.slice/cpu.max": ONE, "cgroup/a.slice/b.service/cpu.max": TWO, "proc/cgroup": OWN}, 1, 1),
        ({"cgroup/a.slice/cpu.max": TWO, "cgroup/a.slice/b.service/cpu.max": ONE, "proc/cgroup": OWN}, 1, 1),
        ({"cgroup/c.slice/cpu.max": ONE, "proc/cgroup": OWN}, None, 8),  # another's
        (v1("cgroup/cpu", 200_000), 2, 2),
        (v1("cgroup/cpu", -1), None, 8),
        (v1("cgroup/cpu", 25_000, 10_000), 2.5, 2),
        (v1("cgroup/cpu/docker/x", 300_000) | {"proc/cgroup": "3:cpu,cpuacct:/docker/x\n0::/\n"}, 3, 3),
        (v1("cgroup/cpu/docker", 300_000) | {"proc/cgroup": "3:cpuacct,cpu:/docker/x\n0::/\n"}, 3, 3),
        (v1("cgroup/cpu/x", 300_000) | {"proc/cgroup": "3:memory:/x\n"}, None, 8),
        (v1("cgroup/cpu", 300_000) | {"cgroup/cpu.max": TWO}, 2, 2),
        (
            v1("elsewhere/x", 400_000)
            | {"proc/cgroup": "3:cpu,cpuacct:/x\n"}
            | {"proc/mountinfo": mounted("elsewhere", "cgroup", options="cpu,cpuacct")},
            4,
            4,
        ),
        (
            v1("elsewhere/x", 400_000)
            | {"proc/cgroup": "3:cpu,cpuacct:/x\n"}
            | {"proc/mountinfo": mounted("elsewhere", "cgroup", options="cpuset")},
            None,
            8,
        ),
        (
            {"cgroup/unified/a.slice/cpu.max": TWO, "proc/cgroup": OWN}
            | {"proc/mountinfo": mounted("cgroup/unified")},
            2,
            2,
        ),
        (  # a container whose tree begins at its own group, where /proc names it from the machine's root
            {"cgroup/b.service/cpu.max": TWO, "proc/cgroup": OWN}
            | {"proc/mountinfo": mounted("cgroup", root="/a.slice")},
            2,
            2,
        ),
    ],
)
def test_the_least_quota_of_all_groups_counts(files, quota, cpus, system):
    system(files)
    assert limits.cpu_quota() == quota
    assert kernels.available_cpus() == cpus


@pytest.mark.parametrize(
    "text", ["", "\n", "100000", "100000 0", "max", "0 100000", "-5 100000", "a b", "1 2 3"]
)
def test_a_quota_that_says_nothing_is_none(text, system):
    system(dict.fromkeys(FILES, text))
    assert limits.cpu_quota() is None


def test_the_affinity_counts_too(system, monkeypatch):
    system({"cgroup/cpu.max": "400000 100000"})
    monkeypatch.setattr(limits, "affinity", lambda: 3)
    assert kernels.available_cpus() == 3


def test_the_affinity_is_this_process(monkeypatch):
    assert limits.affinity() == len(os.sched_getaffinity(0))
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
    code += "from numpy_llama.backend import limits; print(limits.affinity())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1\n"


def test_the_doctor_says_which_quota_holds(system, capsys, main):
    system({"cgroup/cpu.max": HALF})
    assert main(["doctor"]) == 0
    assert (
        "\nthreads        1 of 8 CPUs, for the quota is 0.5 CPUs (choose with -t)\n"
        in capsys.readouterr().out
    )
    system({"cgroup/cpu.max": "max 100000"})
    assert main(["doctor"]) == 0
    assert "\nthreads        8 (choose with -t)\n" in capsys.readouterr().out


# ---------------------------------------------------------------- threads that cannot be made

LIMITED = """
import resource, threading
import numpy as np
from numpy_llama.errors import NumpyLlamaError
from numpy_llama.backend import kernels

def limit_address_space(more):
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))

def product(k):
    x = np.ones((64, 4096), np.float32)
    return k.linear(x, np.ones((256, 4096), np.float32)).sum(dtype=np.float64)

def attempt():
    try:
        print(work())
    except NumpyLlamaError as error:
        print(type(error).__name__, error)
    finally:
        print("finally")
"""


def limited(work, **environment):
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", LIMITED + work], capture_output=True, text=True, env=env)
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout


TOO_MANY = """
def work():
    limit_address_space({more} << 20)
    return product(kernels.Kernels(threads={threads}))
attempt()
"""


@pytest.mark.parametrize(
    "threads, more, environment",
    [(1000, 1024, {}), (8, 2048, {"OMP_STACKSIZE": "1G"}), (8, 2048, {"GOMP_STACKSIZE": "1048576"})],
)
def test_threads_that_cannot_be_made_are_an_error(threads, more, environment):
    output = limited(TOO_MANY.format(threads=threads, more=more), **environment)
    assert f"ResourceLimitError {threads} threads were asked for, the system makes " in output
    assert "`ulimit -v` is " in output and "threads=1, on the command line -t 1" in output
    assert output.endswith("\nfinally\n")


def test_where_openmp_asks_for_fewer_fewer_are_enough():
    output = limited(TOO_MANY.format(threads=1000, more=1024), OMP_THREAD_LIMIT="2", KMP_WARNINGS="0")
    assert output == f"{float(64 * 256 * 4096)}\nfinally\n"


def test_one_thread_needs_no_other():
    output = limited(TOO_MANY.format(threads=1, more=256), OMP_STACKSIZE="1G")
    assert output == f"{float(64 * 256 * 4096)}\nfinally\n"


def test_each_thread_that_calls_has_a_team_of_its_own():
    output = limited(
        """
k = kernels.Kernels(threads=4)
print(product(k))
work = lambda: product(k)
limit_address_space(1200 << 20)  # room for the caller's stack, not for three more of its team
thread = threading.Thread(target=attempt)
thread.start()
thread.join()
print(product(k))
""",
        OMP_STACKSIZE="1G",
    )
    first, error, finally_, last = output.splitlines()
    assert first == last == str(float(64 * 256 * 4096))
    assert error.startswith("ResourceLimitError 4 threads were asked for, the system makes ")
    assert finally_ == "finally"


def test_a_team_grows_again_only_where_it_can():
    output = limited(
        """
print(product(kernels.Kernels(threads=4)), product(kernels.Kernels(threads=2)))
def work():
    limit_address_space(512 << 20)
    return product(kernels.Kernels(threads=16))
attempt()
""",
        OMP_STACKSIZE="1G",
    )
    assert "ResourceLimitError 16 threads were asked for" in output


@pytest.mark.parametrize("size", ["16k", "64K", "100000B"])
def test_stacks_of_the_team_that_are_too_small_are_an_error(size):
    output = limited(TOO_MANY.format(threads=2, more=4096), OMP_STACKSIZE=size)
    assert "ResourceLimitError the stack of OpenMP's threads has room for " in output
    assert "the C kernels need 196608; OMP_STACKSIZE=1M" in output


@pytest.mark.parametrize("threads", [1, 2])
def test_a_stack_of_the_caller_that_is_too_small_is_an_error(threads):
    output = limited(f"""
k = kernels.Kernels(threads={threads})
work = lambda: product(k)
threading.stack_size(128 << 10)
thread = threading.Thread(target=attempt)
thread.start()
thread.join()
""")
    assert "ResourceLimitError the stack of the calling thread has room for " in output
    assert "threading.stack_size" in output


@pytest.mark.parametrize(
    "environment, nbytes",
    [
        ({}, 0),
        ({"OMP_STACKSIZE": "64"}, 64 << 10),
        ({"OMP_STACKSIZE": " 64 k "}, 64 << 10),
        ({"OMP_STACKSIZE": "2M", "GOMP_STACKSIZE": "1M"}, 2 << 20),
        ({"GOMP_STACKSIZE": "1g"}, 1 << 30),
        ({"OMP_STACKSIZE": "300000B"}, 300_000),
        ({"OMP_STACKSIZE": "many"}, 0),
        ({"OMP_STACKSIZE": "-1"}, 0),
        ({"OMP_STACKSIZE": "99999999999999999999G"}, 0),
    ],
)
def test_the_size_of_the_teams_stacks(environment, nbytes):
    assert limits.stack_bytes(environment) == nbytes


def test_the_limits_that_there_are_are_named(system):
    system({"cgroup/a.slice/pids.max": "20", "cgroup/pids.max": "max", "proc/cgroup": OWN})
    message = str(limits.too_many_threads(8, 5, 1 << 20))
    assert message.startswith(
        "8 threads were asked for, the system makes 5 (each takes a stack of 1048576 bytes"
    )
    assert "the control group allows 20 processes (pids.max)" in message

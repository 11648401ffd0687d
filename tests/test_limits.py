"""The CPUs that control groups leave: quotas of both versions, of the own group and of those around it."""

import os
import subprocess
import sys

import pytest

from numpy_llama import limits
from numpy_llama.backend import kernels

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
    code += "from numpy_llama import limits; print(limits.affinity())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1\n"


def test_the_doctor_says_which_quota_holds(system, capsys):
    from numpy_llama.cli import main

    system({"cgroup/cpu.max": HALF})
    assert main(["doctor"]) == 0
    assert (
        "\nthreads        1 of 8 CPUs, for the quota is 0.5 CPUs (choose with -t)\n"
        in capsys.readouterr().out
    )
    system({"cgroup/cpu.max": "max 100000"})
    assert main(["doctor"]) == 0
    assert "\nthreads        8 (choose with -t)\n" in capsys.readouterr().out

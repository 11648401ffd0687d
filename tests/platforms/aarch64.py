"""An aarch64 Python on an x86 machine: `python tests/platforms/aarch64.py ARGUMENTS OF PYTHON`.

qemu-user runs programs of another CPU; neither root nor binfmt is needed. The first call fetches Debian's
Python and PyPI's wheels into build/aarch64. A call after a change in csrc/ compiles the kernels. QEMU_CPU
chooses a model of `qemu-aarch64 -cpu help`. qemu shows whether the bits are right; its times mean nothing.

Needed on Debian: `apt install qemu-user gcc-aarch64-linux-gnu`, and this project in the Python that runs it.
"""

import os
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
HOME = REPOSITORY / "build" / "aarch64"
ROOT = HOME / "root"
PYTHON = HOME / "python"
SITE = ROOT / "usr" / "lib" / "python3" / "dist-packages"
NAME = "_kernels.cpython-311-aarch64-linux-gnu.so"  # an x86 Python does not import this name
KERNELS = REPOSITORY / "numpy_llama" / "backend" / NAME
CC = "aarch64-linux-gnu-gcc"
TOOLS = ["qemu-aarch64", CC, "apt-get", "dpkg"]
DEBIAN = ["python3", "libpython3.11-dev", "libgomp1", "libstdc++6"]
TESTS = ["pytest", "pytest-xdist", "hypothesis", "gguf"]

# apt with folders of its own: it leaves the packages of this machine alone, and starts from none.
APT = f"""
Dir "{HOME}/apt";
Dir::State::status "/dev/null";
APT::Architecture "arm64";
APT::Architectures {{ "arm64"; }};
APT::Install-Recommends "false";
APT::Sandbox::User "";
"""
KEY = "/usr/share/keyrings/debian-archive-keyring.gpg"
SOURCES = f"deb [signed-by={KEY}] http://deb.debian.org/debian bookworm main\n"

# Programs that Python starts are `sys.executable`, which must be a program of this machine.
SITECUSTOMIZE = f"import sys\nsys.executable = sys._base_executable = {str(PYTHON)!r}\n"
WRAPPER = f"""#!/bin/sh
export QEMU_LD_PREFIX='{ROOT}'
exec qemu-aarch64 '{ROOT}/usr/bin/python3.11' "$@"
"""


def make_python() -> None:
    """Unpack Debian's packages, install the wheels beside them, and write the wrapper last."""
    apt = HOME / "apt"
    folders = ["etc/apt/apt.conf.d", "etc/apt/preferences.d"]
    folders += ["var/lib/apt/lists/partial", "var/cache/apt/archives/partial"]
    for folder in folders:
        (apt / folder).mkdir(parents=True, exist_ok=True)
    (apt / "etc/apt/sources.list").write_text(SOURCES)
    (apt / "apt.conf").write_text(APT)
    environment = {**os.environ, "APT_CONFIG": str(apt / "apt.conf")}
    for command in (["update"], ["install", "--download-only", "--yes", *DEBIAN]):
        subprocess.run(["apt-get", "--quiet=2", *command], check=True, env=environment)
    ROOT.mkdir(exist_ok=True)
    for package in sorted(apt.glob("var/cache/apt/archives/*.deb")):
        subprocess.run(["dpkg", "-x", package, ROOT], check=True)
    shutil.rmtree(apt)

    wheels = [name for name in requires("numpy_llama") or [] if "extra ==" not in name]
    platforms = [f"--platform=manylinux{version}_aarch64" for version in ("2014", "_2_28")]
    python = ["--only-binary=:all:", "--python-version=3.11", f"--target={SITE}"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade"]
    subprocess.run([*pip, *platforms, *python, *wheels, *TESTS], check=True)
    ROOT.joinpath("usr/lib/python3.11/sitecustomize.py").unlink()  # a link to an absolute path
    (SITE / "sitecustomize.py").write_text(SITECUSTOMIZE)
    PYTHON.write_text(WRAPPER)
    PYTHON.chmod(0o755)


def make_kernels() -> None:
    """The usual build with another compiler, and Python's headers for aarch64."""
    headers = [ROOT / "usr" / "include", ROOT / "usr" / "include" / "python3.11"]
    environment = {
        **os.environ,
        "CC": CC,
        "LDSHARED": f"{CC} -shared",
        "CFLAGS": " ".join(f"-isystem {folder}" for folder in headers),
    }
    folders = [f"--build-lib={HOME / 'lib'}", f"--build-temp={HOME / 'temp'}"]
    command = [sys.executable, "setup.py", "--quiet", "build_ext", *folders]
    subprocess.run(command, check=True, cwd=REPOSITORY, env=environment)
    (built,) = HOME.glob("lib/numpy_llama/backend/_kernels.*")
    os.replace(built, KERNELS)  # a running Python keeps the file that it has mapped


def main() -> int:
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        sys.exit(f"not found: {', '.join(missing)}")
    if not PYTHON.exists():
        make_python()
    newest = max(path.stat().st_mtime for path in REPOSITORY.glob("csrc/*.*"))
    if not KERNELS.exists() or KERNELS.stat().st_mtime < newest:
        make_kernels()
    # Some tests compile C, for this Python.
    environment = {"QEMU_CPU": "max", **os.environ, "CC": CC, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([PYTHON, *sys.argv[1:]], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())

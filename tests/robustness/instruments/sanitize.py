"""The kernel tests on kernels built under a sanitizer:

    python tests/robustness/instruments/sanitize.py address|undefined|thread [arguments for pytest]

Everything happens in a temporary copy of the project. clang builds the extension there from the sources that
build_kernels.py lists. setup.py is not used: it adds Python's own flags, and -fwrapv makes signed overflow
legal. `--plant` first puts a bug into the copy. The command then fails if the sanitizer does not find it.
"""

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
KERNELS = ROOT / "tests" / "kernels"
TESTS = sorted(str(test) for test in KERNELS.glob("test_*.py"))
# This test builds kernels with gcc, so here it would test no kernel under a sanitizer.
NOT_THIS = "tests/kernels/test_kernels.py::test_the_kernels_build_and_agree_without_openmp"
MISSING = "apt install gcc clang libclang-rt-14-dev libomp-14-dev (or of another version)"

# The library that is loaded before Python, and its options.
RUNTIMES = {
    # Leaks are not checked, because Python frees nothing at its end. watch.c handles SIGBUS, and is tested.
    "address": ("libclang_rt.asan-x86_64.so", {"ASAN_OPTIONS": "detect_leaks=0:handle_sigbus=0"}),
    "undefined": ("libclang_rt.ubsan_standalone-x86_64.so", {"UBSAN_OPTIONS": "handle_sigbus=0"}),
    # The library is gcc's: clang 14's crashes if it is loaded before a program. Python and NumPy are not
    # instrumented, so races in them are not reported. A child of fork has one thread and may continue.
    "thread": (
        "libtsan.so",
        {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:die_after_fork=0:handle_sigbus=0"},
    ),
}
# A C file, a line of it, the line with the bug, and words of the sanitizer's report.
PLANTED = {
    "address": (
        "csrc/quantize.c",
        "w[i] = weight(format, p, 0, i);",
        "w[i] = weight(format, p, 0, i + 1);",
        "heap-buffer-overflow",
    ),
    "undefined": (
        "csrc/quantized_activations.c",
        "int64_t nl_activations_bytes(int64_t T, int64_t IN) {",
        "int64_t nl_activations_bytes(int64_t T, int64_t IN) {\n    static volatile int most = 2147483647;\n"
        "    most = most + (int)(T > 0);",
        "signed integer overflow",
    ),
    "thread": ("csrc/layer.c", "#pragma omp barrier", "", "data race"),
}


def library(name: str) -> str:
    """The path of a library of clang, of its OpenMP, or of gcc."""

    def asked(*command: str) -> Path:
        return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())

    resources = asked("clang", "-print-resource-dir")
    of_gcc = asked("gcc", f"-print-file-name={name}")
    for path in (resources / "lib" / "linux" / name, resources.parents[1] / name, of_gcc):
        if path.is_file():
            return str(path.resolve())
    sys.exit(f"{name} is missing: {MISSING}")


def build(copy: Path, sanitizer: str) -> None:
    """Compile the copy's sources into the copy's package."""
    os.chdir(copy)  # build_kernels.py's paths are relative to it
    parts = runpy.run_path("csrc/build_kernels.py")
    ffi = parts["make_ffi"](openmp=["-fopenmp"])
    ffi.emit_c_code("numpy_llama/backend/_kernels.c")
    flags = [flag for flag in parts["COMPILE"] if flag not in ("-O3", "-fno-tree-slp-vectorize")]
    flags += ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={sanitizer}"]
    flags += ["-fno-sanitize-recover=all", "-fopenmp", "-fPIC", "-DPy_LIMITED_API=0x030a0000"]
    includes = ["-I", "csrc", "-I", sysconfig.get_path("include")]
    if sanitizer == "thread":
        includes += ["-include", str(Path(__file__).with_name("tsan_vectors.h").resolve())]
    made = f"numpy_llama/backend/_kernels{'.abi3' if sysconfig.get_config_var('SOABI') else ''}.so"
    sources = ["numpy_llama/backend/_kernels.c", *(f"csrc/{name}" for name in parts["SOURCES"])]
    jobs = [
        subprocess.Popen(["clang", *flags, *includes, "-c", source, "-o", f"{Path(source).stem}.o"])
        for source in sources
    ]
    if any([job.wait() for job in jobs]):
        sys.exit("the kernels could not be compiled")
    objects = [f"{Path(source).stem}.o" for source in sources]
    subprocess.run(["clang", "-shared", *flags, *objects, "-lm", "-o", made], check=True)


def main() -> None:
    arguments = sys.argv[1:]
    plant = "--plant" in arguments
    if plant:
        arguments.remove("--plant")
    if not arguments or arguments[0] not in RUNTIMES:
        sys.exit(__doc__)
    if not shutil.which("clang"):
        sys.exit(f"clang is missing: {MISSING}")
    sanitizer, more = arguments[0], arguments[1:]
    runtime, options = RUNTIMES[sanitizer]
    environment = os.environ | options | {"LD_PRELOAD": library(runtime)}
    environment |= {"OMP_TOOL_LIBRARIES": library("libarcher.so")} if sanitizer == "thread" else {}
    with tempfile.TemporaryDirectory(prefix="sanitize-") as folder:
        copy = Path(folder)
        for name in ("csrc", "numpy_llama", "tests"):
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "corpus")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", copy)
        if plant:
            name, line, bug, _ = PLANTED[sanitizer]
            source = (copy / name).read_text()
            if line not in source:
                sys.exit(f"{name} has no line {line!r}: choose another line in PLANTED of sanitize.py")
            (copy / name).write_text(source.replace(line, bug))
        build(copy, sanitizer)
        environment |= {"PYTHONPATH": str(copy), "HYPOTHESIS_PROFILE": "few", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--capture=sys", "--deselect", NOT_THIS]
        if sanitizer == "thread":  # a random address may lie in the sanitizer's shadow memory
            command = ["setarch", "-R", *command]
        named = any(argument.startswith("tests/") for argument in more)
        # ThreadSanitizer's shadow memory does not fit an address space that a test limits.
        tests = [test for test in TESTS if sanitizer != "thread" or not test.endswith("test_limits.py")]
        command += [*([] if named else tests), *more]
        if not plant:
            sys.exit(subprocess.run(command, env=environment).returncode)
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(printed := done.stdout.decode(errors="replace"))
    report = PLANTED[sanitizer][-1]  # a run can fail for another reason, which finds nothing
    if report not in printed:
        sys.exit(f"the planted bug was not found: no {report!r} above")
    print("the planted bug was found")


if __name__ == "__main__":
    main()

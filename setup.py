"""Builds the C kernels; everything else about the package is in pyproject.toml."""

import os
import shutil
import sysconfig
from concurrent.futures import ThreadPoolExecutor

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

NO_COMPILER = """
numpy_llama's kernels are written in C, and no C compiler that works was found
({why}).
Install one, with Python's headers, and run the same command again:
    Debian, Ubuntu:  sudo apt install gcc python3-dev
    Fedora:          sudo dnf install gcc python3-devel
    macOS:           xcode-select --install
"""


class BuildKernels(build_ext):
    """The usual build, with a compiler on each CPU, and one clear message where there is none."""

    def build_extension(self, ext):
        compiler = self.compiler.compiler[0] if hasattr(self.compiler, "compiler") else "cl"
        if not shutil.which(compiler):
            raise SystemExit(NO_COMPILER.format(why=f"{compiler!r} is not on the PATH"))
        one_by_one = self.compiler.compile

        def at_once(sources, *arguments, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                jobs = [pool.submit(one_by_one, [source], *arguments, **options) for source in sources]
            return [made for job in jobs for made in job.result()]

        self.compiler.compile = at_once
        try:
            super().build_extension(ext)
        except CompileError as error:
            raise SystemExit(NO_COMPILER.format(why=error)) from None


free_threaded = sysconfig.get_config_var("Py_GIL_DISABLED")
setup(
    cffi_modules=["csrc/build_kernels.py:make_ffi"],
    cmdclass={"build_ext": BuildKernels},
    options={} if free_threaded else {"bdist_wheel": {"py_limited_api": "cp310"}},
)

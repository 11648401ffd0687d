"""All 2^32 floats through exp, silu, float32 to float16 and float32 to bfloat16, as csrc/ computes them:

    python tests/robustness/instruments/exhaustive.py [exp silu f16 bf16]

It tries every instruction set of this machine, with the flags of the ordinary build. That takes 25 minutes on
two cores. It prints the largest error of each. The limits are 2 units in the last place for exp, 3 for silu,
and the same bits for the conversions. The exit code is 1 if one of them is exceeded.
"""

import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
KINDS = ("exp", "silu", "f16", "bf16")


def main() -> None:
    wanted = sys.argv[1:] or KINDS
    if not {*wanted} <= {*KINDS}:
        sys.exit(__doc__)
    os.chdir(ROOT)
    parts = runpy.run_path("csrc/build_kernels.py")
    sources = ["tests/robustness/instruments/exhaustive.c", *(f"csrc/{name}" for name in parts["SOURCES"])]
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "exhaustive")
        compiler = os.environ.get("CC", "gcc")
        flags = [*parts["COMPILE"], *parts["openmp_flags"](), "-I", "csrc"]
        subprocess.run([compiler, *flags, *sources, "-lm", "-o", program], check=True)
        for kind in wanted:
            began = time.monotonic()
            if subprocess.run([program, kind]).returncode:
                failed.append(kind)
            print(f"      {time.monotonic() - began:.0f} s", flush=True)
    sys.exit(f"beyond its limit: {' '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()

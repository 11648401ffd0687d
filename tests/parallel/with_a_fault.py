"""Generate on ranks, where one rank has a fault in the second layer of a pass.

python with_a_fault.py MODEL RANK FAULT
"""

import os
import signal
import sys

import numpy_llama as nl
from numpy_llama.errors import NumericsError
from numpy_llama.parallel.model import CutBlock

path, rank, fault = sys.argv[1], int(sys.argv[2]), sys.argv[3]
usual = CutBlock.__call__


def block(self, *arguments):
    if self.attention.layer == 1 and int(os.environ["PMI_RANK"]) == rank:
        if fault == "error":
            raise NumericsError("a key is beyond float16")
        if fault == "bug":
            raise ZeroDivisionError("two\nlines")
        if fault == "memory":
            raise MemoryError
        if fault == "interrupted":
            signal.raise_signal(signal.SIGINT)
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    return usual(self, *arguments)


CutBlock.__call__ = block
llama = nl.load(path, threads=1)
if fault == "script":
    raise KeyError("of the script")
print(llama.generate("hi", max_tokens=3).text)

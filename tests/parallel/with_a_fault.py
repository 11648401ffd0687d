"""Generate on ranks, where one rank has a fault in the second layer of a pass.

python with_a_fault.py MODEL RANK FAULT
"""

import os
import signal
import sys

import numpy_llama as nl
from numpy_llama.errors import NumericsError
from numpy_llama.parallel import watch
from numpy_llama.parallel.ranks import Ranks

watch.BEAT, watch.PATIENCE = 0.2, 25
path, rank, fault = sys.argv[1], int(sys.argv[2]), sys.argv[3]
FIFTH = 5  # a gather of the second layer
gathers = 0


def with_fault(gather):
    def faulty(self, *arguments):
        global gathers
        gathers += 1
        if gathers == FIFTH and self.rank == rank:
            fail()
        return gather(self, *arguments)

    return faulty


def fail():
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
    if fault == "without mpiexec":
        os.kill(os.getppid(), signal.SIGKILL)
    if fault == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)


Ranks.gather, Ranks.gather_in_place = map(with_fault, (Ranks.gather, Ranks.gather_in_place))
if fault == "interrupted while sending":
    send = Ranks._send

    def interrupted(self, *command):
        send(self, *command)
        signal.raise_signal(signal.SIGINT)

    Ranks._send = interrupted
try:
    llama = nl.load(path, threads=1)
except KeyboardInterrupt:
    sys.exit("the program goes on")
if fault == "script":
    raise KeyError("of the script")
print(llama.generate("hi", max_tokens=3).text)

"""Compile a grammar in a process of its own, and print llguidance's message on it.

structured.py starts this file. A grammar of a few kilobytes can overflow llguidance's stack, which kills the
process, or keep it busy for hours. The limits here are below those of the process that asks. macOS does not
limit the memory, and Windows nothing; there structured.py limits the time.
"""

import json
import os
import sys
import threading
from contextlib import suppress
from typing import Any

import llguidance

CPU_SECONDS, MEMORY, STACK = 10, 4 << 30, 4 << 20


class Bytes:
    """A small vocabulary: special tokens among `size` ids, then a token for each byte, then an end token."""

    is_tokenizer_wrapper, bos_token_id, special_token_ids = True, None, ()

    def __init__(self, special: list[tuple[int, str]], size: int):
        self.size, self.eos_token_id = size, size + 256
        self.tokens = [b""] * size + [bytes([byte]) for byte in range(256)] + [b"\xff<end of the text>"]
        for i, name in special:
            self.tokens[i] = b"\xff" + name.encode()

    def __call__(self, text: str) -> list[int]:
        return [self.size + byte for byte in text.encode()]


def compile_grammar() -> None:
    source, special, size = json.load(sys.stdin)
    vocabulary: Any = Bytes(special, size)
    limits = llguidance.LLParserLimits(verbose_errors=False)
    tokenizer = llguidance.LLTokenizer(vocabulary)
    matcher = llguidance.LLMatcher(tokenizer, source, log_level=0, limits=limits)
    matcher.compute_bitmask()
    print(matcher.get_error(), end="", flush=True)
    os._exit(0)  # from this thread; the main thread fails if it ends otherwise


if sys.platform == "win32":
    import msvcrt

    msvcrt.SetErrorMode(msvcrt.SEM_NOGPFAULTERRORBOX)  # a crash ends the process, without a window
else:
    import resource

    LIMITS = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: CPU_SECONDS, resource.RLIMIT_AS: MEMORY}
    for what, most in LIMITS.items():
        hard = resource.getrlimit(what)[1]
        with suppress(ValueError, OSError):  # macOS: a process has more addresses than that
            resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
threading.stack_size(STACK)
thread = threading.Thread(target=compile_grammar)
thread.start()
thread.join()
sys.exit(1)

"""Run the hostile suite and print the table.

python tests/robustness/hostile/run.py [ID ...]
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
if __name__ == "__main__":
    sys.path[0] = str(HERE.parents[1])  # not this folder: its files are called as packages are

MiB = 1 << 20
SHOWN = 6  # problems of a case


@dataclass
class Result:
    """What came of one case, in both interpreters together, and what is wrong with that."""

    id: str
    expected: list[str] = field(default_factory=list)
    got: list[str] = field(default_factory=list)
    variants: int = 0
    seconds: float = 0.0
    peak: int = 0
    problems: list[str] = field(default_factory=list)


Records = dict[tuple[str, str], dict]  # by case and variant


def interpreter(ids: Iterable[str], flags: Sequence[str] = (), options: Sequence[str] = ()) -> Records:
    """An interpreter of its own that goes through the cases: its output is one JSON line a variant."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *flags, str(HERE / "attempt.py"), folder, *ids, *options]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    records = map(json.loads, out.splitlines())
    return {(record["id"], record["variant"]): record for record in records}


def attempted(ids: Iterable[str] = ()) -> tuple[Records, Records]:
    """All cases, or those asked for, in two interpreters side by side: plain and -O."""
    with ThreadPoolExecutor() as pool:
        plain, optimized = (pool.submit(interpreter, ids, flags) for flags in ([], ["-O"]))
        return plain.result(), optimized.result()


def asked(ids: Iterable[str] = ()) -> Records:
    """What the reference readers make of the same files."""
    return interpreter(ids, options=["--reference"])


def results(plain: Records, optimized: Records) -> dict[str, Result]:
    table: dict[str, Result] = {}
    for (id, name), record in plain.items():
        result, other = table.setdefault(id, Result(id)), optimized[id, name]
        result.variants += 1
        result.problems += [f"{id}, {name}: {problem}" for problem in record["problems"]]
        result.problems += [f"{id}, {name}, under -O: {problem}" for problem in other["problems"]]
        if record["got"] != other["got"]:
            result.problems.append(f"{id}, {name}: {record['got']}, under -O {other['got']}")
        for seen, value in [(result.expected, record["expected"]), (result.got, record["got"])]:
            if value not in seen:
                seen.append(value)
        result.seconds = max(result.seconds, record["seconds"], other["seconds"])
        result.peak = max(result.peak, record["peak"], other["peak"])
    return table


def disagreements(ours: Records, theirs: Records) -> dict[tuple[str, str], str]:
    """Files that we take and the reference does not, or the other way round."""
    out = {}
    for key, record in theirs.items():
        we, they = ours[key]["got"] == "accepted", record["got"] == "accepted"
        if we != they:
            words = f"ours: {ours[key]['got']}, {record['reader']}: {record['got']} {record['message'][:100]}"
            out[key] = words
    return out


def print_table(table: dict[str, Result]) -> None:
    cases = {id: result for id, result in table.items() if not id.startswith("OK")}
    print(f"{'id':<4} {'expected':<40} {'got':<40} {'s':>6} {'MiB':>6}")
    for id, result in table.items():
        mark = "" if not result.problems else "  <--"
        expected, got = (", ".join(x).replace("Error", "") for x in (result.expected, result.got))
        print(f"{id:<4} {expected:<40} {got:<40} {result.seconds:>6.2f} {result.peak / MiB:>6.1f}{mark}")
    for result in table.values():
        for problem in result.problems[:SHOWN]:
            print(problem)
        if len(result.problems) > SHOWN:
            print(f"{result.id}: and {len(result.problems) - SHOWN} more")
    slowest = max(cases.values(), key=lambda result: result.seconds)
    highest = max(cases.values(), key=lambda result: result.peak)
    passed = sum(not result.problems for result in cases.values())
    variants = sum(result.variants for result in cases.values())
    print(
        f"{passed} of {len(cases)} cases, {variants} variants, "
        f"slowest {slowest.seconds:.2f} s ({slowest.id}), highest {highest.peak / MiB:.0f} MiB ({highest.id})"
    )


if __name__ == "__main__":
    table = results(*attempted(sys.argv[1:]))
    print_table(table)
    sys.exit(any(result.problems for result in table.values()))

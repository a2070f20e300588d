"""A gate without noise: how many instructions of mmkern's extension a call of each op takes, counted by callgrind.

    python -m mmkern.benchmarks.instructions            # exit status 1 if a count grew by more than 2%
    python -m mmkern.benchmarks.instructions --update   # writes the table that the next run is held against

One thread and the AVX2 kernels, which callgrind knows: the same numbers on every machine with the same compiler. What
Python and torch execute around a call is not counted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import mmkern
from mmkern.benchmarks.records import Case
from mmkern.benchmarks.suite import select
from mmkern.ops.dispatch import _C

TABLE = Path(__file__).with_name("instructions.json")
ISA = "avx2"
GROWTH = 0.02
MOST_WORK = 3e8  # operations of a case: callgrind executes some 50 million a second
EXTENSION = re.compile(r"mmkern/_C\b[^/]*\.so")


def cases() -> list[Case]:
    """Of each op and dtype the case with the least work that is more than the cost of a call."""
    found: dict[tuple[str, str], Case] = {}
    for case in sorted(select(level="default"), key=lambda c: c.flops):
        if case.shape != "smallest" and case.flops < MOST_WORK and case.dtype != torch.float16:
            found.setdefault((case.op, case.dtype_name), case)
    return list(found.values())


def own_instructions(profile: str) -> int:
    """Instructions executed in mmkern's extension, of a callgrind profile: a cost after `calls=` is the callee's."""
    names: dict[str, str] = {}
    total, inside, skip = 0, False, False
    for line in profile.splitlines():
        if line.startswith("ob="):
            number, _, name = line[3:].partition(" ")
            if name:
                names[number] = name
            inside = bool(EXTENSION.search(names.get(number, "")))
        elif line.startswith(("cob=", "cobj=")):  # may name an object for the first time
            number, _, name = line.split("=", 1)[1].partition(" ")
            if name:
                names[number] = name
        elif line.startswith("calls="):
            skip = True
        elif re.match(r"[\d+*-]", line):
            if inside and not skip:
                total += int([*line.split(), "0"][1])  # a cost of 0 is left out
            skip = False
    return total


def _control(*arguments: str) -> None:
    subprocess.run(["callgrind_control", *arguments, str(os.getpid())], check=True, capture_output=True)


def under_callgrind() -> None:
    """In the process that callgrind runs: a profile per case, of one call after a first one."""
    torch.set_num_threads(1)
    with mmkern.backend("cpu", isa=ISA):
        for case in cases():
            problem = case.build(case.dtype, "cpu")
            problem.ours()
            _control("-i", "on")
            _control("-z")
            problem.ours()
            _control("-d", case.id)
            _control("-i", "off")
            print(case.id, file=sys.stderr, flush=True)


def count() -> dict[str, int]:
    """Of each case, by its id.

    Raises:
        RuntimeError: callgrind is missing or failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out"]
        script = "from mmkern.benchmarks.instructions import under_callgrind; under_callgrind()"
        command = [*valgrind, sys.executable, "-c", script]
        try:
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"})
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"callgrind: {error}") from None
        found = {}
        for path in Path(folder).glob("out.*"):
            profile = path.read_text(encoding="utf-8", errors="replace")
            if match := re.search(r"^desc: Trigger: dump (.+)$", profile, re.M):
                found[match[1].strip()] = own_instructions(profile)
        return found


def grown(before: dict[str, int], now: dict[str, int]) -> list[str]:
    """A line per case that takes more instructions than before, by more than GROWTH."""
    return [
        f"{name}: {before[name]} instructions before, {n} now: {n / before[name] - 1:+.1%}"
        for name, n in now.items()
        if name in before and n > (1 + GROWTH) * before[name]
    ]


def main(arguments: list[str]) -> None:
    if _C is None or ISA not in _C.isas():
        sys.exit(f"instructions: mmkern._C is not built with {ISA}")
    compiler = _C.build()["compiler"]
    if arguments not in ([], ["--update"]):
        sys.exit("instructions: the only argument is --update")
    table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else None
    if not arguments and (table is None or table["compiler"] != compiler):
        why = f"was made with {table['compiler']}, this build is by {compiler}" if table else "is missing"
        sys.exit(f"instructions: {TABLE.name} {why}; make it with --update on a commit that you trust")
    try:
        counts = dict(sorted(count().items()))
    except RuntimeError as error:
        sys.exit(f"instructions: {error}")
    if arguments:
        TABLE.write_text(json.dumps({"compiler": compiler, "counts": counts}, indent=1) + "\n", encoding="utf-8")
        print(f"written: {TABLE} ({len(counts)} cases)")
        return
    lines = grown(table["counts"], counts)
    print("\n".join(lines) or f"{len(counts)} cases: none takes over {GROWTH:.0%} more instructions than before")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main(sys.argv[1:])

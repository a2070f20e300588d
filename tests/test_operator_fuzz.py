"""Wrong calls of every operator, straight through torch.ops: an error or the reference's result, never a crash."""

import subprocess
import sys
from pathlib import Path

import pytest
from operator_calls import CALLS, OPS

PROGRAM = Path(__file__).with_name("operator_calls.py")


def run(*arguments):
    """The lines of a process that makes the calls; a crash names the call that did it."""
    found = subprocess.run([sys.executable, PROGRAM, *arguments], capture_output=True, text=True, check=False)
    lines = found.stdout.splitlines()
    wrong = [f"{call}\n{out}" for call, out in zip(lines[:-1:2], lines[1::2], strict=False) if "WRONG" in out]
    assert not wrong, "\n".join(wrong)
    assert found.returncode == 0, f"exit code {found.returncode} at {lines[-1:]}\n{found.stderr[-2000:]}"
    return lines


def test_there_is_a_right_call_of_every_operator():
    assert set(CALLS) == set(OPS)


@pytest.mark.parametrize("guard", [(), ("--guard",)])
def test_a_wrong_call_is_refused_or_right(guard):
    """2,000 calls and more; the seeds differ with and without pages that must not be touched behind the tensors."""
    calls = 60 * len(CALLS)
    lines = run(str(len(guard)), "0", str(calls), *guard)
    assert lines[-1] == f"{calls} calls, 0 wrong"
    outcomes = [line.split()[0] for line in lines[1::2]]
    assert outcomes.count("ok") > calls / 4, "right calls are refused"
    assert outcomes.count("refused") > calls / 4, "wrong calls are drawn"

"""What the tests of every op stand on: refusals as `explain` prints them, and which cases an interpreter leaves out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import WITH_CUDA, Backend, backends
from conftest import Once, turn
from op_calls import CALLS, OpCall

import mmkern

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_an_op_without_a_cuda_kernel_is_refused(call: OpCall) -> None:
    """And one that has them all, forward and backward, runs its table on them."""
    backend = Backend("cuda")
    if call.fn.__name__ not in WITH_CUDA:
        backend.refuses("no kernel for this op", call.run)
    elif backends(call.fn.__name__, ["cuda"]):
        with backend.forced():
            ran = mmkern.explain(call.run, call.copies(requires_grad=True))
        assert {choice.backend for choice in ran} == {"cuda"}


WITH_KERNELS = [
    pytest.param(call, *backend.values, id=f"{call}-{backend.id}")
    for call in CALLS
    for backend in backends(call.fn.__name__)
]


@pytest.mark.parametrize(("call", "backend"), WITH_KERNELS)
def test_float64_is_refused_by_every_kernel(call: OpCall, backend: Backend) -> None:
    wide = {n: backend.to(t.double() if t.is_floating_point() else t) for n, t in call.tensors.items()}
    backend.refuses("float64", lambda: call.run(wide))


def test_cuda_joins_the_tables_of_what_has_its_kernels() -> None:
    assert {"softmax", "log_softmax"} <= WITH_CUDA <= {call.fn.__name__ for call in CALLS}


def test_rows_take_turns_with_dtypes() -> None:
    """Along each axis of a table, of whatever length, every dtype has its turn."""
    for inner in (1, 2, 3, 4, 9, 12):
        for at in range(inner):
            taken = [turn(row * inner + at) % 3 for row in range(27)]
            assert min(taken.count(dtype) for dtype in range(3)) >= 5, (inner, at)


def test_what_all_backends_share_is_computed_once() -> None:
    drawn = iter(range(9))
    first, again = Once(("a case",)), Once(("a case",))
    assert [first(lambda: next(drawn)), first(lambda: next(drawn))] == [0, 1]
    assert [again(lambda: next(drawn)), again(lambda: next(drawn)), again(lambda: next(drawn))] == [0, 1, 2]
    assert Once(("another",))(lambda: next(drawn)) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU leaves nothing out")
def test_an_interpreter_leaves_out_what_is_marked_and_no_case_is_lost() -> None:
    def collected(*options: str) -> set[str]:
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *options]
        done = subprocess.run([*command, "tests/test_rotary.py"], cwd=ROOT, capture_output=True, text=True, check=True)
        return {line for line in done.stdout.splitlines() if "::" in line}

    usual, rest, all_of_them = collected(), collected("-m", "interpreter"), collected("-m", "")
    assert usual | rest == all_of_them
    assert not usual & rest
    assert all("triton" in case for case in rest)
    values = [case for case in usual if "test_values" in case and "triton" in case]
    assert len(values) == 2 * 13  # layouts of pairs, rows that are not large; one dtype each
    assert {case for case in usual if "longer" in case and "triton" in case} == set()

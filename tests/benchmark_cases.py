"""A small case with its parts replaced, and a report without measuring: what the tests of the benchmarks share."""

import itertools
import os
import time
from dataclasses import replace

import torch

import mmkern
from mmkern.benchmarks import machine
from mmkern.benchmarks.records import Baseline, Case, Pair, Problem, Result
from mmkern.benchmarks.trace import Report


def softmax_case(ours=None, baselines=None, x=None, **changes) -> Case:
    """Softmax of 64x256 in float32, with `ours`, the baselines or the input replaced."""

    def build(dtype, device):
        given = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(dtype) if x is None else x
        return Problem(
            (lambda: ours(given)) if ours else lambda: mmkern.softmax(given, 1),
            baselines or [Baseline("eager", lambda: torch.softmax(given, 1))],
            lambda: torch.softmax(given.double(), 1),
            inputs=[given],
        )

    case = Case("softmax", "softmax", "test", "64x256", torch.float32, build, 1e6, 2 * 64 * 256 * 4, "copy")
    return replace(case, **changes)


def broken(kind: str, dtype: torch.dtype, device: str) -> Problem:
    """A case for a process of its own: it sleeps, ends the process, or raises when the other side is called."""
    x = torch.randn(64, 256)

    def theirs():
        if kind == "sleeps" and next(calls):
            time.sleep(60)
        elif kind == "dies":
            os.abort()
        elif kind == "raises":
            raise ValueError("no\nkernel")
        return torch.softmax(x, 1)

    calls = itertools.count()
    return Problem(lambda: torch.softmax(x, 1), [Baseline("", theirs)], lambda: torch.softmax(x.double(), 1))


def a_result(op: str, shape: str, dtype: str, ratio: float, spread: float = 0.1) -> Result:
    pair = Pair([1e-3] * 5, [ratio * 1e-3] * 5, ratio, ratio - spread, ratio + spread)
    return Result(
        "softmax", op, shape, "8x8", dtype, 1e6, 4e7, "copy", ran=["softmax_fwd: cpu (avx2)"], max_error=1e-7,
        torch_error=2e-7, relative_l2=1e-8, against="eager", screened={"eager": 2e-3, "other": "no"}, pair=pair,
        ceiling=50.0,
    )  # fmt: skip


def a_report() -> Report:
    results = [
        a_result("softmax", "big", "float32", 2.0),
        a_result("softmax", "small", "float32", 0.5),
        a_result("softmax", "close", "bfloat16", 0.95),
        a_result("softmax", "smallest", "bfloat16", 4.0),
        Result("softmax", "softmax", "bad | one", "1", "float16", 1, 1, "copy", status="wrong", error="max error 1"),
    ]
    ceilings = {"fma": 230.0, "copy 64 KiB": 90.0, "copy 65536 KiB": 45.0}
    return Report(
        "2026-01-01T00:00:00+00:00",
        {"level": "quick", "model": True},
        machine.facts() | {"load": 2.0},
        [r.id for r in results],
        results,
        ceilings,
        noise=[{"calls": {"softmax": 0.015}, "floor": 0.015, "busy": 2.0, "threads": 2}],
        complete=True,
    )

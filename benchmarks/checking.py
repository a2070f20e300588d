"""Whether an output is right: against float64, by the rule of mmkern.testing."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch

import mmkern
from mmkern.benchmarks.records import SEED, Outputs, Problem
from mmkern.testing import Accuracy, accuracy

WRONG = 4.0  # a baseline is right up to this many times the limit that mmkern is held to


class Checked(NamedTuple):
    """The first call: how accurate, what ran, what it gave."""

    accuracy: Accuracy
    ran: list[mmkern.Choice]
    outputs: Outputs
    seconds: float


def as_outputs(given: Any) -> Outputs:
    return given if isinstance(given, tuple) else (given,)


def judge(problem: Problem, outputs: Outputs, baseline: Outputs, exact: Outputs) -> Accuracy:
    """The worst of the outputs by the rule of mmkern.testing; what is compared is picked already."""
    found = [accuracy(a, e, b, problem.kind) for a, e, b in zip(outputs, exact, baseline, strict=True)]
    return max(found, key=lambda one: (not one.ok, one.max_error / one.bound))


def check(problem: Problem) -> Checked:
    """Accuracy of ours, and what ran."""
    kept: list[Any] = []
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        start = time.perf_counter()
        ran = mmkern.explain(lambda: kept.append(problem.ours()))
        seconds = time.perf_counter() - start
    outputs = as_outputs(kept[0])
    if problem.yardstick:
        baseline = as_outputs(problem.yardstick())
    else:
        with problem.baselines[0].context():
            baseline = problem.compared(as_outputs(problem.baselines[0].call()))
    exact = as_outputs(problem.exact())
    return Checked(judge(problem, problem.compared(outputs), baseline, exact), ran, outputs, seconds)


def right(problem: Problem, baseline: Outputs, exact: Outputs) -> str:
    """Why a baseline's output (what is compared of it) is too far from float64 to be a rival; empty if it is not."""
    for b, e in zip(baseline, exact, strict=True):
        found = accuracy(b, e, None, problem.kind)
        if found.relative_l2 > WRONG * found.limit:
            return f"wrong: relative L2 {found.relative_l2:.1e} from float64"
    return ""

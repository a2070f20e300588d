"""The measuring core: a case is checked against float64 first, then timed in pairs with torch's best.

Machines are noisy and their clocks drift, so no time is compared with one taken at another moment: every
round times both sides one right after the other, the order swapped each round, and a speedup is the median
of the rounds' ratios with a bootstrap interval.
"""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import mmkern
from mmkern.benchmarks.memory import peak_bytes
from mmkern.testing import Accuracy, accuracy

SAMPLE_SECONDS = 2e-3  # shortest timed stretch: a clock read and loop entry of 0.2 us are then 0.01%
MIN_ROUNDS, MAX_ROUNDS = 5, 201
HOPELESS = 3.0  # a baseline whose first call takes this many times the best so far is not timed again
RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 1234  # of torch's generator when the check calls ours
LEVELS = ("quick", "default", "full")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Call = Callable[[], Any]


@dataclass(frozen=True)
class Baseline:
    """Another way to compute the same thing; `context` is entered around a whole timed stretch."""

    name: str
    call: Call
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Problem:
    """One case with its inputs made: callables without arguments that return a tensor or a tuple of tensors.

    ours: the mmkern call under test.
    baselines: the first one is also the yardstick of accuracy, unless there is a `yardstick`.
    exact: torch's formula in float64 on the same rounded inputs. Not mmkern's own reference: a mistake in the
        public function, which leads to the kernel and to that reference alike, would not show. What ours draws at
        random is drawn again after torch.manual_seed(SEED).
    compared: picks the part of an output that `exact` gives, where all of it would not fit in memory.
    kind: "forward", or "gradient" where the outputs are gradients: which rule of mmkern.testing holds.
        Peak memory is measured for gradients.
    yardstick: torch's way to the same numbers in the same dtype, never timed, where the baselines draw random
        numbers of their own and so compute something else.
    """

    ours: Call
    baselines: Sequence[Baseline]
    exact: Call
    compared: Callable[[Tensor], Tensor] = lambda output: output
    kind: str = "forward"
    yardstick: Call | None = None


@dataclass(frozen=True)
class Case:
    """What is measured, with the work it cannot avoid.

    family, op: "attention", "attention-causal"; `op` is the name used in options and tables.
    shape, dims: "BERT-base 512" and "2x12x512x64".
    build: makes the inputs for a dtype and a device.
    flops: multiplications and additions that the result needs (causal: only the visible half).
    bytes: compulsory traffic: each input read once, each output written once.
    bound: the ceiling it is held against: "fma", "bf16_dot", "copy" or "read".
    level: "quick", "default" or "full": the smallest kind of run that includes it; "gpu": any run on a GPU.
    """

    family: str
    op: str
    shape: str
    dims: str
    dtype: torch.dtype
    build: Callable[[torch.dtype, str], Problem]
    flops: float
    bytes: float
    bound: str
    level: str = "default"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def id(self) -> str:
        return f"{self.op}-{self.shape}-{self.dtype_name}".replace(" ", "_")


@dataclass(frozen=True)
class Pair:
    """Seconds per call of both sides, one entry per round, and how many times faster ours is."""

    ours: list[float]
    theirs: list[float]
    speedup: float
    low: float
    high: float


@dataclass
class Result:
    """One case measured. `status` is "ok", "wrong" (accuracy check failed, no time) or "error"."""

    family: str
    op: str
    shape: str
    dims: str
    dtype: str
    flops: float
    bytes: float
    bound: str
    status: str = "ok"
    error: str = ""
    ran: list[str] = field(default_factory=list)  # the backend of each op call, as mmkern.explain tells it
    max_error: float | None = None
    torch_error: float | None = None
    relative_l2: float | None = None
    against: str = ""  # the fastest baseline, which `pair` is timed against
    screened: dict[str, float | str] = field(default_factory=dict)  # baseline -> seconds, or why it has none
    pair: Pair | None = None
    ceiling: float | None = None  # GFLOP/s or GB/s of `bound`, measured in this run
    peak_bytes: int | None = None  # most tensor memory that one call holds at once; for gradients only
    torch_peak_bytes: int | None = None  # the same for `against`

    @property
    def seconds(self) -> float | None:
        return median(self.pair.ours) if self.pair else None

    @property
    def torch_seconds(self) -> float | None:
        return median(self.pair.theirs) if self.pair else None

    @property
    def rate(self) -> float | None:
        """GFLOP/s where arithmetic is the limit, else GB/s."""
        work = self.flops if self.bound in ("fma", "bf16_dot") else self.bytes
        return work / self.seconds / 1e9 if self.seconds else None

    @property
    def of_ceiling(self) -> float | None:
        return self.rate / self.ceiling if self.rate and self.ceiling else None


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Bootstrap confidence interval of the median: the same answer for the same values."""
    generator = torch.Generator().manual_seed(len(values))
    x = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    medians = x[picks].quantile(0.5, dim=1)
    tail = (1 - confidence) / 2
    low, high = medians.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Pair:
    """The speedup that paired samples show: median of their ratios, with its interval."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return Pair(list(ours), list(theirs), median(ratios), *interval(ratios))


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


def seconds_per_call(call: Call, loops: int = 1, device: str = "cpu") -> float:
    if device != "cpu":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(loops):
        call()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / loops


def loops_for(call: Call, device: str = "cpu") -> int:
    """How many calls fill a sample; the first call, which may allocate or compile, is not counted."""
    call()
    loops = 1
    while (spent := seconds_per_call(call, loops, device) * loops) < SAMPLE_SECONDS and loops < 1 << 20:
        loops = max(loops + 1, min(loops * 16, math.ceil(loops * 1.2 * SAMPLE_SECONDS / max(spent, 1e-9))))
    return loops


def time_pair(ours: Call, theirs: Baseline, budget: float, device: str = "cpu") -> Pair:
    """Time both sides in alternating order for `budget` seconds and at least MIN_ROUNDS rounds."""
    with theirs.context():
        loops = loops_for(ours, device), loops_for(theirs.call, device)
    samples: tuple[list[float], list[float]] = ([], [])
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + budget
        while len(samples[0]) < MIN_ROUNDS or (time.perf_counter() < end and len(samples[0]) < MAX_ROUNDS):
            for side in (0, 1) if len(samples[0]) % 2 == 0 else (1, 0):
                with theirs.context() if side else nullcontext():
                    samples[side].append(seconds_per_call(theirs.call if side else ours, loops[side], device))
    finally:
        if collecting:
            gc.enable()
    return compare(*samples)


def screen(baselines: Sequence[Baseline], device: str = "cpu") -> dict[str, float | str]:
    """Seconds of each baseline by a few calls, or the reason why torch cannot run it here."""
    found: dict[str, float | str] = {}
    best = math.inf
    for baseline in baselines:
        try:
            with warnings.catch_warnings(), baseline.context():
                warnings.simplefilter("ignore")
                baseline.call()
                first = seconds_per_call(baseline.call, device=device)
                if first < HOPELESS * best:
                    loops = loops_for(baseline.call, device)
                    first = min(seconds_per_call(baseline.call, loops, device) for _ in range(3))
        except Exception as error:  # whatever another library raises, the case keeps its other baselines
            found[baseline.name] = str(error).strip().splitlines()[0]
            continue
        found[baseline.name] = first
        best = min(best, first)
    return found


def check(problem: Problem) -> tuple[Accuracy, list[mmkern.Choice]]:
    """Accuracy of ours (the worst of its outputs) by the rule of mmkern.testing, and what ran."""
    kept: list[Any] = []
    yardstick = Baseline("yardstick", problem.yardstick) if problem.yardstick else problem.baselines[0]
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        ran = mmkern.explain(lambda: kept.append(problem.ours()))
    with yardstick.context():
        outputs = [kept[0], yardstick.call()]
    actual, baseline = ([problem.compared(t) for t in (o if isinstance(o, tuple) else (o,))] for o in outputs)
    exact = problem.exact()
    exact = exact if isinstance(exact, tuple) else (exact,)
    found = [accuracy(a, e, b, problem.kind) for a, e, b in zip(actual, exact, baseline, strict=True)]
    return max(found, key=lambda one: (not one.ok, one.max_error / one.bound)), ran


def measure(
    case: Case,
    budget: float = 0.5,
    device: str = "cpu",
    ceiling: Callable[[Case], float | None] = lambda case: None,
    timed: bool = True,
) -> Result:
    """Check one case, then time it unless it is wrong; an exception becomes the result's `error`."""
    result = Result(case.family, case.op, case.shape, case.dims, case.dtype_name, case.flops, case.bytes, case.bound)
    try:
        problem = case.build(case.dtype, device)
        found, ran = check(problem)
        result.ran = list(dict.fromkeys(str(choice).splitlines()[0] for choice in ran))
        result.max_error, result.torch_error = found.max_error, found.baseline_error
        result.relative_l2 = found.relative_l2
        if not found.ok:
            result.status, result.error = "wrong", str(found)
            return result
        if not timed:
            return result
        baselines = [*problem.baselines]
        if device != "cpu" and problem.kind == "forward" and case.level == "quick":  # compiling takes seconds
            compiled = torch.compile(problem.baselines[0].call, dynamic=False)
            baselines.append(Baseline("torch.compile", compiled))
        result.screened = screen(baselines, device)
        timed_ones = {name: t for name, t in result.screened.items() if not isinstance(t, str)}
        result.against = min(timed_ones, key=timed_ones.__getitem__)
        against = next(b for b in baselines if b.name == result.against)
        result.ceiling = ceiling(case)
        if problem.kind == "gradient":
            result.peak_bytes = peak_bytes(problem.ours, device)
            with against.context():
                result.torch_peak_bytes = peak_bytes(against.call, device)
        result.pair = time_pair(problem.ours, against, budget, device)
    except Exception as error:  # one broken case must not cost the others their numbers
        result.status = "error"
        result.error = f"{type(error).__name__}: {error}".splitlines()[0]
    return result

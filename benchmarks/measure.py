"""The measuring core: a case is checked against float64 first, then timed in pairs with torch's best.

Machines are noisy and their clocks drift, so no time is compared with one taken at another moment: every
round times both sides one right after the other, the order swapped each round, and a speedup is the median
of the rounds' ratios with a bootstrap interval. Inputs change between rounds, and what the last timed call gave is
checked like the first.
"""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from mmkern.benchmarks import guards
from mmkern.benchmarks.checking import as_outputs, check, judge, right
from mmkern.benchmarks.guards import MIN_ROUNDS, Refused
from mmkern.benchmarks.machine import Ceilings
from mmkern.benchmarks.memory import peak_bytes
from mmkern.benchmarks.records import SEED, Baseline, Call, Case, Outputs, Pair, Problem, Result
from mmkern.benchmarks.statistics import interval, median
from mmkern.benchmarks.timing import loops_for, seconds_per_call, stretch
from mmkern.testing import Accuracy

MAX_ROUNDS = 201
HOPELESS = 3.0  # a baseline whose first call takes this many times the best so far is not timed again
TINY = 2e-4  # seconds of a call up to which threads may cost more than they bring
COLD_ROUNDS, LARGEST_COLD = 3, 1 << 25  # above it nothing of a case's data stays in a cache anyway
FLUSHED = 1 << 26  # bytes written between two cold calls: more than a core's share of the last cache


@dataclass
class Clock:
    """How much time a case may still take."""

    allowance: float = math.inf
    started: float = 0.0

    def __post_init__(self) -> None:
        self.started = time.perf_counter()

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.started

    @property
    def left(self) -> float:
        return self.allowance - self.spent


def compare(ours: Sequence[float], theirs: Sequence[float], busy: tuple[float, float] = (0.0, 0.0)) -> Pair:
    """The speedup that paired samples show: median of their ratios, with its interval."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return Pair(list(ours), list(theirs), median(ratios), *interval(ratios), busy)


def time_pair(
    ours: Call,
    theirs: Baseline,
    budget: float,
    device: str = "cpu",
    change: Callable[[bool], None] = lambda last: None,
    once: bool = False,
    rounds: int = MIN_ROUNDS,
    keep: Callable[[Any], Any] = lambda output: None,
) -> tuple[Pair, list[Any]]:
    """Time both sides in alternating order for `budget` seconds and at least `rounds` rounds.

    change: called before each round, with True before the last.
    once: one call a sample, torch's generator seeded before it, so that what the call draws is known.
    keep: what is kept of each side's last output, taken right after the clock stops. Also returned.
    """
    with theirs.context():
        loops = (1, 1) if once or rounds < MIN_ROUNDS else (loops_for(ours, device), loops_for(theirs.call, device))
    samples: tuple[list[float], list[float]] = ([], [])
    busy, kept, last = [0.0, 0.0], [None, None], False
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + budget
        while not last:
            done = len(samples[0]) + 1
            last = done >= MAX_ROUNDS or (done >= rounds and time.perf_counter() >= end)
            change(last)
            for side in (0, 1) if done % 2 else (1, 0):
                if once:
                    torch.manual_seed(SEED)
                with theirs.context() if side else nullcontext():
                    found = stretch(theirs.call if side else ours, loops[side], device)
                if last:
                    kept[side] = keep(found.output)
                samples[side].append(found.seconds)
                busy[side] += found.busy
                del found
    finally:
        if collecting:
            gc.enable()
    took = [sum(side) * n for side, n in zip(samples, loops, strict=True)]
    shares = [b / t if t > guards.SHORTEST_COUNTED else 0.0 for b, t in zip(busy, took, strict=True)]
    return compare(*samples, (shares[0], shares[1])), kept


def screen(
    problem: Problem, device: str = "cpu", clock: Clock | None = None, baselines: Sequence[Baseline] | None = None
) -> dict[str, float | str]:
    """Seconds of each baseline by a few calls, or the reason why it is no rival here."""
    clock = clock or Clock()
    found: dict[str, float | str] = {}
    best, exact = math.inf, None
    for baseline in baselines or problem.baselines:
        if found and clock.left < 2 * min(best, 1.0):
            found[baseline.name] = "not timed: out of time"
            continue
        try:
            with warnings.catch_warnings(), baseline.context():
                warnings.simplefilter("ignore")
                baseline.prepare()
                first, _, output = stretch(baseline.call, 1, device)
                if baseline is not problem.baselines[0] and not problem.yardstick:  # that one is the yardstick
                    exact = exact or as_outputs(problem.exact())
                    if wrong := right(problem, problem.compared(as_outputs(output)), exact):
                        found[baseline.name] = wrong
                        continue
                del output
                if clock.left > 8 * first and first < HOPELESS * best:
                    loops = loops_for(baseline.call, device)
                    first = min(seconds_per_call(baseline.call, loops, device) for _ in range(3))
        except Exception as error:  # whatever another library raises, the case keeps its other baselines
            found[baseline.name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
            continue
        found[baseline.name] = first
        best = min(best, first)
    return found


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def flush() -> None:
    """Overwrites what the processor's caches hold."""
    torch.empty(FLUSHED, dtype=torch.uint8).fill_(1)


def cold(ours: Call, theirs: Baseline) -> tuple[float, float]:
    """Seconds of one call of each side whose data have to come from memory."""
    samples: tuple[list[float], list[float]] = ([], [])
    for _ in range(COLD_ROUNDS):
        for side, call in enumerate((ours, theirs.call)):
            flush()
            with theirs.context() if side else nullcontext():
                samples[side].append(seconds_per_call(call))
    return median(samples[0]), median(samples[1])


def measure(
    case: Case,
    budget: float = 0.5,
    device: str = "cpu",
    ceilings: Ceilings | None = None,
    timed: bool = True,
    allowance: float = math.inf,
    tell: Callable[[Result], None] = lambda result: None,
    rivals: Callable[[Case, Problem], Sequence[Baseline]] = lambda case, problem: (),
) -> Result:
    """Check one case, then time it unless it is wrong; an exception becomes the result's `error`.

    budget: seconds of timing. allowance: seconds of everything; rounds are left out to keep it, never the check.
    tell: called with what is known so far, for whoever has to stop a call that does not end.
    rivals: further baselines.
    """
    result, clock = Result.of(case), Clock(allowance)
    try:
        with torch.random.fork_rng():
            _measure(result, case, clock, budget, device, ceilings, timed, tell, rivals)
    except Refused as error:
        result.status, result.error = "refused", str(error)
    except Exception as error:  # one broken case must not cost the others their numbers
        result.status = "error"
        result.error = f"{type(error).__name__}: {error}".splitlines()[0]
    if result.status != "ok":
        result.pair = result.one_thread = result.cold = None
    result.seconds_spent = clock.spent
    return result


def _measure(
    result: Result,
    case: Case,
    clock: Clock,
    budget: float,
    device: str,
    ceilings: Ceilings | None,
    timed: bool,
    tell: Callable[[Result], None],
    rivals: Callable[[Case, Problem], Sequence[Baseline]],
) -> None:
    problem = case.build(case.dtype, device)
    guards.inputs_vary(problem.inputs)
    untouched = guards.Untouched(problem.inputs)
    checked = check(problem)
    found = checked.accuracy
    result.ran = list(dict.fromkeys(str(choice).splitlines()[0] for choice in checked.ran))
    result.max_error, result.torch_error, result.relative_l2 = found.max_error, found.baseline_error, found.relative_l2
    if not found.ok:
        result.status, result.error = "wrong", str(found)
        return
    once, _, output = stretch(problem.ours, 1, device)
    guards.fresh(checked.outputs, as_outputs(output), problem.inputs, problem.reuses)
    untouched.check()
    del checked, output
    if not timed:
        return
    result.pair = compare([once], [once])  # until there is more, what a reader is told of ours
    tell(result)
    result.pair = None
    baselines = [*problem.baselines, *rivals(case, problem)]
    result.screened = screen(problem, device, clock, baselines)
    usable = {name: t for name, t in result.screened.items() if not isinstance(t, str)}
    if not usable:
        raise RuntimeError(f"torch has no way that runs here: {'; '.join(map(str, result.screened.values()))}")
    result.against = min(usable, key=usable.__getitem__)
    against = next(b for b in baselines if b.name == result.against)
    both = once + usable[result.against]
    if clock.left < 2 * both:
        result.pair = compare([once], [usable[result.against]])
        result.notes = guards.doubts(result.pair)
        return
    if problem.kind == "gradient" and clock.left > 4 * both + 0.1:
        result.peak_bytes = peak_bytes(problem.ours, device)
        with against.context():
            result.torch_peak_bytes = peak_bytes(against.call, device)
    left = clock.left - 0.1
    rounds = MIN_ROUNDS if left > (MIN_ROUNDS + 4) * both else max(1, min(MIN_ROUNDS - 1, int(left / both) - 1))
    changes = guards.Changes(problem.inputs)
    result.pair, kept = time_pair(
        problem.ours,
        against,
        min(budget, max(0.0, left - 4 * both)),
        device,
        changes,
        once=problem.yardstick is not None,
        rounds=rounds,
        keep=lambda output: tuple(t.clone() for t in problem.compared(as_outputs(output))),
    )
    _last_call(result, problem, found, kept)
    if ceilings:
        result.bound, result.ceiling = ceilings(case)
        if result.of_ceiling and result.of_ceiling > 1:
            result.ceiling = ceilings.again(case)
            guards.too_fast(result, ceilings.limit(case))
    if device == "cpu":
        _other_conditions(result, case, problem, against, clock)
    result.notes = guards.doubts(result.pair, result.one_thread, device)


def _last_call(result: Result, problem: Problem, first: Accuracy, kept: Sequence[Outputs]) -> None:
    """The last timed output of both sides against float64 of the inputs as they were then."""
    exact = as_outputs(problem.exact())
    baseline = as_outputs(problem.yardstick()) if problem.yardstick else kept[1]
    found = judge(problem, kept[0], baseline, exact)
    found = replace(found, bound=max(found.bound, 1.5 * first.bound))  # the fastest may be more accurate than the first
    if not found.ok:
        result.status, result.error = "wrong", f"in the last timed call: {found}"
    elif not problem.yardstick and (wrong := right(problem, kept[1], exact)):
        raise RuntimeError(f"{result.against} was wrong in its last timed call: {wrong}")


def _other_conditions(result: Result, case: Case, problem: Problem, against: Baseline, clock: Clock) -> None:
    """On one thread where threads may cost more than they bring, and with cold caches where memory is the limit."""
    pair = result.pair
    if pair is None or result.status != "ok":
        return
    sides = median(pair.ours), median(pair.theirs)
    sliced = any(abs(s - round(s / guards.SLICE) * guards.SLICE) < 0.1 * guards.SLICE for s in sides if s > 3e-3)
    if torch.get_num_threads() > 1 and (min(sides) < TINY or (sliced and clock.left > 1.0)):
        with threads(1):
            result.one_thread, _ = time_pair(problem.ours, against, 0.03, once=problem.yardstick is not None)
    if result.bound in ("copy", "read") and case.bytes <= LARGEST_COLD and clock.left > 0.3 + 6 * sum(sides):
        result.cold = cold(problem.ours, against)

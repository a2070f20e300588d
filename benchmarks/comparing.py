"""Two reports of one machine: which cases changed, by tests that hold for many cases at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmkern.benchmarks.records import Pair, Result
from mmkern.benchmarks.statistics import median
from mmkern.benchmarks.tables import SHORT, Table, duration
from mmkern.benchmarks.trace import Report, different_machine

RATE = 0.01  # of the cases flagged, so many may be flagged by chance
LEAST = 0.05  # a smaller change is not told: code that moves in memory does as much
MOST = 0.09  # a noisy run raises LEAST up to here, so that a change by 10% still shows


@dataclass(frozen=True)
class Change:
    """One case in both reports.

    times: ours now over ours before, torch's own change taken out: 1.1 is 10% slower.
    probability: of such a difference by chance. threshold: the least change that is told.
    """

    op: str
    shape: str
    dtype: str
    before: float
    now: float
    times: float
    probability: float
    threshold: float

    @property
    def significant(self) -> bool:
        return self.probability < RATE and abs(self.times - 1) >= self.threshold

    @property
    def slower(self) -> bool:
        return self.significant and self.times > 1

    @property
    def faster(self) -> bool:
        return self.significant and self.times < 1


def compare_reports(old: Report, new: Report) -> list[Change]:
    """Every case that both judged.

    A case is compared by its rounds' ratios to torch, which a machine that became slower as a whole leaves alone, if
    both runs timed it against the same thing, else by its times. Mann-Whitney's test, its p-values corrected for the
    number of cases (Benjamini and Hochberg).

    Raises:
        ValueError: reports of different machines, or without a case in common.
    """
    from scipy.stats import false_discovery_control, mannwhitneyu

    if other := different_machine(old, new):
        raise ValueError(f"reports of different machines cannot be compared: {other}")
    before = {r.id: r for r in old.results if r.judged and r.pair}
    both = [(before[r.id], r) for r in new.results if r.judged and r.pair and r.id in before]
    if not both:
        raise ValueError("the reports have no case in common that both give a verdict on")
    samples = [(_samples(a, a.against == b.against), _samples(b, a.against == b.against)) for a, b in both]
    found = false_discovery_control([mannwhitneyu(a, b).pvalue for a, b in samples])
    threshold = min(MOST, max(LEAST, old.noise_floor, new.noise_floor))
    return [
        Change(
            b.op,
            b.shape,
            b.dtype,
            a.seconds or 0.0,
            b.seconds or 0.0,
            median(now) / median(then),
            float(p),
            threshold,
        )
        for (a, b), (then, now), p in zip(both, samples, found, strict=True)
    ]


def _samples(r: Result, paired: bool) -> list[float]:
    """Of each round ours over torch's, or ours alone."""
    pair: Pair | None = r.pair
    assert pair is not None
    return [a / b for a, b in zip(pair.ours, pair.theirs, strict=True)] if paired else pair.ours


def changes_table(changes: Sequence[Change]) -> Table:
    header = ("op", "shape", "dtype", "before", "now", "change", "")
    rows = [
        (c.op, c.shape, SHORT.get(c.dtype, c.dtype), duration(c.before), duration(c.now), f"{c.times - 1:+.1%}",
         "slower" if c.slower else "faster")
        for c in sorted(changes, key=lambda c: -c.times) if c.significant
    ]  # fmt: skip
    return Table("changed significantly" if rows else "nothing changed", header, rows, ("op", "shape", "dtype", ""))

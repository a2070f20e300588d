"""Ways to compute the same thing that are not torch's usual ones: what is installed, and what they are given."""

from __future__ import annotations

from collections.abc import Sequence

from mmkern.benchmarks.records import Baseline, Case, Problem

RIVALS: dict[str, str] = {}


def chosen(names: Sequence[str], device: str) -> list[str]:
    """The rivals of these names.

    Raises:
        ValueError: a name that there is none of.
    """
    for name in names:
        if name not in RIVALS:
            raise ValueError(f"no such rival: {name!r}; choose from {', '.join(RIVALS)}")
    return list(names)


def baselines(names: Sequence[str], case: Case, problem: Problem, device: str) -> list[Baseline]:
    return []

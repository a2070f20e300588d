"""Learning-rate schedules, and what to do when an evaluation stops getting better."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

SCHEDULES = ("constant", "step", "cosine", "linear", "plateau")


def factor(
    step: int,
    *,
    schedule: str = "constant",
    total: int = 0,
    warmup: int = 0,
    every: int = 0,
    gamma: float = 0.1,
    floor: float = 0.0,
) -> float:
    """What multiplies the base learning rate at a step; a function of the step alone, so resuming needs no state.

    Args:
        step: the step about to be taken, from 0.
        schedule: "constant" and "plateau": 1; "step": gamma ** (step // every); "cosine" and "linear": from 1 at the
            end of the warm-up down to `floor` at `total`.
        total: number of steps of the training. warmup: steps over which the factor rises to 1, with the
            square of the step: slowly while the optimizer has seen few gradients.
        every, gamma: of "step".
        floor: where "cosine" and "linear" end.

    Raises:
        ValueError: `schedule` is unknown, or "step" without `every`.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if schedule == "step" and every < 1:
        raise ValueError(f"every: expected at least 1 with the schedule step, got {every}")
    if step < warmup:
        return ((step + 1) / warmup) ** 2
    if schedule == "step":
        return gamma ** (step // every)
    if schedule in ("constant", "plateau"):
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    remaining = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return floor + (1 - floor) * remaining


class Plateau:
    """Calls back when a score has not risen for some evaluations in a row: to lower the learning rate, or to stop.

    Args:
        patience: evaluations without a rise after which the next one without calls back; at least 0.
        callback: called with nothing; the count starts anew after it.
        threshold: how much a score must rise above the best one to count.
    """

    def __init__(self, patience: int, callback: Callable[[], None], threshold: float = 0.0) -> None:
        self.patience, self.callback, self.threshold = patience, callback, threshold
        self.best, self.waited = -math.inf, 0

    def observe(self, score: float) -> None:
        """Takes the score of an evaluation (higher is better; NaN counts as no rise)."""
        if score > self.best + self.threshold:
            self.best, self.waited = score, 0
            return
        self.waited += 1
        if self.waited > self.patience:
            self.waited = 0
            self.callback()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON."""
        return {"best": None if self.best == -math.inf else self.best, "waited": self.waited}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up where `state` was."""
        self.best = -math.inf if state["best"] is None else state["best"]
        self.waited = state["waited"]

"""Learning-rate schedules, and what to do when an evaluation stops getting better."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmkern.training.config import TrainingConfig


def factor(step: int, c: TrainingConfig) -> float:
    """What multiplies the learning rate at a step, counted from 0: a function of it alone, so resuming needs no state.

    In the warm-up it rises with the square of the step: slowly while the optimizer has seen few gradients. Then it is
    1 ("constant", "plateau"), decay ** (step // decay_every) ("step"), or falls to `floor` at the last step.
    """
    if step < c.warmup:
        return ((step + 1) / c.warmup) ** 2
    if c.schedule == "step":
        return c.decay ** (step // c.decay_every)
    if c.schedule in ("constant", "plateau"):
        return 1.0
    done = min(1.0, (step - c.warmup) / max(1, c.steps - c.warmup))
    remaining = 0.5 * (1 + math.cos(math.pi * done)) if c.schedule == "cosine" else 1 - done
    return c.floor + (1 - c.floor) * remaining


@dataclass
class Plateau:
    """Counts the evaluations in a row whose score has not risen; what it holds is what a checkpoint keeps."""

    best: float | None = None
    waited: int = 0

    def observe(self, score: float, patience: int) -> bool:
        """Whether more than `patience` scores in a row, this one included, have not risen; then the count starts anew.

        Higher is better, and NaN is no rise.
        """
        if score > (-math.inf if self.best is None else self.best):
            self.best, self.waited = score, 0
            return False
        self.waited = (self.waited + 1) % (patience + 1)
        return self.waited == 0

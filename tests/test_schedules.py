"""Schedules against torch's own, and plateaus."""

import math
from dataclasses import asdict

import pytest
import torch

from mmkern.training.config import TrainingConfig
from mmkern.training.schedules import Plateau
from mmkern.training.schedules import factor as factor_of


def factor(step, **options):
    return factor_of(step, TrainingConfig(**{"steps": 40, "warmup": 0, "floor": 0.0} | options))


def torch_factors(make, steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("options", "make"),
    [
        ({"schedule": "constant"}, lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)),
        ({"schedule": "step", "decay_every": 7, "decay": 0.5}, lambda o: torch.optim.lr_scheduler.StepLR(o, 7, 0.5)),
        (
            {"schedule": "cosine", "floor": 0.1},
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40, eta_min=0.1),
        ),
        ({"schedule": "linear", "floor": 0.2}, lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.2, 40)),
    ],
)
def test_schedules_are_those_of_torch(options, make):
    found = [factor(step, **options) for step in range(40)]
    torch.testing.assert_close(found, torch_factors(make, 40))


def test_warm_up_rises_with_the_square_of_the_step_and_hands_over_at_the_top():
    found = [factor(step, schedule="cosine", steps=30, warmup=10) for step in range(31)]
    torch.testing.assert_close(found[:10], [((i + 1) / 10) ** 2 for i in range(10)])
    assert found[10] == 1.0
    assert found[20] == pytest.approx(0.5)
    assert found[30] == 0.0
    assert [factor(s, schedule="step", steps=30, warmup=4, decay_every=10) for s in (1, 3, 9, 10)] == [
        0.25,
        1.0,
        1.0,
        0.1,
    ]


def test_a_plateau_is_told_when_torch_lowers_the_learning_rate():
    scores = [0.1, 0.3, 0.2, 0.3, 0.3, 0.4, math.nan, 0.4, 0.1, 0.2, 0.2, 0.0]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=0.5, patience=1, threshold=0.0, threshold_mode="abs"
    )
    rate, ours = 1.0, Plateau()
    for at, score in enumerate(scores):
        rate *= 0.5 if ours.observe(score, patience=1) else 1.0
        theirs.step(score)
        assert rate == optimizer.param_groups[0]["lr"], at
    assert rate < 0.25


def test_a_restored_plateau_goes_on_counting():
    first = Plateau()
    assert asdict(first) == {"best": None, "waited": 0}
    assert [first.observe(score, 1) for score in (0.5, 0.4)] == [False, False]
    assert Plateau(**asdict(first)).observe(0.5, 1)
    assert not Plateau(**asdict(first)).observe(0.6, 1)

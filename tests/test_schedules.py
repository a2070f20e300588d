"""Schedules against torch's own, and plateaus."""

import math

import pytest
import torch

from mmkern.training.schedules import Plateau, factor


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
        ({"schedule": "step", "every": 7, "gamma": 0.5}, lambda o: torch.optim.lr_scheduler.StepLR(o, 7, 0.5)),
        (
            {"schedule": "cosine", "floor": 0.1},
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40, eta_min=0.1),
        ),
        ({"schedule": "linear", "floor": 0.2}, lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.2, 40)),
    ],
)
def test_schedules_are_those_of_torch(options, make):
    found = [factor(step, total=40, **options) for step in range(40)]
    torch.testing.assert_close(found, torch_factors(make, 40))


def test_warm_up_rises_with_the_square_of_the_step_and_hands_over_at_the_top():
    found = [factor(step, schedule="cosine", total=30, warmup=10) for step in range(31)]
    torch.testing.assert_close(found[:10], [((i + 1) / 10) ** 2 for i in range(10)])
    assert found[10] == 1.0
    assert found[20] == pytest.approx(0.5)
    assert found[30] == 0.0
    assert [factor(s, schedule="step", total=30, warmup=4, every=10) for s in (1, 3, 9, 10)] == [0.25, 1.0, 1.0, 0.1]


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match=r"schedule: expected one of constant, .*, got 'cosin'"):
        factor(0, schedule="cosin")


def test_plateau_calls_back_as_torch_lowers_the_learning_rate():
    scores = [0.1, 0.3, 0.2, 0.3, 0.3, 0.4, math.nan, 0.4, 0.1, 0.2, 0.2, 0.0]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=0.5, patience=1, threshold=0.0, threshold_mode="abs"
    )
    rate = [1.0]
    ours = Plateau(1, lambda: rate.append(rate[-1] * 0.5))
    for at, score in enumerate(scores):
        ours.observe(score)
        theirs.step(score)
        assert rate[-1] == optimizer.param_groups[0]["lr"], at
    assert rate[-1] < 0.25


def test_a_restored_plateau_goes_on_counting():
    calls = []
    first = Plateau(1, lambda: calls.append(1))
    assert first.state() == {"best": None, "waited": 0}
    for score in (0.5, 0.4):
        first.observe(score)
    second = Plateau(1, lambda: calls.append(2))
    second.restore(first.state())
    second.observe(0.5)
    assert calls == [2]

"""NaN and infinities in the softmax family: what a row that holds one gives, and what they never reach."""

from __future__ import annotations

import math

import pytest
import torch
from backends import DTYPES, Backend, backends, outcome
from softmax_cases import OPS

import mmkern
from mmkern.testing import assert_accurate, randn

EACH = backends("softmax")
MASKED = backends("masked_softmax")


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("width", [7, 40, 40_000])
def test_in_a_row(dim: int, width: int, backend: Backend) -> None:
    x = randn(7, width, scale=2.0)
    x[1, 3], x[2, 3], x[3, 3], x[4], x[6, 1] = math.nan, math.inf, -math.inf, -math.inf, -math.inf
    x[6, 2] = math.inf
    x = x if dim == 1 else x.T.contiguous()
    for ours, theirs in OPS.values():
        with backend:
            found = ours(x.to(backend.device), dim).cpu()
        assert_accurate(found, theirs(x.double(), dim), theirs(x, dim))


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("shape", "dim"), [((2, 70001), 1), ((1100, 20), 0)], ids=str)
def test_at_any_place_of_a_long_row(op: str, shape: tuple[int, ...], dim: int, backend: Backend) -> None:
    ours, theirs = OPS[op]
    for places in (
        {5: torch.nan},
        {-1: torch.nan},
        {5: torch.inf},
        {1060: -torch.inf},
        {1060: torch.inf, 3: torch.nan},
    ):
        for rest in (None, -torch.inf):  # a row with nothing else in it, too
            x = randn(*shape, scale=2.0)
            row = x.select(1 - dim, 1)
            if rest is not None:
                row.fill_(rest)
            for at, value in places.items():
                row[at] = value
            with backend:
                found = ours(x.to(backend.device), dim).cpu()
            assert_accurate(found, theirs(x.double(), dim), theirs(x, dim))


@pytest.mark.parametrize("backend", MASKED)
@pytest.mark.parametrize("dim", [0, 1])
def test_behind_a_mask_and_before_it(dim: int, backend: Backend) -> None:
    x = randn(40, 40, scale=2.0)
    x[3, 3], x[7, 9], x[:, 20], x[20, :] = torch.nan, torch.inf, -torch.inf, -torch.inf
    keep = x.isfinite()
    exact = torch.softmax(x.double().masked_fill(~keep, -torch.inf), dim).nan_to_num(0.0)
    for mask in (keep, torch.where(keep, 0.0, -torch.inf)):
        with backend:
            y = mmkern.masked_softmax(x.to(backend.device), mask.to(backend.device), dim=dim).cpu()
        assert_accurate(y, exact)
        assert not y[~keep].any()
    with backend:
        seen = mmkern.masked_softmax(x.to(backend.device), torch.ones_like(keep).to(backend.device), dim=dim)
    assert seen.select(1 - dim, 3).isnan().all()  # a visible NaN takes its row


@pytest.mark.parametrize("backend", MASKED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_hidden_reaches_no_gradient(dtype: torch.dtype, backend: Backend) -> None:
    """Whether x holds it or the gradient that comes in; a row that sees nothing is 0."""
    keep = torch.arange(30) < torch.tensor([[0], [1], [17], [30]])
    found = []
    for fill in (0.0, math.nan, math.inf):
        x, grad = (torch.where(keep, randn(4, 30, dtype=dtype, seed=seed), fill) for seed in (0, 1))
        with backend:
            mask = keep.to(backend.device)
            found.append(outcome(lambda x, m=mask: mmkern.masked_softmax(x, m), [backend.to(x)], backend.to(grad)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert found[0][0][0].eq(0).all()


@pytest.mark.parametrize("backend", EACH)
def test_the_gradient_of_a_row_that_holds_nan_is_torchs(backend: Backend) -> None:
    row, grad = torch.tensor([[0.0, math.nan, 1.0], [0.0, 1.0, 2.0]]), torch.ones(2, 3)
    for ours, theirs in OPS.values():
        with backend:
            mine = outcome(
                lambda x, op=ours: op(x, 1), [row.to(backend.device)], torch.ones(2, 3, device=backend.device)
            )
        their = outcome(lambda x, op=theirs: op(x, 1), [row], grad)
        torch.testing.assert_close(mine, their, equal_nan=True)


@pytest.mark.parametrize("backend", [*MASKED, pytest.param(Backend("reference"), id="reference")])
@pytest.mark.parametrize("dim", [0, 1])
def test_nan_gradient_of_a_hidden_weight_reaches_nobody(backend: Backend, dim: int) -> None:
    keep = torch.arange(40) < 30
    keep, x, bias, grad = (
        t if dim else t.t().contiguous() for t in (keep[None], randn(6, 40), randn(6, 40, seed=1), randn(6, 40, seed=2))
    )
    found = []
    for fill in (0.0, math.nan):
        leaves = [t.to(backend.device, copy=True).requires_grad_() for t in (x, bias)]
        with backend:
            y = mmkern.masked_softmax(leaves[0], keep.to(backend.device), bias=leaves[1], dim=dim)
            found.append(torch.autograd.grad(y, leaves, torch.where(keep, grad, fill).to(backend.device)))
    assert all(torch.equal(clean, other) for clean, other in zip(*found, strict=True))
    assert found[0][0].abs().sum() > 0.1

"""cross_entropy and its gradients: one table of shapes, targets and options over every backend, against float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from backends import DTYPES, Backend, backends
from loss_cases import KINDS, LAYOUT_SHAPES, REDUCTIONS, SHAPES, check, double, loss_and_gradients, problem
from torch import Tensor

import mmkern
from mmkern.testing import LAYOUTS, assert_accurate, randn

EACH = backends("cross_entropy")


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape: tuple[int, ...], kind: str, dtype: torch.dtype, reduction: str, backend: Backend, once) -> None:
    for weighted, smoothing in itertools.product((False, True), (0.0, 0.1)):
        inputs = problem(shape, dtype, "contiguous", kind, weighted)
        check(backend, once, *inputs, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", LAYOUT_SHAPES, ids=str)
def test_layouts(shape: tuple[int, ...], kind: str, dtype: torch.dtype, layout: str, backend: Backend, once) -> None:
    for weighted, smoothing, reduction in ((True, 0.1, "mean"), (False, 0.0, "none")):
        inputs = problem(shape, dtype, layout, kind, weighted)
        check(backend, once, *inputs, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("soft", [False, True])
def test_class_weights_with_strides_and_all_of_the_smoothing(soft: bool, backend: Backend, once) -> None:
    x, target = randn(3, 6, seed=1), randn(3, 6, seed=2).softmax(1) if soft else torch.tensor([1, 5, 2])
    weight = torch.linspace(0.1, 1, 12).view(6, 2)[:, 1]
    for smoothing in (0.0, 1.0):
        check(backend, once, x, target, weight, label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["index", "soft"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(9,), (6, 9), (2, 4, 3, 2)], ids=str)
def test_reference_is_torch_in_float64(smoothing: float, kind: str, weighted: bool, shape: tuple[int, ...]) -> None:
    inputs = problem(shape, torch.float64, kind=kind, weighted=weighted)
    for reduction, ignored in itertools.product(REDUCTIONS, (-100, 2) if kind == "index" else (-100,)):
        target = inputs[1].clamp(min=0) if ignored == 2 else inputs[1]
        options = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": ignored}
        found = loss_and_gradients(mmkern.cross_entropy, inputs[0], target, inputs[2], **options)
        expected = loss_and_gradients(F.cross_entropy, inputs[0], target, inputs[2], **options)
        for a, e in zip(found, expected, strict=True):
            assert_accurate(a, e, kind="gradient")
        single = [t if t is None or t.dtype == torch.int64 else t.float() for t in (inputs[0], target, inputs[2])]
        found = loss_and_gradients(mmkern.cross_entropy, *single, **options)
        exact = loss_and_gradients(F.cross_entropy, *double(*single), **options)
        compare(found, exact, loss_and_gradients(F.cross_entropy, *single, **options))


def compare(found: tuple[Tensor, ...], exact: tuple[Tensor, ...], baseline: tuple[Tensor, ...]) -> None:
    for i, (a, e, b) in enumerate(zip(found, exact, baseline, strict=True)):
        assert a.dtype == b.dtype
        assert_accurate(a.cpu(), e, b, "gradient" if i else "forward")


def run(backend: Backend, op, x: Tensor, target: Tensor, weight: Tensor | None = None, **options) -> list[Tensor]:
    with backend:
        found = loss_and_gradients(op, *(backend.to(t) for t in (x, target, weight)), **options)
    return [t.cpu() for t in found]


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("layout", ["rows", "columns", "long"])
def test_nan_and_infinity(layout: str, backend: Backend) -> None:
    shape = {"rows": (12, 40), "columns": (2, 40, 19), "long": (12, 9001)}[layout]
    x, target, weight = problem(shape, torch.float32, weighted=True)
    target = target.clamp(min=0)
    rows = x.movedim(1, -1).view(-1, shape[1]) if layout != "columns" else x.movedim(1, -1)[0]
    aim = target if layout != "columns" else target[0]
    rows[1, 3], rows[2, 5], rows[3, 4] = torch.nan, torch.inf, -torch.inf
    rows[4, aim[4]] = -torch.inf
    rows[5] = -torch.inf
    rows[6, :30] = -torch.inf
    if layout == "long":
        rows[7, 4096:8192] = -torch.inf
        rows[8] = -torch.inf
        rows[8, 5000] = 1.0
        rows[9, 8999] = torch.nan
    weight[3] = 0.0
    for smoothing in (0.0, 0.1):
        options = {"reduction": "none", "label_smoothing": smoothing}
        found = run(backend, mmkern.cross_entropy, x, target, weight, **options)
        exact = loss_and_gradients(F.cross_entropy, *double(x, target, weight), **options)
        compare(found, exact, loss_and_gradients(F.cross_entropy, x, target, weight, **options))
    soft = torch.softmax(randn(*shape, seed=3), 1)
    soft.view(-1)[::2] = 0.0
    # Where its loss is NaN because 0 * inf is, torch's gradients are of no use.
    found = run(backend, mmkern.cross_entropy, x, soft, weight, reduction="none")[:1]
    exact, baseline = (F.cross_entropy(*t, reduction="none") for t in (double(x, soft, weight), (x, soft, weight)))
    compare(found, [exact], [baseline])


@pytest.mark.parametrize("backend", EACH)
def test_ignored_rows_and_logits_of_ten_thousand(backend: Backend) -> None:
    x, target = randn(6, 50), torch.tensor([3, 3, 3, 3, 3, -100])
    x[0, 7], x[1, 7], x[2, 3], x[5] = -math.inf, math.nan, -math.inf, math.nan
    x[3] += 1e4
    for smoothing in (0.0, 0.1):
        options = {"reduction": "none", "label_smoothing": smoothing}
        found = run(backend, mmkern.cross_entropy, x, target, **options)[0]
        want = F.cross_entropy(x, target, **options)
        torch.testing.assert_close(found, want, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("shape", [(6, 40), (2, 40, 9)], ids=str)
def test_ignored_rows_reach_nobody_and_their_mean_is_nan(shape: tuple[int, ...], backend: Backend) -> None:
    x, target, _ = problem(shape, torch.float32)
    hidden = (target == -100).unsqueeze(1).expand(shape)
    x[hidden] = torch.nan
    clean = torch.where(hidden, 0.0, x)
    for reduction in REDUCTIONS:
        found = run(backend, mmkern.cross_entropy, x, target, reduction=reduction)
        expected = run(backend, mmkern.cross_entropy, clean, target, reduction=reduction)
        assert all(map(torch.equal, found, expected))
        assert not found[1][hidden].any()
    leaf = backend.to(x).requires_grad_()
    with backend:
        rows = mmkern.cross_entropy(leaf, backend.to(target), reduction="none")
        upstream = torch.where(target == -100, torch.nan, 1.0)
        (grad,) = torch.autograd.grad(rows, leaf, backend.to(upstream))
        assert mmkern.cross_entropy(leaf[:0], backend.to(target)[:0]).isnan()
    assert not grad.cpu()[hidden].any()
    assert grad.isfinite().all()
    loss, grad = run(backend, mmkern.cross_entropy, x, torch.full_like(target, -100))
    assert loss.isnan()
    assert not grad.any()
    loss, grad = run(backend, mmkern.cross_entropy, clean, target, torch.zeros(40))
    assert loss.isnan()
    assert grad.isnan().any()  # 0 / 0, as torch's


@pytest.mark.parametrize("backend", EACH)
def test_huge_values_and_shift_invariance(backend: Backend, once) -> None:
    x, target, _ = problem((6, 1000), torch.float32)
    check(backend, once, x * 1e3, target, None, label_smoothing=0.1)
    whole = (x * 8).round()
    found, shifted = (run(backend, mmkern.cross_entropy, t, target) for t in (whole, whole + 64.0))
    assert all(map(torch.equal, found, shifted))
    torch.testing.assert_close(found[1].sum(1), torch.zeros(6), atol=1e-6, rtol=0)  # no gain in shifting a row


@pytest.mark.parametrize("backend", EACH)
def test_inputs_stay_and_bits_repeat(backend: Backend) -> None:
    x, target, _ = problem((40, 300), torch.float32)
    kept = x.clone()
    found = [
        run(backend, mmkern.cross_entropy, x[rows], target[rows], reduction="none")
        for rows in (slice(None), slice(None), slice(7, 8))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found[:2], strict=True))
    assert torch.equal(found[2][0], found[0][0][7:8])
    assert torch.equal(x, kept)


@pytest.mark.parametrize("backend", backends("cross_entropy", ["triton", "cuda"]))
def test_an_unknown_class_shows(backend: Backend) -> None:
    """On a GPU no value is read before the launch, so it cannot raise: the loss is NaN."""
    with backend:
        x, target = backend.to(randn(3, 5)), backend.to(torch.tensor([0, 5, -1]))
        assert mmkern.cross_entropy(x, target, reduction="none").isnan().tolist() == [False, True, True]

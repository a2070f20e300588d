"""Triton's cross-entropy, its gradients, and the linear layer in front of it, against torch's own in float64.

On a GPU if there is one, else in Triton's interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmkern
from mmkern.testing import LAYOUTS, assert_accurate, poisoned, randn

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(7,), (6, 9), (33, 1000), (2, 40001), (3, 5, 4), (2, 21, 6, 5), (4, 1), (0, 5)]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities that are meant


def results(call: Callable[..., Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in leaves]
    out = call(*leaves)
    grad = randn(*out.shape, dtype=out.dtype, seed=5).to(out.device) if out.dim() else torch.full_like(out, 1.5)
    return [out.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(out, leaves, grad))]


def check(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], leaves: Sequence[Tensor]) -> None:
    """Loss and gradients of ours by Triton; theirs is exact in float64, and the yardstick in its own dtype."""
    exact, baseline = results(theirs, [t.double() for t in leaves]), results(theirs, leaves)
    with mmkern.backend("triton", strict=True), poisoned():
        found = results(ours, [t.to(DEVICE) for t in leaves])
    for i, (mine, wanted, base) in enumerate(zip(found, exact, baseline, strict=True)):
        assert_accurate(mine, wanted, base, "gradient" if i else "forward")


def classes(shape: tuple[int, ...], count: int, ignored: bool = True) -> Tensor:
    target = torch.randint(count, shape, generator=torch.Generator().manual_seed(3))
    if ignored and target.dim():
        target.view(-1)[1::3] = -100
    return target


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_classes(shape: tuple[int, ...], reduction: str) -> None:
    for i, (smoothing, weighted) in enumerate([(0.0, False), (0.1, True), (0.0, True), (1.0, False)]):
        dtype, count = DTYPES[(i + len(shape)) % 3], shape[min(1, len(shape) - 1)]
        target = classes(shape[:0] if len(shape) == 1 else (shape[0], *shape[2:]), count)
        weight = torch.rand(count, generator=torch.Generator().manual_seed(4)) + 0.5 if weighted else None
        options = {"reduction": reduction, "label_smoothing": smoothing}

        def call(op: Callable[..., Tensor], x: Tensor, target=target, weight=weight, options=options) -> Tensor:
            w = None if weight is None else weight.to(x)
            return op(x, target.to(x.device), w, **options)

        x = randn(*shape, dtype=dtype, layout=LAYOUTS[i] if len(shape) < 3 else ("contiguous", "transposed")[i % 2])
        if not x.numel() and reduction == "mean":
            continue
        check(lambda x, c=call: c(mmkern.cross_entropy, x), lambda x, c=call: c(F.cross_entropy, x), [x])


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("shape", [(7,), (6, 30), (2, 40001), (2, 5, 4)], ids=str)
def test_probabilities(shape: tuple[int, ...], reduction: str) -> None:
    dim = min(1, len(shape) - 1)
    for i, dtype in enumerate(DTYPES):
        x, target = randn(*shape, dtype=dtype), randn(*shape, seed=1).softmax(dim).to(dtype)
        weight = torch.linspace(0.5, 1.5, shape[dim]) if i else None

        def call(op: Callable[..., Tensor], x: Tensor, t: Tensor, i=i, weight=weight) -> Tensor:
            w = None if weight is None else weight.to(x)
            return op(x, t, w, reduction=reduction, label_smoothing=0.2 * i)

        check(lambda *a, c=call: c(mmkern.cross_entropy, *a), lambda *a, c=call: c(F.cross_entropy, *a), [x, target])


def test_infinities_and_large_logits() -> None:
    x, target = randn(6, 50), torch.tensor([3, 3, 3, 3, 3, -100])
    x[0, 7], x[1, 7], x[2, 3], x[5] = -math.inf, math.nan, -math.inf, math.nan
    x[3] += 1e4
    want = F.cross_entropy(x, target, reduction="none")
    for smoothing in (0.0, 0.1):
        want = F.cross_entropy(x, target, reduction="none", label_smoothing=smoothing)
        with mmkern.backend("triton", strict=True):
            options = {"reduction": "none", "label_smoothing": smoothing}
            found = mmkern.cross_entropy(x.to(DEVICE), target.to(DEVICE), **options).cpu()
        torch.testing.assert_close(found, want, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_a_mean_over_nothing_and_an_unknown_class() -> None:
    x = randn(3, 5).to(DEVICE).requires_grad_()
    with mmkern.backend("triton", strict=True):
        loss = mmkern.cross_entropy(x, torch.full((3,), -100, device=DEVICE))
        assert loss.isnan()
        assert torch.autograd.grad(loss, x)[0].eq(0).all()
        losses = mmkern.cross_entropy(x, torch.tensor([0, 5, -1]).to(DEVICE), reduction="none")
    assert losses.isnan().tolist() == [False, True, True]  # no value is read before the launch: NaN shows it


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_cross_entropy(dtype: torch.dtype, reduction: str) -> None:
    hidden, weight, bias = (
        randn(20, 16, dtype=dtype),
        randn(50, 16, dtype=dtype, seed=1),
        randn(50, dtype=dtype, seed=2),
    )
    target = classes((20,), 50)
    options = {"reduction": reduction, "label_smoothing": 0.1}

    def ours(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return mmkern.linear_cross_entropy(h, w, target.to(h.device), b, chunk_size=7, **options)

    def theirs(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w, b), target, **options)

    check(ours, theirs, [hidden, weight, bias])


def test_inputs_stay_and_bits_repeat() -> None:
    x, target = randn(40, 300).to(DEVICE), classes((40,), 300).to(DEVICE)
    kept, found = x.clone(), []
    for rows in (slice(None), slice(None), slice(7, 8)):
        leaf = x[rows].clone().requires_grad_()
        with mmkern.backend("triton", strict=True):
            loss = mmkern.cross_entropy(leaf, target[rows], reduction="none")
            grad = torch.autograd.grad(loss.sum(), leaf)[0]
        found.append([t if len(t) == 1 else t[7:8] for t in (loss.detach(), grad)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("soft", [False, True])
def test_class_weights_with_strides(soft: bool) -> None:
    x, target = randn(3, 6, seed=1), randn(3, 6, seed=2).softmax(1) if soft else torch.tensor([1, 5, 2])
    weight = torch.rand(6, 2)[:, 1]
    check(
        lambda x: mmkern.cross_entropy(x, target.to(DEVICE), weight.to(DEVICE)),
        lambda x: F.cross_entropy(x, target.to(x.dtype) if soft else target, weight.to(x.dtype)),
        [x],
    )

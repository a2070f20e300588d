"""Gradients of the softmax family, and dropout: every kernel against float64 formulas of torch's own ops."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import mmkern
from mmkern.reference.philox import keep_mask
from mmkern.testing import LAYOUTS, accuracy, isas, poisoned, randn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [
    ((7,), 0),
    ((1, 1), -1),
    ((5, 33), 1),
    ((3, 130, 17), 1),
    ((64, 3), 0),
    ((2, 3, 70, 5), 2),
    ((4, 1000), 1),
    ((1, 70000), 1),
    ((2100, 40), 0),
    ((0, 5), 1),
    ((5, 0), 1),
]


def gradients(call: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in leaves]
    torch.manual_seed(7)
    return torch.autograd.grad(call(*leaves), leaves, grad)


def check(ours: Callable[..., Tensor], formula: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> None:
    """Gradients of ours by every instruction set, against the formula in float64 and in grad's dtype."""
    exact = gradients(formula, [t.double() for t in inputs], grad.double())
    baseline = gradients(lambda *a: formula(*a).to(grad.dtype), inputs, grad)
    for isa in isas():
        with mmkern.backend("cpu", isa=isa, strict=True), poisoned():
            found = gradients(ours, inputs, grad)
        for mine, wanted, base in zip(found, exact, baseline, strict=True):
            result = accuracy(mine, wanted, base, "gradient", grad.dtype)
            # Some gradients are exactly 0 (of what shifts a whole row), or a small rest of larger terms: there the norm
            # of the error has nothing to be held against but torch's own.
            limit = max(result.limit, 1.1 * accuracy(base, wanted, None, "gradient", grad.dtype).relative_l2)
            assert result.max_error <= result.bound, str(result)
            assert result.relative_l2 <= limit or wanted.abs().max() < 1e-12, str(result)
            assert result.same_nonfinite


@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
def test_values(op: str, shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    ours, theirs = getattr(mmkern, op), getattr(torch, op)
    inputs, grad = [randn(*shape, dtype=dtype, scale=3.0)], randn(*shape, dtype=dtype, seed=1)
    check(lambda x: ours(x, dim), lambda x: theirs(x, dim), inputs, grad)


@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(op: str, layout: str) -> None:
    """Of the input and of the gradient that comes in, along each dim; a sum's gradient has stride 0."""
    ours, theirs = getattr(mmkern, op), getattr(torch, op)
    for dim in range(3):
        inputs = [randn(4, 21, 18, layout=layout)]
        for grad in (randn(4, 21, 18, layout=layout, seed=1), torch.tensor(0.5).expand(4, 21, 18)):
            check(lambda x, dim=dim: ours(x, dim), lambda x, dim=dim: theirs(x, dim), inputs, grad)


def masked(x: Tensor, mask: Tensor | None, bias: Tensor | None, factor: Tensor | float) -> Tensor:
    scores = x * 0.5
    hidden = torch.zeros(x.shape, dtype=torch.bool)
    for term in (mask, bias):
        if term is not None and term.dtype == torch.bool:
            hidden = hidden | ~term
        elif term is not None:
            hidden = hidden | (term == -math.inf)
            scores = scores + term.masked_fill(term == -math.inf, 0.0)
    scores = scores.masked_fill(hidden, -math.inf)
    e = (scores - scores.detach().amax(-1, keepdim=True).nan_to_num(neginf=0.0)).exp()
    total = e.sum(-1, keepdim=True)
    return e / torch.where(total == 0, 1.0, total) * factor


BIAS = randn(3, 4, 9, 50, seed=4)
HOLES = BIAS.masked_fill(BIAS < -0.8, -math.inf)
TERMS = {
    "nothing": (None, None),
    "bool mask": (BIAS > -0.5, None),
    "bool mask of columns": (BIAS[:, :1, :1] > -0.5, None),
    "bool mask, rows that see nothing": ((BIAS > -0.5) & (BIAS[..., :1] > 0), None),
    "float mask": (BIAS, None),
    "float mask with holes": (HOLES, None),
    "mask and bias": (BIAS[:, :, :1], HOLES[:1]),
    "bias for the batch": (None, BIAS[0]),
    "bias of columns": (None, BIAS[:1, :1, :1]),
    "bias of rows": (None, BIAS[:1, :, :, :1]),
    "a number": (None, BIAS[0, 0, 0, :1]),
    "bias, transposed": (None, BIAS.mT.contiguous().mT),
    "bool mask and bias of heads": (BIAS[0, 0] > -0.5, BIAS[:1, :, :1, :1]),
}


def factors(shape: tuple[int, ...], dropout_p: float) -> Tensor | float:
    if not dropout_p:
        return 1.0
    torch.manual_seed(7)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    keep = keep_mask(seed, dropout_p, (1,) * max(0, 3 - len(shape)) + shape, torch.device("cpu")).view(shape)
    return keep.double() / (1 - dropout_p) if dropout_p < 1 else keep.double()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TERMS)
def test_masked_softmax(name: str, dtype: torch.dtype, dropout_p: float) -> None:
    """x, a float mask and a bias, in their own shapes."""
    terms = dict(zip(("mask", "bias"), TERMS[name], strict=True))
    learned = [n for n, t in terms.items() if t is not None and t.is_floating_point()]
    factor = factors((3, 4, 9, 50), dropout_p)

    def ours(x: Tensor, *given: Tensor) -> Tensor:
        parts = terms | dict(zip(learned, given, strict=True))
        return mmkern.masked_softmax(x, parts["mask"], scale=0.5, bias=parts["bias"], dropout_p=dropout_p)

    def formula(x: Tensor, *given: Tensor) -> Tensor:
        parts = terms | dict(zip(learned, given, strict=True))
        return masked(x, parts["mask"], parts["bias"], factor)

    for layout in ("contiguous", "transposed"):
        x, grad = randn(3, 4, 9, 50, dtype=dtype, layout=layout, scale=2.0), randn(3, 4, 9, 50, dtype=dtype, seed=1)
        check(ours, formula, [x, *(terms[n].to(dtype) for n in learned)], grad)


def test_masked_softmax_along_other_dims() -> None:
    for dim in range(3):
        x, bias, grad = randn(20, 33, 18), randn(33, 1, seed=1), randn(20, 33, 18, seed=2)
        factor = factors((20, 33, 18), 0.2)
        check(
            lambda x, b, dim=dim: mmkern.masked_softmax(x, bias=b, dim=dim, dropout_p=0.2),
            lambda x, b, dim=dim, factor=factor: (x + b).softmax(dim) * factor,
            [x, bias],
            grad,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_behind_a_mask_reaches_no_gradient(dtype: torch.dtype) -> None:
    keep = torch.arange(40) < 30
    for isa in isas():
        found = []
        for fill in (0.0, math.nan, math.inf):
            x = randn(6, 40, dtype=dtype)
            x[:, 30:] = fill
            with mmkern.backend("cpu", isa=isa, strict=True), poisoned():
                found += gradients(lambda x: mmkern.masked_softmax(x, keep), [x], randn(6, 40, dtype=dtype, seed=1))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
    row = torch.tensor([[0.0, math.nan, 1.0], [0.0, 1.0, 2.0]])
    for ours, theirs in ((mmkern.softmax, torch.softmax), (mmkern.log_softmax, torch.log_softmax)):
        mine, their = (gradients(lambda x, op=op: op(x, 1), [row], torch.ones(2, 3)) for op in (ours, theirs))
        torch.testing.assert_close(mine[0], their[0], equal_nan=True)


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
@pytest.mark.parametrize("dim", [0, 1])
def test_nan_gradient_of_a_hidden_weight_reaches_nobody(backend: str, dim: int) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    keep = torch.arange(40) < 30
    keep, x, bias, grad = (
        t if dim else t.t().contiguous() for t in (keep[None], randn(6, 40), randn(6, 40, seed=1), randn(6, 40, seed=2))
    )
    found = []
    for fill in (0.0, math.nan):
        leaves = [t.to(device, copy=True).requires_grad_() for t in (x, bias)]
        with mmkern.backend(backend, strict=True):
            y = mmkern.masked_softmax(leaves[0], keep.to(device), bias=leaves[1], dim=dim)
            found.append(torch.autograd.grad(y, leaves, torch.where(keep, grad, fill).to(device)))
    assert all(torch.equal(clean, other) for clean, other in zip(*found, strict=True))
    assert found[0][0].abs().sum() > 0.1


CALLS = {
    "softmax": lambda x, b: mmkern.softmax(x, -1),
    "log_softmax": lambda x, b: mmkern.log_softmax(x, 1),
    "masked_softmax": lambda x, b: mmkern.masked_softmax(x, x > -1, bias=b, scale=0.3),
    "dropout": lambda x, b: mmkern.masked_softmax(x, bias=b, dropout_p=0.4),
    "long rows": lambda x, b: mmkern.softmax(x.flatten(), 0),
}


def leaves(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(8, 40, 300, dtype=dtype).requires_grad_(), randn(40, 300, dtype=dtype, seed=1).requires_grad_()]


@pytest.mark.parametrize("name", CALLS)
def test_deterministic(name: str) -> None:
    """The same bits over 20 repeats and 1, 2 and 4 threads; what came in stays as it was."""
    given, threads, found = leaves(), torch.get_num_threads(), []
    kept = [t.detach().clone() for t in given]
    try:
        for i in range(20):
            torch.set_num_threads((1, 2, 4)[i % 3])
            torch.manual_seed(2)
            out = CALLS[name](*given)
            grad = randn(*out.shape, seed=5)
            found.append([out, *torch.autograd.grad(out, given, grad, allow_unused=True)])
            assert all(a is None or torch.equal(a, b) for a, b in zip(found[-1], found[0], strict=True))
            assert torch.equal(grad, randn(*out.shape, seed=5))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))


@pytest.mark.parametrize("dropout_p", [0.1, 1.0])
def test_dropped_elements(dropout_p: float) -> None:
    """Those that the generator says, by every instruction set, along the last dim and another."""
    keep = factors((4, 30, 50), dropout_p)
    for isa in isas():
        for dim in (2, 1):
            with mmkern.backend("cpu", isa=isa, strict=True):
                torch.manual_seed(7)
                found = mmkern.masked_softmax(torch.zeros(4, 30, 50), dim=dim, dropout_p=dropout_p)
            torch.testing.assert_close(found.double() * found.shape[dim], keep, rtol=1e-5, atol=0)


def test_checkpoint_drops_the_same_again() -> None:
    given, found = leaves(), []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        torch.manual_seed(3)
        out = wrap(CALLS["dropout"], *given)
        found.append([out, *torch.autograd.grad(out.square().sum(), given)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_is_saved_and_what_ran() -> None:
    """Without dropout nothing but the output is kept of x; both ways run in kernels."""
    for name in ("softmax", "log_softmax", "masked_softmax"):
        given, saved = leaves(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            mask = given[0].detach() > -1
            out = mmkern.masked_softmax(given[0], mask) if name == "masked_softmax" else CALLS[name](*given)
        assert given[0].data_ptr() not in {t.data_ptr() for t in saved}, name
        assert sum(t.numel() * t.element_size() for t in saved) <= out.numel() * 5
        ran = mmkern.explain(lambda name=name: CALLS[name](*leaves()).sum().backward())
        assert [(choice.op, choice.backend) for choice in ran] == [(f"{name}_fwd", "cpu"), (f"{name}_bwd", "cpu")]


def test_opcheck() -> None:
    op, x, g, seed = torch.ops.mmkern, randn(3, 5, 6, layout="transposed"), randn(3, 5, 6, seed=1), torch.tensor([3])
    keep, bias = g > -1, randn(5, 1, seed=2)
    for dim in (2, 0):
        torch.library.opcheck(op.softmax_bwd.default, (g, x.softmax(dim), dim))
        torch.library.opcheck(op.log_softmax_bwd.default, (g.mT.contiguous().mT, x.log_softmax(dim), dim))
    for output, input, p, s in ((x.softmax(2), None, 0.0, None), (None, x, 0.5, seed)):
        for bits in (7, 1, 4):
            torch.library.opcheck(op.masked_softmax_bwd.default, (g, output, input, bias, 0.5, bias, 2, p, s, bits))
    torch.library.opcheck(op.masked_softmax_fwd.default, (x, keep, 1.0, bias, 1, 0.5, seed))


def test_compiles_whole() -> None:
    given, grad = leaves(), randn(8, 40, 300, seed=5)

    def both(x: Tensor, b: Tensor) -> Tensor:
        return mmkern.masked_softmax(x * 2, bias=b).log_softmax(-1) + mmkern.softmax(x, 1)

    compiled = torch.compile(both, fullgraph=True)
    for mine, want in zip(*(torch.autograd.grad(f(*given), given, grad) for f in (compiled, both)), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-6)

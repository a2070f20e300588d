"""softmax, log_softmax and masked_softmax with their gradients: one table over every backend, against float64.

What torch asks of an op beside numbers (errors, compile, opcheck, what is kept) is in test_softmax_machinery.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from backends import DTYPES, Backend, backends, factors, hold
from softmax_cases import LARGE, MASKED_SHAPES, OPS, SHAPES, TERMS, masked, pairs, terms
from torch import Tensor

import mmkern
from mmkern.testing import LAYOUTS, assert_accurate, randn

EACH = backends("softmax")
CPUS = backends("softmax", ["cpu"])
MASKED = backends("masked_softmax")


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
def test_values(name: str, shape: tuple[int, ...], dim: int, dtype: torch.dtype, backend: Backend, once) -> None:
    """In every layout; the same into a given output, and in the layout of torch's."""
    ours, theirs = OPS[name]
    for layout in LAYOUTS:
        x = randn(*shape, dtype=dtype, layout=layout, scale=3.0)
        grad = randn(*shape, dtype=dtype, layout="strided" if layout == "expanded" else layout, seed=1)
        found = hold(backend, once, lambda x: ours(x, dim), lambda x: theirs(x, dim), [x], grad, cancels=True)
        with backend:
            out = torch.empty(shape, dtype=dtype, device=backend.device)
            assert ours(backend.to(x), dim, out=out) is out
        assert torch.equal(out.cpu(), found)
        assert found.stride() == theirs(x, dim).stride()


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("name", OPS)
def test_a_gradient_of_stride_zero(name: str, backend: Backend, once) -> None:
    ours, theirs = OPS[name]
    for dim in range(3):
        for layout in LAYOUTS if not backend.slow else LAYOUTS[dim : dim + 1]:
            inputs, grad = [randn(4, 21, 18, layout=layout)], torch.tensor(0.5).expand(4, 21, 18)
            call, formula = (lambda x, op=op, d=dim: op(x, d) for op in (ours, theirs))
            hold(backend, lambda compute: compute(), call, formula, inputs, grad, cancels=True)


@pytest.mark.parametrize("backend", EACH)
def test_a_row_of_one(backend: Backend) -> None:
    x = randn(3, 1).to(backend.device).requires_grad_()
    with backend:
        for (ours, _), want in zip(OPS.values(), (1.0, 0.0), strict=True):
            y = ours(x, 1)
            assert y.eq(want).all()
            assert torch.autograd.grad(y, x, torch.ones_like(y))[0].eq(0).all()


@pytest.mark.parametrize("backend", CPUS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("cols", [9001, 75001])
def test_outputs_larger_than_the_cache(dtype: torch.dtype, cols: int, backend: Backend, once) -> None:
    def computed() -> list[Tensor]:
        x = randn((9 << 20) // dtype.itemsize // cols, cols, dtype=dtype, layout="offset")  # streamed from 8 MiB
        exact, baseline = torch.softmax(x.double(), 1), torch.softmax(x, 1)
        return [x, exact, baseline, exact.log(), baseline.log()]

    x, exact, baseline, *logs = once(computed)
    with backend:
        given = torch.empty_like(baseline)  # written past the caches; a fresh one is not
        assert_accurate(mmkern.softmax(x, 1, out=given), exact, baseline)
        assert_accurate(mmkern.log_softmax(x, 1, out=given), *logs)
        assert_accurate(mmkern.masked_softmax(x), exact, baseline)


def check_masked(
    backend: Backend, once, x: Tensor, kept: tuple[Tensor | None, ...], scale: float, dim: int, dropout_p: float
) -> None:
    """With gradients of x and of every float term, in the term's shape."""
    given = [t if t is None or t.dtype == torch.bool else t.to(x.dtype) for t in kept]
    learned = [t is not None and t.is_floating_point() for t in given]
    factor = once(lambda: factors(tuple(x.shape), dropout_p))

    def parts(leaves: tuple[Tensor, ...], device: str) -> list[Tensor | None]:
        left = iter(leaves)
        terms = (next(left) if leaf else t for leaf, t in zip(learned, kept, strict=True))
        return [t if t is None else t.to(device) for t in terms]

    def ours(x: Tensor, *leaves: Tensor) -> Tensor:
        mask, bias = parts(leaves, backend.device)
        return mmkern.masked_softmax(x, mask, scale=scale, bias=bias, dim=dim, dropout_p=dropout_p)

    def formula(x: Tensor, *leaves: Tensor) -> Tensor:
        mask, bias = parts(leaves, "cpu")
        return masked(x, mask, bias, scale, dim, factor)

    grad = randn(*x.shape, dtype=x.dtype, seed=1)
    leaves = [t for t, leaf in zip(given, learned, strict=True) if leaf]
    hold(backend, once, ours, formula, [x, *leaves], grad, cancels=True)


@LARGE
@pytest.mark.parametrize("backend", MASKED)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TERMS)
def test_masked_softmax(name: str, dtype: torch.dtype, dropout_p: float, backend: Backend, once) -> None:
    for layout in ("contiguous", "transposed"):
        x = randn(3, 4, 9, 50, dtype=dtype, layout=layout, scale=2.0)
        check_masked(backend, once, x, TERMS[name], 0.5, -1, dropout_p)


@pytest.mark.parametrize("backend", MASKED)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), MASKED_SHAPES, ids=str)
def test_masked_shapes(
    shape: tuple[int, ...], dim: int, dtype: torch.dtype, dropout_p: float, backend: Backend, once
) -> None:
    for i, kept in enumerate(terms(shape, dtype)):
        x = randn(*shape, dtype=dtype, layout=LAYOUTS[i % 5])
        check_masked(backend, once, x, kept, 0.7, dim, dropout_p)


@LARGE
@pytest.mark.parametrize("backend", MASKED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((3, 4, 49), -1), ((2, 33, 70), 1), ((5, 130), 0)], ids=str)
def test_masks_beside_biases(shape: tuple[int, ...], dim: int, dtype: torch.dtype, backend: Backend, once) -> None:
    x = randn(*shape, dtype=dtype, layout="transposed", scale=2.0)
    for mask, bias in pairs(shape, dtype):
        wide = [t if t is None or t.dtype == torch.bool else t.double() for t in (mask, bias)]
        with mmkern.backend("reference"):
            exact = once(lambda w=wide: mmkern.masked_softmax(x.double(), w[0], scale=0.7, bias=w[1], dim=dim))
            baseline = once(lambda m=mask, b=bias: mmkern.masked_softmax(x, m, scale=0.7, bias=b, dim=dim))
        given = [backend.to(t) for t in (x, mask, bias)]
        with backend:
            y = mmkern.masked_softmax(given[0], given[1], scale=0.7, bias=given[2], dim=dim)
        assert_accurate(y.cpu(), exact, baseline)


@LARGE
@pytest.mark.parametrize("backend", MASKED)
def test_masked_softmax_along_other_dims(backend: Backend, once) -> None:
    for dim in range(3):
        x, bias, grad = randn(20, 33, 18), randn(33, 1, seed=1), randn(20, 33, 18, seed=2)
        factor = factors((20, 33, 18), 0.2)
        hold(
            backend,
            once,
            lambda x, b, dim=dim: mmkern.masked_softmax(x, bias=b, dim=dim, dropout_p=0.2),
            lambda x, b, dim=dim, factor=factor: (x + b).softmax(dim) * factor,
            [x, bias],
            grad,
            cancels=True,
        )


@pytest.mark.parametrize("backend", MASKED)
@pytest.mark.parametrize("dropout_p", [0.1, 1.0])
def test_dropped_elements(dropout_p: float, backend: Backend) -> None:
    """Those that the generator says, along the last dim and another."""
    keep = factors((4, 30, 50), dropout_p)
    for dim in (2, 1):
        with backend:
            torch.manual_seed(7)
            x = torch.zeros(4, 30, 50, device=backend.device)
            found = mmkern.masked_softmax(x, dim=dim, dropout_p=dropout_p).cpu()
        torch.testing.assert_close(found.double() * found.shape[dim], keep, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", EACH)
def test_huge_values_and_shift_invariance(backend: Backend) -> None:
    x = randn(6, 1000, scale=1e4)
    whole = randn(6, 1000).mul(8).round()
    with backend:
        for ours, theirs in OPS.values():
            assert_accurate(ours(x.to(backend.device), 1).cpu(), theirs(x.double(), 1), theirs(x, 1))
        first, shifted = (mmkern.softmax(t.to(backend.device), 1) for t in (whole, whole + 64.0))
        sums = mmkern.softmax(x.to(backend.device), 1).sum(1).cpu()
    assert torch.equal(first, shifted)
    torch.testing.assert_close(sums, torch.ones(6))


@pytest.mark.parametrize("backend", EACH)
def test_in_place_and_strided_outputs(backend: Backend) -> None:
    for shape, dim in (((33, 100), 0), ((33, 100), 1), ((2, 40001), 1)):
        for call, theirs in OPS.values():
            x = randn(*shape).to(backend.device)
            with backend:
                expected, inside = call(x, dim), x.clone()
                assert call(inside, dim, out=inside) is inside
                across = torch.empty(shape[::-1], device=backend.device).T
                call(x, dim, out=across)
                wide = torch.full((shape[0], 2 * shape[1]), 7.0, device=backend.device)
                call(x, dim, out=wide[:, ::2])
                assert torch.equal(call(x, dim, out=torch.empty(0, device=backend.device)), expected)
            assert torch.equal(inside, expected)
            torch.testing.assert_close(expected.cpu(), theirs(x.cpu(), dim))
            torch.testing.assert_close(across, expected)
            torch.testing.assert_close(wide[:, ::2], expected)
            assert (wide[:, 1::2] == 7.0).all()


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("dim", [0, 1])
def test_outputs_that_share_memory_with_the_input(dim: int, backend: Backend) -> None:
    with backend:
        for step in (1, 40, -1, -40):  # the output begins that many elements after the input
            memory = randn(1700).to(backend.device)
            x, out = memory[50:1650].view(40, 40), memory[50 + step : 1650 + step].view(40, 40)
            expected = torch.softmax(x, dim)
            torch.testing.assert_close(mmkern.softmax(x, dim, out=out), expected)
        x = randn(40, 40).to(backend.device)
        expected = torch.log_softmax(x, dim)
        torch.testing.assert_close(mmkern.log_softmax(x, dim, out=x.t()), expected)


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_beside_other_rows(dtype: torch.dtype, backend: Backend) -> None:
    x = randn(5, 3, 700, dtype=dtype).to(backend.device)
    with backend:
        for call, _ in OPS.values():
            whole = call(x, -1)
            assert torch.equal(call(x, -1), whole)
            assert torch.equal(call(x[2:3], -1), whole[2:3])


def test_the_reference_is_softmax_of_filled_scores() -> None:
    x, keep, bias = randn(4, 5, 9).double(), torch.rand(5, 9) > 0.4, torch.randn(9).double()
    keep[:, 0] = True
    y = mmkern.masked_softmax(x, keep, scale=0.3, bias=bias)
    torch.testing.assert_close(y, torch.softmax((x * 0.3 + bias).masked_fill(~keep, -math.inf), -1))

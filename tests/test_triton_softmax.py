"""Triton's softmax kernels, forward and gradients, against float64 and torch's own.

On a GPU if there is one, else in Triton's interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

import mmkern
from mmkern.testing import LAYOUTS, assert_accurate, poisoned, randn

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = {"softmax": (mmkern.softmax, torch.softmax), "log_softmax": (mmkern.log_softmax, torch.log_softmax)}
SHAPES = [((40,), 0), ((3, 1), 0), ((7, 33), 1), ((7, 33), 0), ((2, 5, 200), 1), ((2, 3, 17, 5), 0)]
SHAPES += [((1100, 7), 0), ((3, 1200, 4), 1), ((2, 6, 7, 13), 1), ((4, 9, 2, 64), 1), ((2, 3, 2, 3, 2, 9), 2)]
SHAPES += [((2, 5, 4, 70), -2), ((5, 49, 49), 2), ((2, 40001), 1), ((0, 4), 1), ((4, 0), 1), ((), 0)]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities that are meant


@contextmanager
def triton() -> Iterator[None]:
    """The Triton kernels or an error; dropout seeds from the CPU's generator, as for the reference beside them."""
    draw = torch.randint

    def randint(*args: object, device: object = None, **kwargs: object) -> Tensor:
        return draw(*args, **kwargs).to(DEVICE)

    with mmkern.backend("triton", strict=True), mock.patch("torch.randint", randint), poisoned():
        yield


def results(call: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    torch.manual_seed(7)
    out = call(*leaves)
    return [out.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(out, leaves, grad))]


def check(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> None:
    """Output and every gradient of ours by Triton; theirs is exact in float64, and the yardstick in its own dtype."""
    with mmkern.backend("reference"):
        exact = results(theirs, [t.double() for t in inputs], grad.double())
        baseline = results(theirs, inputs, grad)
    with triton():
        found = results(ours, [t.to(DEVICE) for t in inputs], grad.to(DEVICE))
    for i, (mine, wanted, base) in enumerate(zip(found, exact, baseline, strict=True)):
        # A float32 mask of a bfloat16 x gets its gradient from bfloat16 weights.
        assert_accurate(mine, wanted, base, "gradient" if i else "forward", inputs[0].dtype)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
def test_values(name: str, shape: tuple[int, ...], dim: int) -> None:
    ours, theirs = OPS[name]
    for i, layout in enumerate(LAYOUTS[:2] if math.prod(shape) > 2000 else LAYOUTS):
        dtype = DTYPES[(i + len(shape)) % 3]
        x = randn(*shape, dtype=dtype, layout=layout)
        grad = randn(*shape, dtype=dtype, layout="strided" if layout == "expanded" else layout, seed=1)
        check(lambda x: ours(x, dim), lambda x: theirs(x, dim), [x], grad)
        with triton():
            y, out = ours(x.to(DEVICE), dim), torch.empty(shape, dtype=dtype, device=DEVICE)
            assert ours(x.to(DEVICE), dim, out=out) is out
        assert torch.equal(y, out)


def test_a_row_of_one() -> None:
    x = randn(3, 1).to(DEVICE).requires_grad_()
    with triton():
        for (ours, _), want in zip(OPS.values(), (1.0, 0.0), strict=True):
            y = ours(x, 1)
            assert y.eq(want).all()
            assert torch.autograd.grad(y, x, torch.ones_like(y))[0].eq(0).all()


def test_in_place_and_strided_outputs() -> None:
    for shape, dim in (((6, 40), 1), ((6, 40), 0), ((2, 40001), 1)):
        x = randn(*shape).to(DEVICE)
        with triton():
            want, inside = mmkern.softmax(x, dim), x.clone()
            assert mmkern.softmax(inside, dim, out=inside) is inside
            across = torch.empty(shape[::-1], device=DEVICE).T
            mmkern.softmax(x, dim, out=across)
        assert torch.equal(inside, want)
        assert torch.equal(across, want)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("width", [7, 40000])
def test_nan_and_infinity(dim: int, width: int) -> None:
    x = torch.zeros(5, width)
    x[0, 3], x[1, 3], x[2, 3], x[3] = math.nan, math.inf, -math.inf, -math.inf
    x = x if dim == 1 else x.T.contiguous()
    for ours, theirs in OPS.values():
        with triton():
            found = ours(x.to(DEVICE), dim).cpu()
        torch.testing.assert_close(found, theirs(x, dim), equal_nan=True)


def terms(shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[Tensor | None, Tensor | None]]:
    """Masks and biases of every kind, shape and layout that broadcast to `shape`."""
    draw = torch.Generator().manual_seed(1)
    full, last = torch.rand(shape, generator=draw), torch.rand(shape[-1:], generator=draw)
    column = torch.rand((*shape[:-1], 1), generator=draw)
    strided = torch.stack([full, full], -1).flatten(-2)[..., ::2]
    holes = torch.where(full > 0.3, full, -torch.inf)
    return [
        (None, None), (full > 0.3, None), (last > 0.3, full.to(dtype)), (column > 0.3, last), (strided > 0.3, column),
        (full, None), ((last - 0.5).to(dtype), holes), (holes.to(dtype), None), (full > 2, None),
    ]  # fmt: skip


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("shape", "dim"), [((2, 3, 9, 21), -1), ((2, 3, 9, 5), 1), ((40,), 0), ((3, 40000), 1)], ids=str
)
def test_masked_softmax(shape: tuple[int, ...], dim: int, dropout_p: float) -> None:
    """With gradients of x and of every float term, in the term's shape."""
    for i, dtype in enumerate(DTYPES):
        several = terms(shape, dtype)
        for mask, bias in several[i % 3 :: 3] if math.prod(shape) > 100 else several:
            # What is the same along dim has a gradient of 0, of which rounding is all there is.
            leaves = [
                t is not None and t.is_floating_point() and t.expand(shape).stride(dim) != 0 for t in (mask, bias)
            ]
            floats = [t for t, leaf in zip((mask, bias), leaves, strict=True) if leaf]

            def call(x: Tensor, *given: Tensor, terms=(mask, bias), leaves=leaves) -> Tensor:
                left = iter(given)
                m, b = (
                    next(left) if leaf else None if t is None else t.to(x.device)
                    for t, leaf in zip(terms, leaves, strict=True)
                )
                if x.dtype == torch.float64:
                    m, b = (t.double() if t is not None and t.is_floating_point() else t for t in (m, b))
                return mmkern.masked_softmax(x, m, bias=b, scale=0.7, dim=dim, dropout_p=dropout_p)

            x, grad = (randn(*shape, dtype=dtype, seed=seed, layout=LAYOUTS[i]) for seed in (0, 1))
            check(call, call, [x, *floats], grad)


def test_what_is_hidden_reaches_nobody() -> None:
    x, grad = randn(4, 30), randn(4, 30, seed=1)
    mask = torch.arange(30) < torch.tensor([[0], [1], [17], [30]])
    x[~mask], grad[~mask] = math.nan, math.nan
    found = []
    for fill in (None, 0.0):
        a, g = (t if fill is None else torch.where(mask, t, fill) for t in (x, grad))
        leaf = a.to(DEVICE).requires_grad_()
        with triton():
            out = mmkern.masked_softmax(leaf, mask.to(DEVICE))
            found.append((out, torch.autograd.grad(out, leaf, g.to(DEVICE))[0]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][0][0].eq(0).all()


def test_deterministic_over_batch_mates() -> None:
    x = randn(5, 3, 700).to(DEVICE)
    with triton():
        whole, alone = mmkern.softmax(x, -1), mmkern.softmax(x[2:3], -1)
        assert torch.equal(whole, mmkern.softmax(x, -1))
    assert torch.equal(whole[2:3], alone)

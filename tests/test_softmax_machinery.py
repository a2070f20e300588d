"""The softmax family in torch's machinery: errors, threads, compile, vmap, opcheck, checkpoints, what is kept."""

from __future__ import annotations

import math

import pytest
import torch
from backends import DTYPES
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import mmkern
from mmkern.testing import assert_accurate, randn


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_over_threads_and_batch_mates(dtype):
    x, keep = randn(64, 20, 300, dtype=dtype), torch.rand(20, 300) > 0.2
    before = torch.get_num_threads()
    calls = [lambda t: mmkern.softmax(t, -1), lambda t: mmkern.softmax(t, 1), lambda t: mmkern.log_softmax(t, -1)]
    calls.append(lambda t: mmkern.masked_softmax(t, keep))
    try:
        for call in calls:
            torch.set_num_threads(1)
            expected, copy = call(x), x.clone()
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                assert torch.equal(call(x), expected)
                assert torch.equal(call(x[5:7]), expected[5:7])
            assert torch.equal(x, copy)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows_are_the_same_however_they_are_shared_out(dtype):
    x = randn(6, 70001, dtype=dtype)
    before = torch.get_num_threads()
    try:
        for call in (mmkern.softmax, mmkern.log_softmax):
            torch.set_num_threads(1)
            expected = call(x, 1)
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                assert torch.equal(call(x, 1), expected)  # a row to each thread
                assert torch.equal(call(x[2:4], 1), expected[2:4])  # chunks of a row to each
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("mask_dim", [(7, 1, 5), (1, 5), (1, 1), (7, 6, 1), (5,), ()])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_gradient_of_broadcast_terms(mask_dim, dim):
    x, bias = randn(7, 6, 5).double(), randn(*mask_dim).double().requires_grad_()
    weight = randn(7, 6, 5, seed=2).double()
    (actual,) = torch.autograd.grad((mmkern.masked_softmax(x, bias=bias, dim=dim) * weight).sum(), bias)
    (expected,) = torch.autograd.grad((torch.softmax(x + bias, dim) * weight).sum(), bias)
    torch.testing.assert_close(actual, expected)
    float_x, float_bias = x.float(), bias.detach().float()
    assert_accurate(
        mmkern.masked_softmax(float_x, bias=float_bias, dim=dim), torch.softmax(float_x.double() + float_bias, dim)
    )


def test_dtype_is_converted_first():
    x = torch.arange(6).reshape(2, 3)
    assert torch.equal(mmkern.softmax(x, 1, torch.float32), mmkern.softmax(x.float(), 1))
    assert mmkern.log_softmax(x.half(), 1, dtype=torch.float64).dtype == torch.float64


def masked(x, dim):
    return mmkern.masked_softmax(x, torch.arange(x.shape[-1]) != 1, dim=dim)


@pytest.mark.parametrize("call", [mmkern.softmax, mmkern.log_softmax, masked])
def test_gradients_compile_and_vmap(call):
    x = randn(3, 4, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: call(t, 1), (x,))
    assert torch.autograd.gradgradcheck(lambda t: call(t, 1), (x,))
    x = randn(4, 7).requires_grad_()
    (expected,) = torch.autograd.grad(call(x, 1).square().sum(), x)
    compiled = torch.compile(lambda t: call(t * 1.0, 1), fullgraph=True)
    torch.testing.assert_close(compiled(x), call(x, 1))
    (actual,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.vmap(lambda t: call(t, 0))(x.detach()), call(x.detach(), 1))


def test_masked_dropout_keeps_the_expectation_and_follows_the_seed():
    x = torch.zeros(64, 512)
    torch.manual_seed(3)
    y = mmkern.masked_softmax(x, dropout_p=0.25)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 512 / 0.75])
    assert abs((y > 0).float().mean().item() - 0.75) < 0.01  # 32768 draws: 4 standard deviations
    torch.manual_seed(3)
    assert torch.equal(mmkern.masked_softmax(x, dropout_p=0.25), y)
    assert not mmkern.masked_softmax(x, dropout_p=1.0).any()


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
    torch.library.opcheck(op.masked_softmax_fwd.default, (x[0], keep[0], 1.0, None, 1, 0.0, None))
    for name in ("softmax", "log_softmax"):
        torch.library.opcheck(getattr(op, f"{name}_fwd").default, (x[0], 1))
        torch.library.opcheck(getattr(op, f"{name}_out").default, (x[0], 1, torch.empty_like(x[0])))


def test_compiles_whole() -> None:
    given, grad = leaves(), randn(8, 40, 300, seed=5)

    def both(x: Tensor, b: Tensor) -> Tensor:
        return mmkern.masked_softmax(x * 2, bias=b).log_softmax(-1) + mmkern.softmax(x, 1)

    compiled = torch.compile(both, fullgraph=True)
    for mine, want in zip(*(torch.autograd.grad(f(*given), given, grad) for f in (compiled, both)), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-6)


X = torch.zeros(3, 4)
ERRORS = [
    (lambda: mmkern.softmax([1.0], 0), TypeError, "input"),
    (lambda: mmkern.softmax(X.int(), 0), TypeError, "input.*int32"),
    (lambda: mmkern.softmax(X, 2), IndexError, r"dim.*\[-2, 1\].*\(3, 4\)"),
    (lambda: mmkern.log_softmax(X, -3), IndexError, "dim"),
    (lambda: mmkern.softmax(X, None), TypeError, "dim"),
    (lambda: mmkern.softmax(X, True), TypeError, "dim"),
    (lambda: mmkern.softmax(X, 1, torch.int64), TypeError, "dtype.*int64"),
    (lambda: mmkern.softmax(X, 1, "float32"), TypeError, "dtype.*float32"),
    (lambda: mmkern.softmax(X, 1, out=[0.0]), TypeError, "out.*list"),
    (lambda: mmkern.softmax(X, 1, out=torch.zeros(4).expand(3, 4)), ValueError, r"out.*\(0, 1\).*twice"),
    (lambda: mmkern.softmax(X, 1, out=torch.zeros(3, 3)), ValueError, r"out.*\(3, 4\).*\(3, 3\)"),
    (lambda: mmkern.softmax(X, 1, out=X.double()), ValueError, "out.*float32.*float64"),
    (lambda: mmkern.softmax(X, 1, out=X.clone().requires_grad_()), ValueError, "out.*grad"),
    (lambda: mmkern.masked_softmax(X, torch.ones(5) > 0), ValueError, r"mask.*\(5,\).*\(3, 4\)"),
    (lambda: mmkern.masked_softmax(X, torch.ones(2, 3, 4) > 0), ValueError, "mask"),
    (lambda: mmkern.masked_softmax(X, torch.ones(4, dtype=torch.int64)), TypeError, "mask.*int64"),
    (lambda: mmkern.masked_softmax(X, bias=torch.ones(4) > 0), TypeError, "bias.*bool"),
    (lambda: mmkern.masked_softmax(X, bias=torch.ones(4, device="meta")), ValueError, "bias.*meta.*cpu"),
    (lambda: mmkern.masked_softmax(X, scale=math.nan), ValueError, "scale.*nan"),
    (lambda: mmkern.masked_softmax(X, scale="1"), TypeError, "scale"),
    (lambda: mmkern.masked_softmax(X, dropout_p=1.5), ValueError, "dropout_p.*1.5"),
    (lambda: mmkern.masked_softmax(X, dropout_p=math.nan), ValueError, "dropout_p.*nan"),
    (lambda: mmkern.masked_softmax(X, dim=2), IndexError, "dim"),
]


@pytest.mark.parametrize(("call", "error", "words"), ERRORS)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()

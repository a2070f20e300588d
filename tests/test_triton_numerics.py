"""The arithmetic that Triton kernels share, against torch's and against the definition of dropout."""

import pytest
import torch

from mmkern.reference.philox import keep_mask
from mmkern.testing import randn

triton = pytest.importorskip("triton")
tl = triton.language

from mmkern.kernels import numerics  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_tanh, _keep_tile, _dot = numerics.tanh, numerics.keep_tile, numerics.dot


@triton.jit
def _tanh_kernel(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, _tanh(tl.load(x_ptr + at)))


@triton.jit
def _keep_kernel(seed_ptr, out_ptr, threshold, batch, head, start_i, start_j, M: tl.constexpr, N: tl.constexpr):
    i = start_i + tl.arange(0, M)[:, None]
    keep = _keep_tile(tl.load(seed_ptr), threshold, i * 0 + batch, i * 0 + head, i, start_j, N)
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + at, keep.to(tl.int8))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    acc = tl.full([N, N], 1.0, tl.float32)
    tl.store(out_ptr + at, _dot(tl.load(a_ptr + at), tl.load(b_ptr + at), acc, "ieee"))


def test_tanh_within_three_units():
    x = torch.cat([torch.linspace(-12, 12, 3000), torch.logspace(-8, 0, 1092), torch.tensor([0.0, 90.0, -1e30, 0.25])])
    out = torch.empty_like(x, device=DEVICE)
    _tanh_kernel[(1,)](x.to(DEVICE), out, x.numel())
    exact = torch.tanh(x.double())
    assert ((out.cpu().double() - exact).abs() <= 3 * torch.finfo(torch.float32).eps * exact.abs() + 1e-45).all()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("batch", "head", "start_i", "start_j"), [(0, 0, 0, 0), (3, 5, 7, 12), (1, 0, 130, 64)])
def test_dropout_keeps_what_its_definition_keeps(dropout_p, batch, head, start_i, start_j):
    seed = torch.tensor([-7234567890123456789])
    out = torch.empty(16, 32, dtype=torch.int8, device=DEVICE)
    _keep_kernel[(1,)](seed.to(DEVICE), out, round(dropout_p * 2**32), batch, head, start_i, start_j, 16, 32)
    whole = keep_mask(seed, dropout_p, (batch + 1, head + 1, start_i + 16, start_j + 32), torch.device("cpu"))
    assert torch.equal(out.cpu().bool(), whole[batch, head, start_i:, start_j:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dot_keeps_float32_sums(dtype):
    a, b = (randn(32, 32, dtype=dtype, seed=s).to(DEVICE) for s in (1, 2))
    out = torch.empty(32, 32, device=DEVICE)
    _dot_kernel[(1,)](a, b, out, 32)
    torch.testing.assert_close(out.double(), a.double() @ b.double() + 1, rtol=1e-5, atol=1e-5)

"""Attention at the edges of numbers: NaN, infinities, padding, large values, points without a gradient."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import EACH, REFERENCE, Case, hold, qkv
from backends import DTYPES, Backend
from torch import Tensor

from mmkern import scaled_dot_product_attention as attention
from mmkern.reference.philox import keep_mask
from mmkern.testing import assert_accurate, randn

WITH_REFERENCE = [*EACH, pytest.param(REFERENCE, id="reference")]


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large(dtype: torch.dtype, backend: Backend, once) -> None:
    """Scores of ten thousand, values whose sum overflows, and masks of the least finite number."""
    q, k, v = qkv((1, 2, 2, 40, 90, 64, 64), dtype)
    lowest = torch.zeros(40, 90).masked_fill(torch.arange(40)[:, None] % 3 == 0, torch.finfo(torch.float32).min)
    large = (v.sign() * torch.finfo(dtype).max / 128).to(dtype)
    for case in (
        Case(q * 30, k * 30, v, {"scale": 1.0}),
        Case(q, k, large, {}),
        Case(q, k, v, {"attn_mask": lowest}),
    ):
        hold(backend, once, case, gradients=False)


@pytest.mark.parametrize("backend", WITH_REFERENCE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan(dtype: torch.dtype, backend: Backend) -> None:
    """A NaN or an infinity reaches what sees it, and only that; torch's kernel loses some and spreads others."""
    dtype = torch.float64 if backend is REFERENCE and dtype == torch.float32 else dtype
    clean = qkv((1, 2, 2, 70, 80, 16, 16), dtype)
    exact = attention(*(t.double() for t in clean), is_causal=True)

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        with backend:
            both = attention(*(backend.to(t) for t in (q, k, v)), is_causal=True, return_lse=True)
        return both[0].cpu(), both[1].cpu()

    want, _ = call(*clean)
    q, k, v = (t.clone() for t in clean)
    q[0, 0, 33, 5] = math.nan
    out, lse = call(q, k, v)
    hit = torch.zeros(1, 2, 70, dtype=torch.bool)
    hit[0, 0, 33] = True
    assert out.isnan().eq(hit[..., None]).all()
    assert lse.isnan().eq(hit).all()
    assert_accurate(out[~hit], exact[~hit], want[~hit])
    if backend.name == "cpu":
        torch.testing.assert_close(out[~hit], want[~hit], rtol=0, atol=0)
    for value in (math.nan, math.inf, -math.inf):
        q, k, v = (t.clone() for t in clean)
        v[0, 1, 44, 3] = value
        out, _ = call(q, k, v)
        expected = exact.clone()
        expected[0, 1, 44:, 3] = value
        assert_accurate(out, expected, want)
        k[0, 1, 75:] = value  # seen by no query
        again, _ = call(q, k, v)
        torch.testing.assert_close(again, out, rtol=0, atol=0, equal_nan=True)
    k = clean[1].clone()
    k[0, 1, 44] = math.nan
    hit = torch.zeros(1, 2, 70, dtype=torch.bool)
    hit[0, 1, 44:] = True
    assert call(clean[0], k, clean[2])[0].isnan().eq(hit[..., None]).all()


@pytest.mark.parametrize("backend", WITH_REFERENCE)
@pytest.mark.parametrize("similarity", ["dot", "cosine", "euclidean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_may_hold_anything(dtype: torch.dtype, similarity: str, backend: Backend) -> None:
    """NaN in padding changes no result and no gradient, not a bit of it with lengths; an empty row has gradient 0."""
    dtype = torch.float64 if backend is REFERENCE else dtype
    keep = torch.arange(9) < torch.tensor([[0], [6]])
    for exactly, given in enumerate(({"attn_mask": keep[:, None, None]}, {"key_lengths": torch.tensor([0, 6])})):
        found = []
        options = {name: backend.to(t) for name, t in given.items()}
        for fill in (0.0, math.nan):
            q, k, v = qkv((2, 2, 2, 4, 9, 8, 8), dtype)
            k[0], v[0], k[1, :, 6:], v[1, :, 6:] = fill, fill, fill, fill
            leaves = [backend.to(t).requires_grad_() for t in (q, k, v)]
            with backend:
                out, lse = attention(*leaves, **options, similarity=similarity, return_lse=True)
                grads = torch.autograd.grad(out.float().square().sum(), leaves)
            assert lse[0].eq(-math.inf).all()
            found.append((out, *grads))
        for padded, zeros in zip(*reversed(found), strict=True):
            atol = 0 if exactly else 8 * torch.finfo(dtype).eps  # of values and gradients up to 4
            torch.testing.assert_close(padded, zeros, rtol=0, atol=atol)
            assert padded[0].eq(0).all()


@pytest.mark.parametrize("backend", EACH)
def test_close_vectors_keep_their_distance(backend: Backend, once) -> None:
    """Queries and keys a thousand from the origin and a thousandth apart."""
    q, k, v = (t.double() for t in qkv((1, 1, 1, 20, 30, 8, 8)))
    options = {"similarity": "euclidean", "scale": 100.0}
    hold(backend, once, Case((1000 + q / 100).float(), (1000 + k / 100).float(), v.float(), options), gradients=False)


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("similarity", ["euclidean", "cosine"])
def test_gradients_where_the_formula_has_none(similarity: str, backend: Backend) -> None:
    """A distance of 0 has gradient 0; a norm below 1e-12 counts as 1e-12, a constant."""
    x = randn(1, 1, 5, 8)
    x[:, :, 1] *= 0 if similarity == "euclidean" else 1e-13
    value, grad = randn(1, 1, 5, 8, seed=1), randn(1, 1, 5, 8, seed=2)
    found = []
    for way, dtype in ((REFERENCE, torch.float64), (backend, torch.float32)):
        leaf = x.to(way.device, dtype, copy=True).requires_grad_()
        with way:
            out = attention(leaf, leaf, value.to(way.device, dtype), similarity=similarity)
            found.append(torch.autograd.grad(out, leaf, grad.to(way.device, dtype))[0].cpu())
    for row in range(5):  # of 1e12 in one row
        torch.testing.assert_close(found[1][0, 0, row].double(), found[0][0, 0, row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", [backend for backend in EACH if backend.values[0].device == "cpu"])
def test_offsets_beyond_32_bits(backend: Backend) -> None:
    """Not on a GPU, where 8 GiB of addresses are 8 GiB of memory."""
    storage = torch.empty(2**32 + 128, dtype=torch.bfloat16)  # of which four pages are touched
    far = storage.as_strided((1, 1, 2, 64), (0, 0, 2**32, 1))
    q, k, _ = qkv((1, 1, 1, 2, 2, 64, 64), torch.bfloat16)
    far.copy_(k)
    with backend.forced():
        assert torch.equal(attention(far, far, far), attention(k, k, k))
        assert torch.equal(attention(q, far, far, is_causal=True), attention(q, k, k, is_causal=True))


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.75, 1.0])
def test_dropped_elements(dropout_p: float, backend: Backend) -> None:
    """Those that the generator says."""
    q, k, v = torch.zeros(2, 3, 7, 16), torch.zeros(2, 3, 101, 16), torch.eye(101).expand(2, 3, 101, 101)
    torch.manual_seed(11)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    keep = keep_mask(seed, dropout_p, (2, 3, 7, 101), torch.device("cpu"))
    torch.manual_seed(11)
    with backend:
        weights = attention(*(backend.to(t) for t in (q, k, v)), dropout_p=dropout_p).cpu() * 101
    want = keep / (1 - dropout_p) if dropout_p < 1 else torch.zeros(keep.shape)
    torch.testing.assert_close(weights, want, rtol=1e-5, atol=0)

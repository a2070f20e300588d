"""Attention with torch's own arguments: values, shapes, NaN, determinism, and torch's machinery around the op."""

from __future__ import annotations

import math
import multiprocessing

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

import mmkern
from mmkern import scaled_dot_product_attention as attention
from mmkern.testing import LAYOUTS, assert_accurate, isas, poisoned, randn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# batch, heads, kv_heads, q_len, k_len, head_dim, value_dim
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (1, 1, 1, 16, 16, 64, 64),
    (2, 3, 3, 5, 7, 8, 8),
    (3, 2, 2, 49, 49, 32, 32),
    (1, 2, 2, 6, 130, 3, 5),
    (1, 2, 1, 48, 257, 72, 72),
    (2, 4, 2, 63, 65, 16, 40),
    (1, 6, 2, 64, 64, 128, 128),
    (1, 1, 1, 130, 300, 80, 1),
    (1, 2, 2, 257, 63, 96, 64),
    (1, 1, 1, 300, 300, 20, 129),
    (1, 2, 1, 65, 130, 129, 160),
    (1, 1, 1, 7, 257, 256, 256),
    (5, 1, 1, 2, 2, 160, 20),
    (2, 5, 1, 1, 48, 64, 64),
    (1, 8, 2, 1, 3000, 64, 64),
    (2, 2, 2, 3, 2500, 128, 128),
    (2, 3, 3, 0, 5, 8, 8),
    (2, 3, 3, 5, 0, 8, 8),
    (0, 3, 3, 5, 6, 8, 8),
    (2, 0, 0, 5, 6, 8, 8),
    (1, 2, 2, 5, 6, 0, 8),
    (1, 2, 2, 5, 6, 8, 0),
]


def qkv(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> list[Tensor]:
    batch, heads, kv_heads, q_len, k_len, dim, v_dim = shape
    sizes = ((batch, heads, q_len, dim), (batch, kv_heads, k_len, dim), (batch, kv_heads, k_len, v_dim))
    return [randn(*size, dtype=dtype, layout=layout, seed=seed) for seed, size in enumerate(sizes)]


def check(q: Tensor, k: Tensor, v: Tensor, **options: object) -> None:
    """Every instruction set, into poisoned memory, against the float64 reference and torch's own kernel."""
    exact, exact_lse = attention(q.double(), k.double(), v.double(), **options, return_lse=True)
    baseline = F.scaled_dot_product_attention(q, k, v, **options)
    for isa in isas():
        with mmkern.backend("cpu", isa=isa, strict=True), poisoned():
            out, lse = attention(q, k, v, **options, return_lse=True)
        assert_accurate(out, exact, baseline)
        assert_accurate(lse, exact_lse, dtype=torch.float32)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape: tuple[int, ...], dtype: torch.dtype, is_causal: bool) -> None:
    check(*qkv(shape, dtype), is_causal=is_causal, enable_gqa=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_is_torch(shape: tuple[int, ...]) -> None:
    q, k, v = qkv(shape, torch.float64)
    for is_causal in (False, True):
        ours = attention(q, k, v, is_causal=is_causal, enable_gqa=True)
        theirs = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    check(*qkv((3, 2, 2, 37, 50, 40, 24), dtype, layout), scale=0.3)


RANKS = {
    "two dims": ((6, 8), (7, 8), (7, 5), None, False),
    "three dims": ((3, 6, 8), (3, 7, 8), (3, 7, 8), (3, 6, 7), False),
    "three dims, (L, S) mask": ((3, 6, 8), (3, 7, 8), (3, 7, 8), (6, 7), False),
    "three dims, batch of one": ((3, 6, 8), (1, 7, 8), (1, 7, 8), (3, 1, 7), False),
    "three dims, grouped": ((4, 6, 8), (2, 7, 8), (2, 7, 8), (4, 6, 7), True),
    "five dims": ((2, 3, 4, 6, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 5), (3, 1, 1, 7), False),
    "five dims, grouped": ((2, 3, 4, 6, 8), (2, 3, 2, 7, 8), (2, 3, 2, 7, 8), (2, 1, 4, 6, 1), True),
    "broadcast batch": ((2, 4, 6, 8), (1, 4, 7, 8), (2, 4, 7, 8), (2, 1, 1, 7), False),
    "broadcast heads": ((2, 1, 6, 8), (2, 4, 7, 8), (1, 4, 7, 8), (4, 1, 7), False),
    "one key head": ((2, 4, 6, 8), (2, 1, 7, 8), (2, 1, 7, 8), (1, 1, 6, 7), False),
    "key of fewer dims": ((2, 4, 6, 8), (7, 8), (4, 7, 8), None, False),
}


@pytest.mark.parametrize("name", RANKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_ranks(name: str, dtype: torch.dtype) -> None:
    *shapes, mask_shape, enable_gqa = RANKS[name]
    q, k, v = (randn(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes))
    mask = None if mask_shape is None else randn(*mask_shape, dtype=dtype, seed=3)
    out, lse = attention(q, k, v, mask, enable_gqa=enable_gqa, return_lse=True)
    wide = [None if t is None else t.double() for t in (q, k, v, mask)]
    if enable_gqa:
        wide[1], wide[2] = (t.repeat_interleave(2, -3) for t in wide[1:3])
    scores = wide[0] @ wide[1].mT / math.sqrt(8) + (0 if mask is None else wide[3])
    assert_accurate(out, scores.softmax(-1) @ wide[2])
    assert_accurate(lse, scores.logsumexp(-1), dtype=lse.dtype)
    assert out.shape == F.scaled_dot_product_attention(*wide[:3]).shape
    assert out.is_contiguous(), "as the query is"


PLACES = {  # (2, 3, 5, 8) in memory orders that models use
    "contiguous": lambda: randn(2, 3, 5, 8),
    "projection": lambda: randn(2, 5, 3, 8).transpose(1, 2),
    "packed projection": lambda: randn(2, 5, 3, 3, 8)[:, :, 0].transpose(1, 2),
    "length first": lambda: randn(5, 2, 3, 8).permute(1, 2, 0, 3),
    "every other": lambda: randn(2, 3, 10, 8)[:, :, ::2],
    "one for all": lambda: randn(1, 3, 5, 8).expand(2, -1, -1, -1),
    "columns apart": lambda: randn(2, 3, 8, 5).mT,
}


@pytest.mark.parametrize("backend", ["cpu", "reference", "fake"])
@pytest.mark.parametrize("name", PLACES)
def test_output_lies_as_torchs(name: str, backend: str) -> None:
    q = PLACES[name]()
    expected = F.scaled_dot_product_attention(q, q, q).stride()
    wider = torch.cat([q, q], -1)  # of values: another size than the query's, where torch forgets the order
    if backend == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            q, wider = mode.from_tensor(q), mode.from_tensor(wider)
            found, wide = attention(q, q, q), attention(q, q, wider)
    else:
        with mmkern.backend(backend):
            found, wide = attention(q, q, q), attention(q, q, wider)
    assert found.stride() == expected
    order = wide.transpose(1, 2) if "projection" in name else wide
    assert "length" in name or order.is_contiguous(), "merging the heads should be free"


def test_score_sizes() -> None:
    """Scores of ten thousand, of both signs, and values so large that 128 of them overflow: no overflow on the way."""
    for dtype in DTYPES:
        q, k, v = qkv((1, 2, 2, 40, 90, 64, 64), dtype)
        check(q * 30, k * 30, v, scale=1.0)
        check(q, k, (v.sign() * torch.finfo(dtype).max / 128).to(dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_nan(dtype: torch.dtype) -> None:
    """A NaN reaches what sees it, and only that; torch's kernel loses the first and spreads the third."""
    clean = qkv((1, 2, 2, 70, 80, 32, 32), dtype)
    for isa in isas():
        with mmkern.backend("cpu", isa=isa):
            want = attention(*clean, is_causal=True)
            exact = attention(*(t.double() for t in clean), is_causal=True)
            q, k, v = (t.clone() for t in clean)
            q[0, 0, 33, 5] = math.nan
            out, lse = attention(q, k, v, is_causal=True, return_lse=True)
            hit = torch.zeros(1, 2, 70, dtype=torch.bool)
            hit[0, 0, 33] = True
            assert out.isnan().eq(hit[..., None]).all()
            assert lse.isnan().eq(hit).all()
            torch.testing.assert_close(out[~hit], want[~hit], rtol=0, atol=0)
            for value in (math.nan, math.inf, -math.inf):
                q, k, v = (t.clone() for t in clean)
                v[0, 1, 44, 3] = value
                out = attention(q, k, v, is_causal=True)
                expected = exact.clone()
                expected[0, 1, 44:, 3] = value
                assert_accurate(out, expected, want)
                k[0, 1, 75:] = value  # seen by no query
                again = attention(q, k, v, is_causal=True)
                torch.testing.assert_close(again, out, rtol=0, atol=0, equal_nan=True)
            k, v = clean[1].clone(), clean[2]
            k[0, 1, 44] = math.nan
            hit = torch.zeros(1, 2, 70, dtype=torch.bool)
            hit[0, 1, 44:] = True
            out = attention(q, k, v, is_causal=True)
            assert out.isnan().eq(hit[..., None]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_padding_may_hold_anything(dtype: torch.dtype) -> None:
    """NaN in padded keys and values changes no result and no gradient; an empty row has output and gradient 0."""
    lengths, grads = torch.tensor([0, 6]), []
    for fill in (0.0, math.nan):
        q, k, v = qkv((2, 2, 2, 4, 9, 8, 8), dtype)
        k[0], v[0], k[1, :, 6:], v[1, :, 6:] = fill, fill, fill, fill
        q, k, v = (t.requires_grad_() for t in (q, k, v))
        out, lse = attention(q, k, v, key_lengths=lengths, return_lse=True)
        out.square().sum().backward()
        assert out[0].eq(0).all()
        assert lse[0].eq(-math.inf).all()
        grads.append((out, q.grad, k.grad, v.grad))
    for padded, zeros in zip(*reversed(grads), strict=True):
        torch.testing.assert_close(padded, zeros, rtol=0, atol=0)
        assert padded[0].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_merge_by_lse(dtype: torch.dtype) -> None:
    q, k, v = qkv((2, 4, 2, 9, 100, 32, 32), dtype)
    exact = attention(q.double(), k.double(), v.double(), enable_gqa=True)
    cuts = [(0, 1), (1, 38), (38, 38), (38, 100)]
    parts = [attention(q, k[:, :, a:b], v[:, :, a:b], enable_gqa=True, return_lse=True) for a, b in cuts]
    lse = torch.stack([part[1] for part in parts])
    weights = (lse - lse.logsumexp(0)).exp()
    merged = sum(w[..., None] * part[0].float() for w, part in zip(weights, parts, strict=True))
    assert_accurate(merged, exact, attention(q, k, v, enable_gqa=True), dtype=dtype)


@pytest.mark.parametrize("shape", [(3, 4, 2, 70, 130, 64, 64), (3, 4, 1, 1, 3000, 64, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Bitwise the same over repeats, threads and batch-mates; inputs stay as they were."""
    inputs = qkv(shape, dtype)
    kept = [t.clone() for t in inputs]
    bias = randn(*shape[:2], shape[3], shape[4], seed=7)
    want, threads = attention(*inputs, bias, enable_gqa=True), torch.get_num_threads()
    try:
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            assert torch.equal(attention(*inputs, bias, enable_gqa=True), want)
            alone = attention(*(t[1:2] for t in inputs), bias[1:2], enable_gqa=True)
            assert torch.equal(alone, want[1:2])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))


def test_offsets_beyond_32_bits() -> None:
    storage = torch.empty(2**32 + 128, dtype=torch.bfloat16)  # 8 GiB of addresses, four pages of memory
    far = storage.as_strided((1, 1, 2, 64), (0, 0, 2**32, 1))
    q, k, _ = qkv((1, 1, 1, 2, 2, 64, 64), torch.bfloat16)
    far.copy_(k)
    assert torch.equal(attention(far, far, far), attention(k, k, k))
    assert torch.equal(attention(q, far, far, is_causal=True), attention(q, k, k, is_causal=True))


def _child(queue: multiprocessing.Queue, *qkv: torch.Tensor) -> None:
    queue.put(attention(*qkv).numpy().tobytes())  # torch's own ops may hang here: the parent has used threads


def test_forked_child() -> None:
    q, k, v = qkv((2, 4, 4, 128, 128, 64, 64))
    want = attention(q, k, v).numpy().tobytes()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue, q, k, v))
    child.start()
    try:
        assert queue.get(timeout=30) == want
    finally:
        child.kill()

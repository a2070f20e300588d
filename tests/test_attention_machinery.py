"""Attention in torch's machinery: ranks, where outputs lie, merging by log-sum-exp, threads, forks, errors."""

from __future__ import annotations

import math
import multiprocessing
import re

import pytest
import torch
import torch.nn.functional as F
from attention_cases import qkv
from backends import DTYPES
from torch._subclasses import FakeTensorMode

import mmkern
from mmkern import scaled_dot_product_attention as attention
from mmkern.testing import assert_accurate, randn

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
def test_deterministic_over_threads(shape: tuple[int, ...], dtype: torch.dtype) -> None:
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


Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8), torch.zeros(2, 2, 7, 6)
LONG = torch.ones(5, 7, dtype=torch.int64)
ERRORS = {
    "query: expected a Tensor, got list": (TypeError, {"query": [1]}),
    "key: expected at least 2 dims": (ValueError, {"key": torch.zeros(7)}),
    "key: dtype torch.float64 where query has torch.float32": (TypeError, {"key": K.double()}),
    "query: expected float32, .* got torch.int64": (TypeError, {"query": Q.long(), "key": K.long(), "value": V.long()}),
    "key: its last dim must be query's .*(2, 2, 7, 9)": (ValueError, {"key": torch.zeros(2, 2, 7, 9)}),
    "value: its length must be key's; .*(2, 2, 6, 6)": (ValueError, {"value": torch.zeros(2, 2, 6, 6)}),
    "value: on device meta where query is on cpu": (ValueError, {"value": V.to("meta")}),
    "key: leading dims do not broadcast": (ValueError, {"key": torch.zeros(3, 2, 7, 8)}),
    "key: 2 heads where query has 4; with enable_gqa=True": (ValueError, {"enable_gqa": False}),
    "key: its 3 heads must divide query's 4": (
        ValueError,
        {"key": torch.zeros(2, 3, 7, 8), "value": torch.zeros(2, 3, 7, 6)},
    ),
    "attn_mask: expected a Tensor of bool, float32 .* got torch.int64": (
        TypeError,
        {"attn_mask": LONG},
    ),
    "attn_mask: shape (5, 6) does not broadcast to .*(2, 4, 5, 7)": (ValueError, {"attn_mask": torch.ones(5, 6)}),
    "attn_mask: shape (1, 2, 4, 5, 7) does not": (ValueError, {"attn_mask": torch.ones(1, 2, 4, 5, 7)}),
    "attn_mask: on device meta": (ValueError, {"attn_mask": torch.ones(5, 7, device="meta")}),
    "dropout_p: expected a number in [0, 1], got 1.5": (ValueError, {"dropout_p": 1.5}),
    "dropout_p: expected a number, got str": (TypeError, {"dropout_p": "0.1"}),
    "scale: expected a finite number, got nan": (ValueError, {"scale": float("nan")}),
    "similarity: expected one of dot, cosine, .* got 'cos'": (ValueError, {"similarity": "cos"}),
    "temperature: shape (3,) where query has 4 heads": (ValueError, {"temperature": torch.ones(3)}),
    "temperature: expected a floating-point Tensor, got torch.int64": (
        TypeError,
        {"temperature": LONG[0]},
    ),
    "window: expected a pair": (ValueError, {"window": 5}),
    "window: expected sides >= 0": (ValueError, {"window": (-1, 0)}),
    "window: expected integers or None": (TypeError, {"window": (1.5, 0)}),
    "softcap: expected a number > 0, got 0": (ValueError, {"softcap": 0}),
    "alibi_slopes: shape (2, 3) where query has 4 heads": (ValueError, {"alibi_slopes": torch.ones(2, 3)}),
    "key_lengths: expected values in [0, 7], got 3..8": (ValueError, {"key_lengths": torch.tensor([3, 8])}),
    "key_lengths: expected a Tensor of int32 or int64, got torch.float32": (TypeError, {"key_lengths": torch.ones(2)}),
    "key_lengths: shape (3,) does not broadcast to query's batch": (ValueError, {"key_lengths": torch.ones(3).long()}),
    "sinks: shape (2,) where query has 4 heads": (ValueError, {"sinks": torch.ones(2)}),
    "causal_alignment: expected one of upper_left, lower_right, got 'left'": (ValueError, {"causal_alignment": "left"}),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument(message: str) -> None:
    error, wrong = ERRORS[message]
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    with pytest.raises(error, match=pattern):
        mmkern.scaled_dot_product_attention(**{"query": Q, "key": K, "value": V, "enable_gqa": True} | wrong)

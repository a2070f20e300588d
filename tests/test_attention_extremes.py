"""Attention with masks and scores at the ends of a dtype's range.

At 1e9 the next float32 is 64 away. So the yardstick is the reference with every score as float32 arithmetic rounds it,
and float64 for all that follows: sums, weights and gradients.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from attention_cases import EACH, LARGE, REFERENCE
from backends import DTYPES, Backend
from torch import Tensor

import mmkern
from mmkern import scaled_dot_product_attention as attention
from mmkern.nn import attention_weights
from mmkern.reference import attention_scores
from mmkern.testing import accuracy, randn

MOST = torch.finfo(torch.float32).max
SHAPES = {
    "smallest": (1, 2, 1, 3, 40, 16), "few rows": (2, 4, 4, 1, 300, 16), "one block": (2, 4, 2, 33, 70, 24),
    "many": (1, 4, 2, 100, 300, 32),
}  # fmt: skip
LARGER = ["smallest", *(pytest.param(name, marks=LARGE) for name in list(SHAPES)[1:])]
# Of the smallest shape, one of each kind: an interpreter takes that alone.
FEW = (
    "-1e+09 in a row", "-3.40282e+38 everywhere", "a mask that cancels", "temperature", "sinks",
    "sinks over hidden keys",
)  # fmt: skip


@contextmanager
def rounded_scores() -> Iterator[None]:
    """The reference in float64, its scores with the values of float32 arithmetic."""

    def scores(*args: object) -> tuple[Tensor, Tensor]:
        exact, _ = attention_scores(*args)
        wide = [isinstance(a, Tensor) and a.dtype == torch.float64 for a in args]
        with torch.no_grad():
            found, seen = attention_scores(*(a.float() if w else a for a, w in zip(args, wide, strict=True)))
        exact = torch.where(seen, exact, 0.0)
        value = torch.where(seen, found.double(), 0.0)
        return torch.where(seen, exact + (value - exact).detach(), found.double()), seen

    module = sys.modules["mmkern.reference.attention"]  # the package's `attention` is the function
    with mock.patch.object(module, "attention_scores", scores), mmkern.backend("reference"):
        yield


def run(
    tensors: dict[str, Tensor], options: dict, dtype: torch.dtype | None = None, backend: Backend = REFERENCE
) -> dict[str, Tensor]:
    """Output, log-sum-exp and the gradients of all float tensors."""

    def to(x: object) -> object:
        return backend.to(x.to(dtype) if dtype and isinstance(x, Tensor) and x.is_floating_point() else x)

    given = {name: backend.to(x) for name, x in {**tensors, **options}.items()}
    grads = [to(randn(*tensors["query"].shape, dtype=tensors["query"].dtype, seed=8))]
    leaves = {n: to(x).detach().requires_grad_() for n, x in given.items() if isinstance(x, Tensor) and "len" not in n}
    torch.manual_seed(7)
    out, lse = attention(**{**given, **leaves}, enable_gqa=True, return_lse=True)
    grads.append(backend.to(randn(*lse.shape, seed=9).to(lse.dtype)))
    found = torch.autograd.grad((out, lse), list(leaves.values()), grads)
    return {n: t.detach().cpu() for n, t in zip(("out", "lse", *leaves), (out, lse, *found), strict=True)}


def options(heads: int, q_len: int, k_len: int) -> dict[str, dict]:
    bias = randn(heads, q_len, k_len, seed=4)
    half = torch.arange(k_len) < k_len // 2
    low = {f"{m:g} in a row": {"attn_mask": bias.index_fill(1, torch.tensor([0]), m)} for m in (-1e9, -1e30, -MOST)}
    low |= {f"{m:g} everywhere": {"attn_mask": torch.full((1, k_len), m)} for m in (-1e9, 1e9, -MOST, MOST / 2)}
    hot = torch.zeros(k_len).index_fill(0, torch.tensor([1, 2]), MOST)
    far = {"temperature": torch.tensor([1e9, -1e9, 1e30, 3.0])[:heads]}
    slopes = torch.tensor([1e9, 1e4, 3e37, MOST])[:heads]
    return low | {
        "lowest for padding": {"attn_mask": torch.where(half, 0.0, -MOST)[None]},
        "lowest and hidden": {"attn_mask": torch.where(half, -MOST, -math.inf)[None]},
        "lowest, causal": {"attn_mask": torch.full((1, k_len), -MOST), "is_causal": True},
        "lowest, lengths": {"attn_mask": torch.full((1, k_len), -MOST), "key_lengths": torch.tensor(k_len // 3)},
        "largest at two keys": {"attn_mask": hot[None]},
        "both ends": {"attn_mask": torch.where(bias > 0, MOST, -MOST)},
        "a mask that cancels": {"attn_mask": torch.full((1, k_len), -1e9), "scale": 1e9},
        "slopes": {"alibi_slopes": slopes},
        "slopes that cancel": {"alibi_slopes": slopes, "attn_mask": torch.full((1, k_len), 1e9)},
        "temperature": far,
        "cosine": {**far, "similarity": "cosine"},
        "cosine, mask": {**far, "similarity": "cosine", "attn_mask": bias},
        "scale": {"scale": 1e30},
        "subnormal scale": {"scale": 1e-40},
        "softcap": {"softcap": 1e30, "scale": 1e29},
        "largest softcap": {"softcap": MOST},
        "subnormal softcap": {"softcap": 1e-39},
        "sinks": {"sinks": torch.tensor([1e9, -1e9, MOST, -MOST])[:heads]},
        "sinks over hidden keys": {
            "sinks": torch.tensor([MOST, -MOST, 1e9, -1e9])[:heads],
            "attn_mask": torch.full((1, k_len), -math.inf),
        },
        "sinks beside -1e9": {"sinks": torch.tensor([-1e9, 64 - 1e9, -1e9, 0])[:heads], "attn_mask": bias * 0 - 1e9},
        "squared distance": {"similarity": "squared_euclidean", "scale": 1e20},
        "distance": {"similarity": "euclidean", "scale": 1e15},
        "dropout": {"attn_mask": torch.full((1, k_len), -1e9), "dropout_p": 0.2},
    }


def check(
    shape: tuple[int, ...], dtype: torch.dtype, names: Sequence[str], backend: Backend, times: float = 1.0
) -> None:
    batch, heads, kv_heads, q_len, k_len, dim = shape
    sizes = ((heads, q_len), (kv_heads, k_len), (kv_heads, k_len))
    query, key, value = (randn(batch, *size, dim, dtype=dtype, seed=i) for i, size in enumerate(sizes))
    if times != 1:  # whole numbers: their products are exact
        query, key = (t.round() * times for t in (query, key))
    tensors = {"query": query, "key": key, "value": value}
    table = options(heads, q_len, k_len)
    for name in names:
        with rounded_scores():
            exact = run(tensors, table[name] if name else {}, torch.float64)
        with backend:
            found = run(tensors, table[name] if name else {}, backend=backend)
        for of, x in found.items():
            kind = "forward" if of in ("out", "lse") else "gradient"
            result = accuracy(x, exact[of].to(x.dtype).double(), None, kind, dtype)
            good = result.relative_l2 <= result.limit or result.max_error <= result.bound
            assert good, f"{name}: {of}: {result}"
            assert result.same_nonfinite, f"{name}: {of}: {result}"


NAMES = list(options(1, 2, 8))


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", LARGER)
def test_ends_of_the_range(shape: str, dtype: torch.dtype, backend: Backend) -> None:
    check(SHAPES[shape], dtype, FEW if shape == "smallest" else NAMES, backend)


@LARGE
@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
@pytest.mark.parametrize("times", [1e3, 2.0**30, 2.0**52])
def test_large_products(times: float, similarity: str, backend: Backend) -> None:
    with mock.patch.dict(globals(), options=lambda *_: {"": {"similarity": similarity}}):
        for shape in list(SHAPES.values())[1:]:
            check(shape, torch.float32, [""], backend, times)


@pytest.mark.parametrize("backend", EACH)
def test_merged_parts_of_lowest_scores(backend: Backend) -> None:
    """300 keys, in Triton parts of 256 and 44: each key weighs 1 / 300."""
    q, k, v = (randn(1, 1, n, 16, seed=i) for i, n in enumerate((1, 300, 300)))
    with backend:
        out = attention(*(backend.to(t) for t in (q, k, v, torch.full((1, 300), -MOST))))
    torch.testing.assert_close(out.cpu(), v.mean(2, keepdim=True))


@pytest.mark.parametrize("backend", EACH)
def test_log_sum_exps_that_round_away_part_of_the_keys(backend: Backend) -> None:
    """Scores of 1e5 and 3e6 exactly: log 40 beside them is rounded to 2^-7 and to 0.25, and weights are 1 / 40."""
    tensors = {"query": torch.zeros(1, 2, 3, 16), "key": randn(1, 2, 40, 16, seed=1), "value": randn(1, 2, 40, 16)}
    for magnitude in (-1e5, 3e6):
        masked = {"attn_mask": torch.full((1, 40), magnitude)}
        with mmkern.backend("reference"):
            exact = run(tensors, masked, torch.float64)
        with backend:
            found = run(tensors, masked, backend=backend)
        for name in ("query", "key", "value"):
            result = accuracy(found[name], exact[name], None, "gradient")
            assert result.relative_l2 <= result.limit, f"{magnitude:g}: {name}: {result}"


@pytest.mark.parametrize("magnitude", [-1e9, 1e30, -MOST])
def test_maps(magnitude: float) -> None:
    q, k, v = (randn(1, 2, 4, 8, seed=i) for i in range(3))
    mask = torch.full((4, 4), magnitude)
    _, lse = attention(q, k, v, mask, return_lse=True)
    torch.testing.assert_close(attention_weights(q, k, lse, mask, scale=1.0), torch.full((1, 2, 4, 4), 0.25))

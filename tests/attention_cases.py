"""What attention is tested on: shapes, its features alone, and random calls that combine them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_formula import formula
from backends import DTYPES, Backend, backends
from hypothesis import strategies as st
from torch import Tensor

import mmkern
from mmkern.testing import FEATURES, Sizes, accuracy, randn

LARGE = pytest.mark.large
EACH = backends("scaled_dot_product_attention")
REFERENCE = Backend("reference")
# What random calls are drawn for: an interpreter takes minutes for a head dim of 256.
FAST = [REFERENCE, *(backend for (backend,), *_ in EACH if not backend.slow)]
# Sums over all rows and keys that largely cancel: rounding a bfloat16 output alone can cost 1% of what is left, and
# how far torch's float32 sum is off is luck. One of the two limits of the rule must hold.
TOTALS = ("temperature", "alibi_slopes", "sinks")
# batch, heads, kv_heads, q_len, k_len, head_dim, value_dim
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1), (2, 3, 3, 5, 7, 8, 8), (1, 2, 2, 6, 130, 3, 5), (1, 2, 1, 20, 130, 72, 72),
    (1, 4, 2, 63, 65, 16, 40), (1, 1, 1, 130, 70, 80, 1), (1, 1, 1, 70, 70, 20, 129), (1, 1, 1, 7, 37, 256, 256),
    (1, 1, 1, 17, 33, 520, 16), (5, 1, 1, 2, 2, 160, 20), (1, 4, 2, 1, 600, 64, 64), (1, 1, 1, 3, 600, 128, 128),
    (2, 3, 3, 0, 5, 8, 8), (2, 3, 3, 5, 0, 8, 8), (0, 3, 3, 5, 6, 8, 8), (2, 0, 0, 5, 6, 8, 8), (1, 2, 2, 5, 6, 0, 8),
    (1, 2, 2, 5, 6, 8, 0),
    *(pytest.param(shape, marks=LARGE) for shape in (
        (1, 1, 1, 16, 16, 64, 64), (3, 2, 2, 49, 49, 32, 32), (1, 2, 1, 48, 257, 72, 72), (2, 4, 2, 63, 65, 16, 40),
        (1, 6, 2, 64, 64, 128, 128), (1, 1, 1, 130, 300, 80, 1), (1, 2, 2, 257, 63, 96, 64),
        (1, 1, 1, 300, 300, 20, 129), (1, 2, 1, 65, 130, 129, 160), (1, 1, 1, 7, 257, 256, 256),
        (2, 5, 1, 1, 48, 64, 64), (1, 8, 2, 1, 1200, 64, 64), (1, 2, 2, 3, 600, 128, 128), (1, 8, 2, 1, 3000, 64, 64),
        (2, 2, 2, 3, 2500, 128, 128),
    )),
]  # fmt: skip
SIMILARITIES = ("dot", "cosine", "euclidean", "squared_euclidean")
LENGTHS = (0, 1, 2, 5, 6, 7, 48, 49, 63, 64, 65, 130, 257, 300)
HEAD_DIMS = (1, 3, 8, 16, 20, 32, 64, 72, 80, 96, 128, 129, 160, 256)


class Case:
    """Arguments of one call; its repr is what a failing test prints."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: dict) -> None:
        self.q, self.k, self.v, self.options = q, k, v, options

    def __repr__(self) -> str:
        shown = {
            n: f"{x.dtype}{tuple(x.shape)}" if isinstance(x, Tensor) else x
            for n, x in {"q": self.q, "k": self.k, "v": self.v, **self.options}.items()
        }
        return str(shown)

    def cast(self, dtype: torch.dtype) -> Case:
        def to(x: object) -> object:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        return Case(to(self.q), to(self.k), to(self.v), {n: to(x) for n, x in self.options.items()})


def tensors(dtype: torch.dtype = torch.float32, batch=2, heads=4, kv_heads=2, q_len=33, k_len=70, dim=24, v_dim=24):
    return (
        randn(batch, heads, q_len, dim, dtype=dtype, seed=1),
        randn(batch, kv_heads, k_len, dim, dtype=dtype, seed=2),
        randn(batch, kv_heads, k_len, v_dim, dtype=dtype, seed=3),
    )


BIAS, KEEP = Sizes().bias, Sizes().keep  # of the sizes of `tensors`
ALONE = {name: options(Sizes()) for name, options in FEATURES.items()}


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, Backend]:
    def pick(*choices: object) -> object:
        return draw(st.sampled_from(choices))

    dtype, similarity = pick(*DTYPES), pick(*SIMILARITIES)
    batch, kv_heads, group = pick(1, 2, 3), pick(1, 2), pick(1, 1, 2, 5)
    heads, q_len, k_len = kv_heads * group, pick(*LENGTHS), pick(*LENGTHS)
    dim = pick(*HEAD_DIMS)
    if batch * heads * q_len * k_len * dim > 4e6:
        batch, heads, kv_heads, q_len = 1, group, 1, 7
    seed, layout = pick(1, 2, 3), pick("contiguous", "transposed", "strided", "offset", "expanded")
    v_dim = pick(dim, dim, 1, 16, 40, 130)
    q = randn(batch, heads, q_len, dim, dtype=dtype, seed=seed, layout=layout)
    k = randn(batch, kv_heads, k_len, dim, dtype=dtype, seed=seed + 10, layout=pick("contiguous", layout))
    v = randn(batch, kv_heads, k_len, v_dim, dtype=dtype, seed=seed + 20, layout=pick("contiguous", layout))
    scale = {"dot": None, "cosine": 4.0, "euclidean": 0.3, "squared_euclidean": 1 / dim}[similarity]
    full = tuple(pick(n, 1) for n in (batch, heads, q_len, k_len))[pick(0, 0, 1, 2) :]
    bias = randn(*full, seed=seed + 30)
    mask = {"no": None, "bool": bias > -0.7, "float32": bias, "own": bias.to(dtype)}
    mask["holes"] = bias.masked_fill(bias < -0.7, -math.inf)
    slopes = randn(batch, heads, seed=seed).abs() / 50  # scores of 100 and more would cost float32 its 1e-6
    options = {
        "attn_mask": mask[pick("no", "no", *mask)],
        "is_causal": pick(False, True),
        "scale": scale,
        "enable_gqa": heads != kv_heads or pick(False, True),
        "similarity": similarity,
        "temperature": pick(None, 0.7, torch.tensor(1.5), randn(heads, seed=seed).abs()),
        "window": pick(None, None, (0, 0), (5, None), (None, 3), (100, 50)),
        "softcap": pick(None, None, 2.0),
        "alibi_slopes": pick(None, None, slopes[0], slopes),
        "key_lengths": pick(None, None, torch.arange(batch) * k_len // batch, torch.tensor(k_len)),
        "sinks": pick(None, None, randn(heads, seed=seed)),
        "causal_alignment": pick("upper_left", "lower_right"),
    }
    return Case(q, k, v, options), pick(*FAST)


def sees_several(case: Case) -> bool:
    """Whether some query sees two keys or more. Else weights are 1, and gradients the rounding of their exponents."""
    zeros = Case(case.q[..., :1] * 0, case.k[..., :1] * 0, case.v[..., :1] * 0, {}).cast(torch.float64)
    options = {n: case.options.get(n) for n in ("is_causal", "causal_alignment", "window", "key_lengths")}
    if (mask := case.options.get("attn_mask")) is not None:
        options["attn_mask"] = mask if mask.dtype == torch.bool else mask > -math.inf
    _, lse = formula(zeros.q, zeros.k, zeros.v, options)
    return bool((lse > 0.5).any())


def qkv(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> list[Tensor]:
    batch, heads, kv_heads, q_len, k_len, dim, v_dim = shape
    sizes = ((batch, heads, q_len, dim), (batch, kv_heads, k_len, dim), (batch, kv_heads, k_len, v_dim))
    return [randn(*size, dtype=dtype, layout=layout, seed=seed) for seed, size in enumerate(sizes)]


def ours(q: Tensor, k: Tensor, v: Tensor, options: dict) -> tuple[Tensor, Tensor]:
    return mmkern.scaled_dot_product_attention(q, k, v, **options, return_lse=True)


def run(
    op: Callable, case: Case, grads: tuple[Tensor, Tensor] | None = None, backend: Backend = REFERENCE
) -> dict[str, Tensor]:
    """Output, log-sum-exp and, given theirs, the gradients of q, k, v and every float option, on the CPU."""
    leaves = {"q": case.q, "k": case.k, "v": case.v}
    leaves |= {n: x for n, x in case.options.items() if isinstance(x, Tensor) and x.is_floating_point()}
    leaves = {n: backend.to(x.detach()).requires_grad_(grads is not None) for n, x in leaves.items()}
    options = {n: leaves.get(n, backend.to(x)) for n, x in case.options.items()}
    torch.manual_seed(7)
    with backend:
        out, lse = op(leaves["q"], leaves["k"], leaves["v"], options)
        found = {"out": out, "lse": lse}
        if grads is not None:
            of_both = [backend.to(g).to(t.dtype) for g, t in zip(grads, (out, lse), strict=True)]
            found |= zip(leaves, torch.autograd.grad((out, lse), list(leaves.values()), of_both), strict=True)
    return {name: t.detach().cpu() for name, t in found.items()}


def hold(
    backend: Backend, once: Callable, case: Case, gradients: bool = True, layout: str = "contiguous"
) -> dict[str, Tensor]:
    """A case on a backend, by the rule: the reference in float64, the formula above in float32 as the yardstick."""
    dtype, shape = case.q.dtype, (*case.q.shape[:-1], case.v.shape[-1])
    grads = (randn(*shape, dtype=dtype, seed=8, layout=layout), randn(*shape[:-1], seed=9)) if gradients else None
    exact = once(lambda: run(ours, case.cast(torch.float64), grads))
    baseline = once(lambda: run(formula, case.cast(torch.float32), grads))
    found = run(ours, case, grads, backend)
    for name, actual in found.items():
        kind = "forward" if name in ("out", "lse") else "gradient"
        expected = torch.float32 if name == "lse" else case.options[name].dtype if name in case.options else dtype
        assert actual.dtype == expected, name
        rule = torch.float32 if name == "lse" else dtype
        result = accuracy(actual, exact[name], baseline[name].to(rule), kind, rule)
        near = result.max_error <= result.bound
        # A gradient that is 0 but for float64's rounding has no relative error.
        average = result.relative_l2 <= result.limit or exact[name].norm() < 1e-12
        good = (near or average) if name in TOTALS else near and average
        assert good, f"{name}: {result}"
        assert result.same_nonfinite, f"{name}: {result}"
    return found


def alone(compute: Callable[[], Any]) -> Any:
    """In the place of `once`, for what only one backend is asked."""
    return compute()

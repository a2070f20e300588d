"""How results are judged, and on what: the accuracy rule, test inputs, attention's features, poisoned outputs.

Tests, benchmarks and the resource table of the kernels share them.

The rule: against a float64 reference on the same (already rounded) inputs, the largest error is at most 2x
(forward) or 3x (gradients) that of torch's own op in the same dtype, plus a few units in the last place of
the largest value; the relative L2 error stays under a limit of the dtype; and a result is NaN or infinite
exactly where the reference is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# kind -> how much worse than torch, how many ulp are free, and the relative L2 limit of each dtype
_FACTOR = {"forward": 2.0, "gradient": 3.0}
_ULPS = 4.0
_RELATIVE_L2 = {
    "forward": {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3},
    "gradient": {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
}
LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded")


@dataclass(frozen=True)
class Accuracy:
    """One comparison: the largest error and its bound, the relative L2 error and its limit."""

    max_error: float
    baseline_error: float
    bound: float
    relative_l2: float
    limit: float
    same_nonfinite: bool

    @property
    def ok(self) -> bool:
        return self.same_nonfinite and self.max_error <= self.bound and self.relative_l2 <= self.limit

    def __str__(self) -> str:
        return (
            f"max error {self.max_error:.3g} (torch {self.baseline_error:.3g}, bound {self.bound:.3g}), "
            f"relative L2 {self.relative_l2:.3g} (limit {self.limit:.3g}), "
            f"NaN and infinities {'match' if self.same_nonfinite else 'DIFFER'}"
        )


def accuracy(
    actual: Tensor,
    exact: Tensor,
    baseline: Tensor | None = None,
    kind: str = "forward",
    dtype: torch.dtype | None = None,
) -> Accuracy:
    """Compare `actual` with the float64 `exact`, given what torch's own op answers (`baseline`).

    Args:
        actual: result under test, any shape, floating point.
        exact: float64 result of the reference on the same inputs, same shape.
        baseline: torch's own result in the dtype under test, same shape; None leaves only the ulp allowance.
            Where it is not finite although `exact` is, it counts as exact.
        kind: "forward" or "gradient".
        dtype: dtype of the computation if it is not actual.dtype (a float32 log-sum-exp of bfloat16 inputs, say).
    """
    if actual.shape != exact.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} where the reference has {tuple(exact.shape)}")
    dtype = dtype or actual.dtype
    a, e = actual.detach().double().cpu(), exact.detach().double().cpu()
    finite = e.isfinite()
    everywhere = bool(finite.all())  # selecting takes longer than all the rest
    same = bool(a.isfinite().all())
    if not everywhere:
        same = bool((a[~finite].nan_to_num(7.0) == e[~finite].nan_to_num(7.0)).all() and a[finite].isfinite().all())
        a, e = a[finite], e[finite]
    largest = e.abs().max().item() if e.numel() else 0.0
    error = (a - e).abs()
    baseline_error = 0.0
    if baseline is not None and e.numel():
        base = baseline.detach().double().cpu()
        against = ((base if everywhere else base[finite]) - e).abs_()
        baseline_error = against.nan_to_num_(0.0, 0.0, 0.0).max().item()
    norm = e.norm().item()
    return Accuracy(
        max_error=error.max().item() if e.numel() else 0.0,
        baseline_error=baseline_error,
        bound=_FACTOR[kind] * baseline_error + _ULPS * torch.finfo(dtype).eps * largest + torch.finfo(dtype).tiny,
        relative_l2=error.norm().item() / norm if norm else 0.0,
        limit=_RELATIVE_L2[kind][dtype],
        same_nonfinite=same,
    )


def assert_accurate(
    actual: Tensor,
    exact: Tensor,
    baseline: Tensor | None = None,
    kind: str = "forward",
    dtype: torch.dtype | None = None,
) -> None:
    """Raise AssertionError with the numbers unless `accuracy(...)` is ok."""
    found = accuracy(actual, exact, baseline, kind, dtype)
    assert found.ok, str(found)


def randn(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seed: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """Normal random tensor of `shape`, the same for a seed whatever the dtype (rounded) and layout.

    Layouts: "contiguous"; "transposed" (the two dims before the last swapped in memory, as a model's
    (batch, length, heads, dim) projection gives); "strided" (every other element of the last dim);
    "offset" (contiguous, starting one element into its storage: 4- or 2-byte aligned); "expanded" (stride 0
    over the first dim, so its values repeat).
    """
    generator = torch.Generator().manual_seed(seed)
    size = (1, *shape[1:]) if layout == "expanded" and shape else shape
    x = (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(dtype)
    if layout == "transposed" and len(shape) >= 3:
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, float("nan"))], -1).flatten(-2)[..., ::2] if shape else x
    if layout == "offset":
        storage = torch.full((x.numel() + 1,), float("nan"), dtype=dtype)
        storage[1:] = x.flatten()
        return storage[1:].view(size)
    return x.expand(shape)


@dataclass(frozen=True)
class Sizes:
    """Of the attention call that a row of FEATURES makes its options for; draw: makes a mask of random numbers."""

    batch: int = 2
    heads: int = 4
    q_len: int = 33
    k_len: int = 70
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    draw: Callable[..., Tensor] = randn

    @property
    def bias(self) -> Tensor:
        """A score to add for each (batch, head, query, key)."""
        shape = (self.batch, self.heads, self.q_len, self.k_len)
        return self.draw(*shape, dtype=self.dtype, seed=4).to(self.device)

    @property
    def keep(self) -> Tensor:
        """Which keys a query sees: seven of ten."""
        return self.bias > -0.5

    def per_head(self, *values: float) -> Tensor:
        return torch.tensor(values).repeat(-(-self.heads // len(values)))[: self.heads].to(self.device)

    def lengths(self, *of_70: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """The part of the keys that each sequence has, in 70ths."""
        some = torch.tensor(of_70, dtype=dtype) * self.k_len // 70
        return some.repeat(-(-self.batch // len(of_70)))[: self.batch].to(self.device)


# Everything that attention does beside softmax(q k^T) v: name -> options of the public function. A window of 2^40 and
# slopes of each batch entry are among them because a kernel treats them otherwise.
FEATURES: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "plain": lambda s: {},
    "cosine": lambda s: {"similarity": "cosine", "temperature": 7.5},
    "cosine, learned": lambda s: {"similarity": "cosine", "temperature": s.per_head(0.5, 2.0, 9.0, -3.0)},
    "euclidean": lambda s: {"similarity": "euclidean"},
    "squared_euclidean": lambda s: {"similarity": "squared_euclidean", "scale": 0.05},
    "temperature of one": lambda s: {"temperature": torch.tensor(2.5, device=s.device)},
    "negative scale": lambda s: {"scale": -0.3},
    "zero scale": lambda s: {"scale": 0.0},
    "bool mask": lambda s: {"attn_mask": s.keep},
    "bool mask of keys": lambda s: {"attn_mask": s.keep[:, :1, :1]},
    "bool mask of queries": lambda s: {"attn_mask": s.keep[:, :1, :, :1]},
    "bool mask of heads": lambda s: {"attn_mask": s.keep[0, :, :1]},
    "float mask": lambda s: {"attn_mask": s.bias},
    "float mask, one for the batch": lambda s: {"attn_mask": replace(s, batch=1).bias},
    "float mask (L, S)": lambda s: {"attn_mask": s.bias[0, 0]},
    "float mask with holes": lambda s: {"attn_mask": s.bias.masked_fill(~s.keep, -math.inf)},
    "float mask, transposed": lambda s: {"attn_mask": s.bias.mT.contiguous().mT},
    "causal": lambda s: {"is_causal": True},
    "causal, lower right": lambda s: {"is_causal": True, "causal_alignment": "lower_right"},
    "window": lambda s: {"window": (9, 3)},
    "window to the left": lambda s: {"window": (5, 0), "causal_alignment": "lower_right"},
    "window, half open": lambda s: {"window": (None, 2)},
    "window without bounds": lambda s: {"window": (2**40, 2**40)},
    "softcap": lambda s: {"softcap": 1.5, "scale": 1.0},
    "alibi": lambda s: {"alibi_slopes": s.per_head(0.5, 0.25, 0.125, 0.0)},
    "alibi of each batch": lambda s: {
        "alibi_slopes": randn(s.batch, s.heads, seed=5).abs().to(s.device),
        "causal_alignment": "lower_right",
    },
    "lengths": lambda s: {"key_lengths": s.lengths(70, 31)},
    "lengths, one empty": lambda s: {"key_lengths": s.lengths(0, 1, dtype=torch.int32)},
    "lengths, lower right": lambda s: {
        "key_lengths": s.lengths(41, 20),
        "is_causal": True,
        "causal_alignment": "lower_right",
    },
    "sinks": lambda s: {"sinks": s.per_head(0.0, 3.0, -math.inf, -2.0)},
    "dropout": lambda s: {"dropout_p": 0.1},
}


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill every newly allocated output with NaN first, so that an element no kernel wrote shows."""
    memory: Any = torch.utils.deterministic
    before = memory.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = before


def isas() -> Sequence[str]:
    """Instruction sets that this processor can be made to use, for `mmkern.backend("cpu", isa=...)`."""
    from mmkern.ops.dispatch import _C

    return _C.isas() if _C else ()

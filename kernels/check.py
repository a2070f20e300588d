"""What launchers ask of their arguments before a kernel reads memory, as csrc/cpu/check.h does for the CPU.

Sizes, dtypes, devices and options; no element is read, which would stop the stream: kernels clamp or mask the values
that index memory where they use them. A compiled graph and torch.ops come here without passing mmkern.ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LONG, WEIGHTS = (torch.int64,), (*FLOATS, torch.float64)


def refuse(name: str, what: str) -> NoReturn:
    raise ValueError(f"{name}: {what}")


def given(
    name: str,
    t: Any,
    on: Tensor | None = None,
    dtypes: Sequence[torch.dtype] = FLOATS,
    shape: Sequence[int] | None = None,
    rank: int = 0,
) -> None:
    """A tensor of one of `dtypes` on the device of `on`, of that shape or at least so many dims, with memory."""
    if not isinstance(t, Tensor) or t.dtype not in dtypes or t.layout != torch.strided:
        refuse(name, f"expected a dense tensor of {dtypes[0]}, got {getattr(t, 'dtype', type(t).__name__)}")
    if on is not None and t.device != on.device:
        refuse(name, f"on device {t.device} where {on.device} is expected")
    if t.dim() < rank or (shape is not None and t.shape != torch.Size(shape)):
        refuse(name, f"expected {f'at least {rank} dims' if shape is None else tuple(shape)}, got {tuple(t.shape)}")
    if t.device.type != "meta" and t.numel():
        last = t.storage_offset() + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
        if (last + 1) * t.element_size() > t.untyped_storage().nbytes():
            refuse(name, f"its storage does not hold the elements of shape {tuple(t.shape)}; was it freed?")


def term(name: str, t: Tensor, x: Tensor, shape: Sequence[int], full: bool = False) -> None:
    """A mask or bias that broadcasts to `shape`; with `full`, of as many dims."""
    given(name, t, x, (torch.bool, torch.float32, x.dtype))
    missing = len(shape) - t.dim()
    if missing < 0 or (full and missing) or any(n not in (1, m) for n, m in zip(t.shape, shape[missing:], strict=True)):
        refuse(name, f"shape {tuple(t.shape)} does not broadcast to {tuple(shape)}")


def between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        refuse(name, f"expected a value in [{low}, {high}], got {value}")


def dropout(dropout_p: float, seed: Tensor | None, on: Tensor) -> None:
    between("dropout_p", dropout_p, 0.0, 1.0)
    if seed is not None:
        given("dropout_seed", seed, on, LONG)
        if seed.numel() != 1:
            refuse("dropout_seed", f"expected one element, got shape {tuple(seed.shape)}")
    elif dropout_p > 0.0:
        refuse("dropout_seed", "expected one int64 with dropout_p above 0")


def wanted(bits: int, terms: Sequence[Tensor | None]) -> None:
    """A bit of `wanted` for each float tensor that is there."""
    possible = sum(1 << i for i, t in enumerate(terms) if t is not None and t.is_floating_point())
    if bits & ~possible:
        refuse("wanted", f"bits {possible} may be set in this call, got {bits}")


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float, similarity: int, temperature: Tensor | None, window_left: int, window_right: int, softcap: float,
    alibi_slopes: Tensor | None, key_lengths: Tensor | None, sinks: Tensor | None, causal_lower_right: bool,
    dropout_seed: Tensor | None,
) -> None:  # fmt: skip
    given("query", query, rank=3)
    same, (*lead, heads, q_len, dim) = (query.dtype,), query.shape
    given("key", key, query, same, rank=3)
    kv_heads, k_len = key.shape[-3:-1]
    given("key", key, query, same, (*lead, kv_heads, k_len, dim))
    given("value", value, query, same, rank=1)
    given("value", value, query, same, (*lead, kv_heads, k_len, value.shape[-1]))
    if heads and (kv_heads == 0 or heads % kv_heads):
        refuse("key", f"its {kv_heads} heads must divide query's {heads}")
    if attn_mask is not None:
        term("attn_mask", attn_mask, query, (*lead, heads, q_len, k_len), full=True)
    dropout(dropout_p, dropout_seed, query)
    if not isfinite(scale):
        refuse("scale", f"expected a finite number, got {scale}")
    between("similarity", similarity, 0, 3)
    between("window_left", window_left, -1, 2**62)
    between("window_right", window_right, -1, 2**62)
    if softcap != 0.0:
        between("softcap", softcap, 2.0**-149, torch.finfo(torch.float32).max)
    for name, t, shape in (
        ("temperature", temperature, (heads,)),
        ("alibi_slopes", alibi_slopes, (*lead, heads)),
        ("sinks", sinks, (heads,)),
    ):
        if t is not None:
            given(name, t, query, (torch.float32,), shape)
    if key_lengths is not None:
        given("key_lengths", key_lengths, query, LONG, lead)


def attention_gradients(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, args: Sequence[Any], bits: int
) -> None:
    """`args`: those of `attention`, which have been found to be right."""
    query, key, value, mask = args[:4]
    for name, t in (("grad_out", grad_out), ("out", out)):
        given(name, t, query, (query.dtype,), (*query.shape[:-1], value.shape[-1]))
    for name, row in (("lse", lse), ("grad_lse", grad_lse)):
        if row is not None or name == "lse":
            given(name, row, query, (torch.float32,), query.shape[:-1])
    wanted(bits, (query, key, value, mask, args[8], args[12], args[14]))


def writable(name: str, t: Tensor) -> None:
    """No element twice: which of two results it ends with would depend on the order of writes."""
    reach = 1
    for step, n in sorted((step, n) for n, step in zip(t.shape, t.stride(), strict=True) if n > 1):
        if step < reach:
            refuse(name, f"shape {tuple(t.shape)} of strides {t.stride()} holds elements twice")
        reach += (n - 1) * step


def softmax(x: Tensor, dim: int, *others: tuple[str, Tensor], name: str = "input") -> None:
    """`others` by name: gradients and outputs, of x's shape and dtype. `name`: x's own."""
    given(name, x, rank=1)
    between("dim", dim, 0, x.dim() - 1)
    for other, t in others:
        given(other, t, x, (x.dtype,), x.shape)


def masked_softmax(
    x: Tensor, mask: Tensor | None, scale: float, bias: Tensor | None, dim: int, dropout_p: float, seed: Tensor | None,
    name: str = "x",
) -> None:  # fmt: skip
    softmax(x, dim, name=name)
    if mask is not None:
        term("mask", mask, x, x.shape)
    if bias is not None:
        term("bias", bias, x, x.shape)
        given("bias", bias, x, (torch.float32, x.dtype))
    if not isfinite(scale):
        refuse("scale", f"expected a finite number, got {scale}")
    dropout(dropout_p, seed, x)


def cross_entropy(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, label_smoothing: float, bits: int
) -> None:
    given("input", x, rank=1)
    soft = isinstance(target, Tensor) and target.is_floating_point()
    given("target", target, x, FLOATS if soft else LONG, x.shape if soft else _places(x))
    if weight is not None:
        given("weight", weight, x, WEIGHTS, (x.shape[min(1, x.dim() - 1)],))
    between("reduction", reduction, 0, 2)
    between("label_smoothing", label_smoothing, 0.0, 1.0)
    wanted(bits, (x, target))


def _places(x: Tensor) -> tuple[int, ...]:
    """The shape of logits without their classes."""
    return () if x.dim() == 1 else (*x.shape[:1], *x.shape[2:])


def scaled(grad: Tensor, grad_loss: Tensor, unit: Tensor | None) -> None:
    given("grad", grad, rank=1)
    given("grad_loss", grad_loss, grad, WEIGHTS)
    given("grad_loss", grad_loss, grad, WEIGHTS, None if grad_loss.dim() == 0 else _places(grad))
    if unit is not None:
        given("unit", unit, grad, (torch.float32,), (1,))


def encoding(
    kind: str, table: Tensor | None, offset: int, offsets: Tensor | None, x: Tensor, shape: Sequence[int]
) -> None:
    """What is added to rows of `shape` (..., length, dim), in the dtype and on the device of x."""
    if kind not in ("none", "sinusoidal", "scalar", "table", "sincos2d"):
        refuse("encoding", f"unknown name {kind!r}")
    if (kind == "table") != (table is not None):
        refuse("table", "by encoding 'table' alone")
    if table is not None:
        given("table", table, x, (x.dtype,), rank=2)
        given("table", table, x, (x.dtype,), (table.shape[0], shape[-1]))
    if kind == "sincos2d" and (offset or offsets is not None or len(shape) < 3 or shape[-1] % 4):
        refuse("encoding", f"'sincos2d' takes (..., height, width, 4 n) and no offset, got {tuple(shape)}")
    if offsets is not None:
        given("offsets", offsets, x, LONG, shape[:1])
        if offset or len(shape) < 3:
            refuse("offset", "expected 0 beside offsets, and a batch")


def rotary(
    q: Tensor, k: Tensor | None, positions: Tensor | None, base: float, layout: str, rotary_dim: int,
    grid: Sequence[int] | None,
) -> None:  # fmt: skip
    given("q", q, rank=2)
    length, dim = q.shape[-2:]
    entries = positions is not None and positions.dim() == 2 and q.dim() > 2
    if positions is not None:
        given("positions", positions, q, LONG, (q.shape[0], length) if entries else (length,))
    if k is not None:
        given("k", k, q, (q.dtype,), rank=2)
        batch = (q.dim() > 3 or entries) and k.shape[0] != q.shape[0]
        if k.dim() != q.dim() or k.shape[-2:] != q.shape[-2:] or batch:
            refuse("k", f"expected q's rank, batch, length and dim, got {tuple(k.shape)} and q {tuple(q.shape)}")
    if not (base > 0 and isfinite(base)):
        refuse("base", f"expected a finite number above 0, got {base}")
    if layout not in ("half", "interleaved"):
        refuse("layout", f"expected 'half' or 'interleaved', got {layout!r}")
    between("rotary_dim", rotary_dim, 1, dim)
    if rotary_dim % (2 if grid is None else 4):
        refuse("rotary_dim", f"expected a multiple of {2 if grid is None else 4}, got {rotary_dim}")
    if grid is not None and (len(grid) != 2 or min(grid) < 1 or (positions is None and grid[0] * grid[1] != length)):
        refuse("grid", f"expected (height, width), without positions of length {length}, got {tuple(grid)}")

"""Arguments of attention: checked, and brought into the form that its kernels take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkern.ops._checks import DTYPES, KERNEL_DTYPES, broadcasts, by_value, check_dense, check_device, kind
from mmkern.ops._numbers import integer


def autocast(t: Any, dtype: torch.dtype) -> Any:
    return t.to(dtype) if isinstance(t, Tensor) and t.dtype in KERNEL_DTYPES else t


def _shapes(query: Tensor, key: Tensor, value: Tensor) -> str:
    return f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
        check_dense(name, t)
        if t.dim() < 2:
            raise ValueError(f"{name}: expected at least 2 dims, got shape {tuple(t.shape)}")
        if t.dtype != query.dtype:
            raise TypeError(f"{name}: dtype {t.dtype} where query has {query.dtype}")
        check_device(name, t, "query", query)
    if query.dtype not in DTYPES:
        raise TypeError(f"query: expected float32, bfloat16, float16 or float64, got {query.dtype}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"key: its last dim must be query's head_dim; got {_shapes(query, key, value)}")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"value: its length must be key's; got {_shapes(query, key, value)}")


def alike(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether these are plainly fit to go on: one shape of rank >= 4, one dtype, on the CPU. Half a microsecond."""
    try:
        shape, dtype = query.shape, query.dtype
        return (
            len(shape) >= 4
            and shape == key.shape == value.shape
            and dtype in DTYPES
            and dtype == key.dtype == value.dtype
            and query.is_cpu
            and key.is_cpu
            and value.is_cpu
        )
    except (AttributeError, RuntimeError):  # not all are tensors, or one is nested and has no shape
        return False


def align(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, Tensor, Tensor, Tensor]:
    """Rank of the call; and views of rank >= 4 with equal dims before the heads, and heads that a kernel can pair."""
    _check_tensors(query, key, value)
    tensors = [query, key, value]
    rank = max(t.dim() for t in tensors)
    lead = query.shape[:-2]
    if len(lead) >= 2 and lead[:-1] == key.shape[:-3] and key.shape[:-2] == value.shape[:-2]:
        kv_heads = key.shape[-3]
        if lead[-1] == kv_heads or (enable_gqa and kv_heads and lead[-1] % kv_heads == 0):
            return rank, query, key, value
    if rank == 3 and not enable_gqa:  # three dims are a batch of one head
        tensors = [t.unsqueeze(-3) if t.dim() == 3 else t for t in tensors]
    views = [t[(None,) * (max(rank, 4) - t.dim())] for t in tensors]
    heads, key_heads, value_heads = (t.shape[-3] for t in views)
    try:
        lead = torch.broadcast_shapes(*(t.shape[:-3] for t in views))
        (kv_heads,) = torch.broadcast_shapes((key_heads,), (value_heads,))
    except RuntimeError:
        raise ValueError(f"key: leading dims do not broadcast; got {_shapes(query, key, value)}") from None
    if heads != kv_heads and heads == 1:
        heads = kv_heads
    if heads != kv_heads and kv_heads != 1:
        if not enable_gqa:
            raise ValueError(
                f"key: {kv_heads} heads where query has {heads}; with enable_gqa=True, groups of query heads share one"
            )
        if kv_heads == 0 or heads % kv_heads:
            raise ValueError(f"key: its {kv_heads} heads must divide query's {heads}; got {_shapes(query, key, value)}")
    query = views[0].expand(*lead, heads, -1, -1)
    key, value = (t.expand(*lead, kv_heads, -1, -1) for t in views[1:])
    return rank, query, key, value


def unalign(out: Tensor, lse: Tensor, rank: int, enable_gqa: bool) -> tuple[Tensor, Tensor]:
    if rank == 3:
        return (out.squeeze(0).contiguous(), lse.squeeze(0)) if enable_gqa else (out.squeeze(-3), lse.squeeze(-2))
    return out.squeeze(0).squeeze(0), lse.squeeze(0).squeeze(0)


def checked_mask(mask: Tensor | None, query: Tensor, key: Tensor, rank: int, enable_gqa: bool) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(f"attn_mask: expected a Tensor of bool, float32 or {query.dtype}, got {kind(mask)}")
    _check_beside_query("attn_mask", mask, query)
    if query.dtype == torch.float64 and mask.dtype == torch.float32:
        mask = mask.double()
    if rank == 3 and not enable_gqa and mask.dim() == 3:
        mask = mask.unsqueeze(-3)
    shape = (*query.shape[:-1], key.shape[-2])
    if not broadcasts(mask, shape):
        raise ValueError(
            f"attn_mask: shape {tuple(mask.shape)} does not broadcast to (..., heads, q_len, k_len) = {shape}"
        )
    missing = len(shape) - mask.dim()
    return mask[(None,) * missing] if missing else mask


def _check_beside_query(name: str, t: Tensor, query: Tensor) -> None:
    check_dense(name, t)
    check_device(name, t, "query", query)


def per_head(name: str, t: Any, query: Tensor, *, scalar: bool = False, batched: bool = False) -> Tensor:
    """`t` in the dtype of the arithmetic, with a value for each head (and batch, where `batched`)."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point Tensor, got {kind(t)}")
    _check_beside_query(name, t, query)
    heads = query.shape[-3]
    fits = t.shape == (heads,) or (scalar and t.dim() == 0) or (batched and t.dim() == query.dim() - 2)
    full = (*query.shape[:-3], heads) if batched else (heads,)
    try:
        if not fits:
            raise RuntimeError
        return t.to(torch.promote_types(query.dtype, torch.float32)).expand(full)
    except RuntimeError:
        raise ValueError(
            f"{name}: shape {tuple(t.shape)} where query has {heads} heads, query {tuple(query.shape)}"
        ) from None


def checked_window(window: Any) -> tuple[int, int]:
    if window is None:
        return -1, -1
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise ValueError(f"window: expected a pair (left, right), got {window!r}")
    sides = [None if side is None else integer("window", side, "integers or None") for side in window]
    if any(side is not None and side < 0 for side in sides):
        raise ValueError(f"window: expected sides >= 0, got {window!r}")
    left, right = (-1 if side is None or side >= 2**62 else side for side in sides)  # positions stay in int64
    return left, right


def checked_lengths(lengths: Any, query: Tensor, k_len: int) -> Tensor:
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"key_lengths: expected a Tensor of int32 or int64, got {kind(lengths)}")
    _check_beside_query("key_lengths", lengths, query)
    # Reading the values of a GPU tensor would stop the stream, and a traced or vmapped one has none yet: kernels
    # clamp them.
    if lengths.is_cpu and by_value(lengths) and lengths.numel():
        low, high = (int(x) for x in lengths.aminmax())
        if low < 0 or high > k_len:
            raise ValueError(f"key_lengths: expected values in [0, {k_len}], got {low}..{high}")
    try:
        return lengths.long().expand(query.shape[:-3])
    except RuntimeError:
        raise ValueError(
            f"key_lengths: shape {tuple(lengths.shape)} does not broadcast to query's batch {tuple(query.shape[:-3])}"
        ) from None

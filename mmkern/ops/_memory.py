"""What the C++ border asks of tensors (csrc/cpu/check.h), for operators that are made of others in Python."""

from __future__ import annotations

import torch
from torch import Tensor


def check_memory(name: str, t: Tensor) -> None:
    """ValueError unless the storage of a dense tensor holds all of its elements: it may have been freed."""
    if t.layout != torch.strided or t.device.type == "meta" or t.numel() == 0:
        return
    steps = zip(t.shape, t.stride(), strict=True)
    end = (t.storage_offset() + 1 + sum((n - 1) * step for n, step in steps)) * t.element_size()
    if end > t.untyped_storage().nbytes():
        raise ValueError(
            f"{name}: its storage of {t.untyped_storage().nbytes()} bytes does not hold the elements of shape "
            f"{tuple(t.shape)} and strides {t.stride()}; was it freed?"
        )


def check_linear_loss(
    grad_loss: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    reduction: int,
    label_smoothing: float,
    chunk_size: int,
    wanted: int,
) -> None:
    """ValueError unless `linear_cross_entropy_fwd` or its backward can run: arguments as in their schemas."""
    for name, needed in (("hidden", hidden), ("weight", weight), ("target", target)):
        if not isinstance(needed, Tensor) or needed.layout != torch.strided:
            raise ValueError(f"{name}: expected a dense tensor, got {getattr(needed, 'layout', 'none')}")
    if hidden.dim() != 2 or weight.dim() != 2:
        raise ValueError(f"hidden, weight: expected two dims, got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    rows, classes = hidden.shape[:1], weight.shape[:1]
    for name, t, shape, dtypes in (
        ("hidden", hidden, hidden.shape, (torch.float32, torch.bfloat16, torch.float16)),
        ("weight", weight, (*classes, hidden.shape[1]), (hidden.dtype,)),
        ("target", target, rows, (torch.int64,)),
        ("bias", bias, classes, (hidden.dtype,)),
        ("class_weight", class_weight, classes, (torch.float64, torch.float32, torch.bfloat16, torch.float16)),
        ("grad_loss", grad_loss, rows, (torch.float64, torch.float32, torch.bfloat16, torch.float16)),
    ):
        if t is None:
            continue
        if t.dtype not in dtypes or t.device != hidden.device:
            raise ValueError(f"{name}: expected {dtypes[0]} on {hidden.device}, got {t.dtype} on {t.device}")
        if t.layout != torch.strided:
            raise ValueError(f"{name}: expected a dense tensor, got {t.layout}")
        if t.shape != torch.Size(shape):
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(t.shape)}")
        check_memory(name, t)
    if not 0 <= reduction <= 2:
        raise ValueError(f"reduction: expected a value in [0, 2], got {reduction}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a value in [0, 1], got {label_smoothing}")
    if chunk_size < 0:
        raise ValueError(f"chunk_size: expected rows of a chunk, or 0, got {chunk_size}")
    if wanted & ~(3 if bias is None else 7):
        raise ValueError(f"wanted: bits {3 if bias is None else 7} may be set in this call, got {wanted}")

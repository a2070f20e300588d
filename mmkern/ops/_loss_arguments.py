"""Arguments of the losses over classes, checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkern.ops._checks import DTYPES, KERNEL_DTYPES, autocast_dtype, check_dense, check_device, check_memory, kind
from mmkern.ops._numbers import integer, probability
from mmkern.reference.gradients import bits
from mmkern.reference.linear_loss import DIFFERENTIABLE
from mmkern.reference.loss import MEAN, NONE, SUM

REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}


def loss_dtype(input: Tensor, *others: Tensor | None) -> torch.dtype:
    dtype = input.dtype
    for other in others:
        if other is not None:
            dtype = torch.promote_types(dtype, other.dtype)
    if dtype.itemsize < 4 and autocast_dtype(input) is not None:
        return torch.float32
    return dtype


def check_logits(t: Any, name: str) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
    check_dense(name, t)
    if not t.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {t.dtype}")
    if t.dim() == 0:
        raise ValueError(f"{name}: expected at least one dim, got shape ()")


def checked_target(target: Any, input: Tensor, ignore_index: int) -> Tensor:
    """`target` as int64 classes or as probabilities."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a Tensor, got {type(target).__name__}")
    check_dense("target", target)
    if target.dtype == torch.bool or target.is_complex():
        raise TypeError(f"target: expected classes (integers) or probabilities (floating point), got {target.dtype}")
    check_device("target", target, "input", input)
    if target.is_floating_point():
        if target.shape != input.shape:
            raise ValueError(
                f"target: expected probabilities of input's shape {tuple(input.shape)}, "
                f"got {tuple(target.shape)} {target.dtype}"
            )
        if ignore_index >= 0:
            raise ValueError(f"ignore_index: not for a target of probabilities, got {ignore_index}")
        return target
    shape = input.shape[:0] if input.dim() == 1 else (*input.shape[:1], *input.shape[2:])
    if target.shape != torch.Size(shape):
        raise ValueError(
            f"target: expected classes of shape {tuple(shape)} for input's {tuple(input.shape)}, "
            f"got {tuple(target.shape)} {target.dtype}"
        )
    return target.long()


def check_weight(name: str, weight: Any, classes: int, other: str, of_other: Tensor) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point Tensor, got {kind(weight)}")
    if weight.shape != (classes,):
        raise ValueError(f"{name}: expected shape ({classes},), one for each class, got {tuple(weight.shape)}")
    check_dense(name, weight)
    check_device(name, weight, other, of_other)


def checked_options(ignore_index: Any, reduction: Any, label_smoothing: Any) -> tuple[int, float]:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    return integer("ignore_index", ignore_index), probability("label_smoothing", label_smoothing)


def check_linear(hidden: Any, weight: Any, target: Any, bias: Any) -> None:
    for name, t in (("hidden", hidden), ("weight", weight), ("target", target), ("bias", bias)):
        if not isinstance(t, Tensor) and not (name == "bias" and t is None):
            raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
        if t is not None:
            check_dense(name, t)
    if not hidden.is_floating_point():
        raise TypeError(f"hidden: expected a floating-point dtype, got {hidden.dtype}")
    if hidden.dim() == 0:
        raise ValueError("hidden: expected shape (..., D), got ()")
    autocast = autocast_dtype(hidden) is not None
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != hidden.dtype and not (autocast and t.is_floating_point()):
            raise TypeError(f"{name}: expected hidden's {hidden.dtype}, got {t.dtype}")
        if t is not None:
            check_device(name, t, "hidden", hidden)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: expected (V, {hidden.shape[-1]}) for hidden's {tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected ({len(weight)},), one for each row of weight, got {tuple(bias.shape)}")
    if target.dtype == torch.bool or target.is_floating_point() or target.is_complex():
        raise TypeError(f"target: expected integer classes, got {target.dtype}")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"target: expected {tuple(hidden.shape[:-1])} for hidden's {tuple(hidden.shape)}, got {tuple(target.shape)}"
        )
    check_device("target", target, "hidden", hidden)


def check_linear_border(
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
    """What the C++ border asks of tensors (csrc/cpu/check.h): ValueError unless an operator can run."""
    for name, needed in (("hidden", hidden), ("weight", weight), ("target", target)):
        if not isinstance(needed, Tensor) or needed.layout != torch.strided:
            raise ValueError(f"{name}: expected a dense tensor, got {getattr(needed, 'layout', 'none')}")
    if hidden.dim() != 2 or weight.dim() != 2:
        raise ValueError(f"hidden, weight: expected two dims, got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    rows, classes = hidden.shape[:1], weight.shape[:1]
    for name, t, shape, dtypes in (
        ("hidden", hidden, hidden.shape, KERNEL_DTYPES),
        ("weight", weight, (*classes, hidden.shape[1]), (hidden.dtype,)),
        ("target", target, rows, (torch.int64,)),
        ("bias", bias, classes, (hidden.dtype,)),
        ("class_weight", class_weight, classes, DTYPES),
        ("grad_loss", grad_loss, rows, DTYPES),
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
    most = bits(DIFFERENTIABLE, [name for name in DIFFERENTIABLE if name != "bias" or bias is not None])
    if wanted & ~most:
        raise ValueError(f"wanted: bits {most} may be set in this call, got {wanted}")


def check_classes(target: Tensor, classes: int) -> None:
    if target.numel():
        low, high = (int(t) for t in target.aminmax())
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise IndexError(f"target: expected classes in [0, {classes}) or ignore_index, got {wrong}")

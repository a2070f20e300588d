"""Cross-entropy, from logits or straight from the last hidden layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from mmkern import reference
from mmkern.ops._autograd import Late
from mmkern.ops._numbers import integer, probability
from mmkern.ops.dispatch import Op, Refusal, Values, autocast_dtype, by_value, check_dense
from mmkern.reference.gradients import formula_gradients

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def _refuse(input: Tensor, target: Tensor, *_: object) -> str | None:
    for t in (input, target):
        if t.dtype not in _KERNEL_DTYPES and t.dtype != torch.int64:
            return f"the kernels take float32, bfloat16 and float16, not {t.dtype}"
    return None


_SCALES: dict[str, Refusal] = dict.fromkeys(("cpu", "triton"), lambda grad, *_: _refuse(grad, grad))


def _fake(
    input: Tensor,
    target: Tensor,
    weight: Any,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    wide: bool,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float32 if wide and input.dtype.itemsize < 4 else input.dtype
    shape = input.shape[2:] if input.dim() == 1 else (input.shape[0], *input.shape[2:])
    soft = target.is_floating_point()
    half = torch.float16 in (input.dtype, target.dtype) and wanted != 0
    return (
        input.new_empty(shape if reduction == 0 else (), dtype=dtype),
        _like(input.contiguous() if soft else input) if wanted & 1 else input.new_empty(0),
        target.new_empty(target.shape if wanted & 2 else 0),
        input.new_empty(int(half), dtype=torch.float32),
    )


def _like(x: Tensor) -> Tensor:
    """What the kernel allocates for a gradient of x (csrc/cpu/loss/cross_entropy.cpp: layout_of, new_gradient)."""
    if x.dim() == 1:
        return x.new_empty(x.shape)
    inner = [(n, step) for n, step in zip(x.shape[2:], x.stride()[2:], strict=True) if n != 1]
    if any(step != n * after for (_, step), (n, after) in pairwise(inner)):
        x = x.contiguous()
        inner = [(n, step) for n, step in zip(x.shape[2:], x.stride()[2:], strict=True) if n != 1]
    if x.stride(1) == 1 or x.shape[1] <= 1:
        return x.new_empty((x.shape[0], *x.shape[2:], x.shape[1])).movedim(-1, 1)
    if not inner:
        if x.stride(0) != 1:
            return x.new_empty(x.shape)
        return x.new_empty((x.shape[1], x.shape[0])).t().view(x.shape)
    return x.new_empty(x.shape)


_scale = Op(
    "cross_entropy_bwd(Tensor grad, Tensor grad_loss, Tensor? unit) -> Tensor",
    reference=reference.cross_entropy_backward,
    fake=lambda grad, grad_loss, unit: _like(grad),
    kernels=_SCALES,
    triton="loss.cross_entropy_bwd",
)
_scale_ = Op(
    "cross_entropy_bwd_(Tensor(a!) grad, Tensor grad_loss, Tensor? unit) -> ()",
    reference=reference.cross_entropy_backward_,
    fake=lambda grad, grad_loss, unit: None,
    kernels=_SCALES,
    triton="loss.cross_entropy_bwd_",
)


def _backward(grads: Values, args: Values, outputs: Values, wanted: Sequence[bool]) -> list[Tensor | None]:
    grad_loss, saved, unit = grads[0], outputs[1:3], outputs[3]
    plain = [*args[:-1], 0]  # the formula of the loss alone
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # to be differentiated again
        return formula_gradients(reference.cross_entropy_loss, [grad_loss], plain, wanted)
    found: list[Tensor | None] = [None] * len(args)
    if wanted[2]:
        found = formula_gradients(reference.cross_entropy_loss, [grad_loss], plain, [i == 2 for i in range(len(args))])
    if grad_loss.dim() and (target := args[1]) is not None and not target.is_floating_point():
        grad_loss = grad_loss.masked_fill(target == args[3], 0.0)  # 0 * inf is not 0
    for i, gradient in enumerate(saved):
        if wanted[i]:
            found[i] = _scaled(gradient, grad_loss, unit)
    return found


def _scaled(saved: Tensor, grad_loss: Tensor, unit: Tensor | None) -> Tensor:
    """saved * grad_loss / unit, in place where the graph is freed after this, so that nobody can read saved again."""
    if not by_value(saved, grad_loss) or torch._C._autograd._get_current_graph_task_keep_graph():
        return _scale(saved, grad_loss, unit)
    if unit is not None or grad_loss.dim() > 0 or not grad_loss.is_cpu or grad_loss.item() != 1.0:
        _scale_(saved, grad_loss, unit)
    return saved


def _save(args: Values, outputs: Values, wanted: Sequence[bool]) -> tuple[Values, Values]:
    input, target, weight = args[:3]
    kept = *wanted[:2], torch.float16 in (input.dtype, target.dtype)
    if not wanted[2]:  # the gradients are here already: the formula is for those of second order
        mask = args[4] == 0 and not target.is_floating_point()
        args = Late(input), target if mask else Late(target), None if weight is None else Late(weight), *args[3:]
    return args, (None, *(t if keep else None for t, keep in zip(outputs[1:], kept, strict=True)))


def _wanted(args: Values) -> int:
    return args[0].requires_grad + 2 * (args[1].is_floating_point() and args[1].requires_grad)


_cross_entropy = Op(
    "cross_entropy_fwd(Tensor input, Tensor target, Tensor? weight, int ignore_index, int reduction, "
    "float label_smoothing, bool wide, int wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.cross_entropy,
    fake=_fake,
    kernels={"cpu": _refuse, "triton": _refuse},
    triton="loss.cross_entropy_fwd",
    backward=_backward,
    save=_save,
    hidden=_wanted,
)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of logits, as `torch.nn.functional.cross_entropy`, with its gradient in the same pass.

    Args:
        input: logits (C), (N, C) or (N, C, d1, ...); float32, bfloat16, float16 or float64. Never written.
        target: classes, integers of input's shape without C; or probabilities of input's shape, floating point.
        weight: (C), a factor for each class.
        ignore_index: rows of this target count for nothing: loss 0, gradient 0, whatever they hold. For classes only.
        reduction: "none"; "mean" (over the weights of the targets, or over N with probabilities); "sum".
        label_smoothing: in [0, 1], how much of the target is spread over all classes evenly.

    Returns:
        A number, or with "none" a tensor of input's shape without C. Input's dtype (promoted with the target's and
        weight's, where the target holds probabilities); float32 under autocast. A mean over nothing is NaN.

    Raises:
        TypeError: a dtype or the kind of an argument is wrong.
        ValueError: shapes or devices do not agree, or reduction or label_smoothing is out of range.
        IndexError: a target is neither a class nor ignore_index.

    The gradient of input is kept from the forward pass, in input's dtype; backward multiplies it by the loss's own
    gradient. Differentiated twice, and for a gradient of weight, the reference formula runs.

    Example:
        >>> import mmkern, torch
        >>> mmkern.cross_entropy(torch.zeros(2, 4), torch.tensor([1, 3]))
        tensor(1.3863)
    """
    if has_torch_function_variadic(input, target, weight):
        options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
        }
        return handle_torch_function(cross_entropy, (input, target, weight), input, target, weight, **options)
    _check_logits(input, "input")
    ignore_index, label_smoothing = _checked_options(ignore_index, reduction, label_smoothing)
    target = _check_target(target, input, ignore_index)
    soft = target.is_floating_point()
    if weight is not None:
        _check_weight("weight", weight, input, input.shape[min(1, input.dim() - 1)])
    dtype = _loss_dtype(input, target if soft else None, weight if soft else None)
    wide = dtype != input.dtype
    args = input, target, weight, ignore_index, _REDUCTIONS[reduction], label_smoothing, wide, 0
    return _cross_entropy(*args).to(dtype)


def _loss_dtype(input: Tensor, *others: Tensor | None) -> torch.dtype:
    dtype = input.dtype
    for other in others:
        if other is not None:
            dtype = torch.promote_types(dtype, other.dtype)
    if dtype.itemsize < 4 and autocast_dtype(input) is not None:
        return torch.float32
    return dtype


def _check_logits(t: Any, name: str) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
    check_dense(name, t)
    if not t.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {t.dtype}")
    if t.dim() == 0:
        raise ValueError(f"{name}: expected at least one dim, got shape ()")


def _check_target(target: Any, input: Tensor, ignore_index: int) -> Tensor:
    """`target` as int64 classes or as probabilities."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a Tensor, got {type(target).__name__}")
    check_dense("target", target)
    if target.dtype == torch.bool or target.is_complex():
        raise TypeError(f"target: expected classes (integers) or probabilities (floating point), got {target.dtype}")
    if target.device != input.device:
        raise ValueError(f"target: on device {target.device} where input is on {input.device}")
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


def _check_weight(name: str, weight: Any, input: Tensor, classes: int) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{name}: expected a floating-point Tensor, got {kind}")
    if weight.shape != (classes,):
        raise ValueError(f"{name}: expected shape ({classes},), one for each class, got {tuple(weight.shape)}")
    check_dense(name, weight)
    if weight.device != input.device:
        raise ValueError(f"{name}: on device {weight.device} where input is on {input.device}")


def _checked_options(ignore_index: Any, reduction: Any, label_smoothing: Any) -> tuple[int, float]:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    return integer("ignore_index", ignore_index), probability("label_smoothing", label_smoothing)

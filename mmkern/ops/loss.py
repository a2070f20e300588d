"""Cross-entropy, from logits or straight from the last hidden layer."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from mmkern import reference
from mmkern.ops._autograd import Late, Values
from mmkern.ops._checks import by_value
from mmkern.ops._loss_arguments import (
    REDUCTIONS,
    check_logits,
    check_weight,
    checked_options,
    checked_target,
    loss_dtype,
)
from mmkern.ops.dispatch import CPU, TRITON, Kernel, Op
from mmkern.reference.gradients import formula_gradients, of_bits
from mmkern.reference.loss import IN_FORWARD, NONE


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
    asked = of_bits(IN_FORWARD, wanted)
    half = torch.float16 in (input.dtype, target.dtype) and wanted != 0
    return (
        input.new_empty(shape if reduction == 0 else (), dtype=dtype),
        _like(input.contiguous() if soft else input) if "input" in asked else input.new_empty(0),
        target.new_empty(target.shape if "target" in asked else 0),
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
    kernels=[Kernel(CPU), Kernel(TRITON, "loss.cross_entropy_bwd")],
    dtype_of=["grad"],
)
_scale_ = Op(
    "cross_entropy_bwd_(Tensor(a!) grad, Tensor grad_loss, Tensor? unit) -> ()",
    reference=reference.cross_entropy_backward_,
    fake=lambda grad, grad_loss, unit: None,
    kernels=[Kernel(CPU), Kernel(TRITON, "loss.cross_entropy_bwd_")],
    dtype_of=["grad"],
)


def _backward(grads: Values, args: Any, outputs: Values, wanted: Collection[str]) -> dict[str, Tensor]:
    grad_loss, unit = grads[0], outputs[3]
    again = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # these are to be differentiated
    found: dict[str, Tensor] = {}
    if again or "weight" in wanted:
        plain = args._replace(wanted=0)  # the formula of the loss alone
        asked = wanted if again else ["weight"]
        found = formula_gradients(reference.cross_entropy_loss, [grad_loss], plain, asked)
        if again:
            return found
    if grad_loss.dim() and (target := args.target) is not None and not target.is_floating_point():
        grad_loss = grad_loss.masked_fill(target == args.ignore_index, 0.0)  # 0 * inf is not 0
    for name, gradient in zip(IN_FORWARD, outputs[1:3], strict=True):
        if name in wanted:
            found[name] = _scaled(gradient, grad_loss, unit)
    return found


def _scaled(saved: Tensor, grad_loss: Tensor, unit: Tensor | None) -> Tensor:
    """saved * grad_loss / unit, in place where the graph is freed after this, so that nobody can read saved again."""
    if not by_value(saved, grad_loss) or torch._C._autograd._get_current_graph_task_keep_graph():
        return _scale(saved, grad_loss, unit)
    if unit is not None or grad_loss.dim() > 0 or not grad_loss.is_cpu or grad_loss.item() != 1.0:
        _scale_(saved, grad_loss, unit)
    return saved


def _save(args: Any, outputs: Values, wanted: Collection[str]) -> tuple[Values, Values]:
    input, target, weight = args.input, args.target, args.weight
    _, *gradients, unit = outputs
    kept = [gradient if name in wanted else None for name, gradient in zip(IN_FORWARD, gradients, strict=True)]
    if "weight" not in wanted:  # the gradients are here already: the formula is for those of second order
        mask = args.reduction == NONE and not target.is_floating_point()
        late = None if weight is None else Late(weight)
        args = args._replace(input=Late(input), target=target if mask else Late(target), weight=late)
    return args, (None, *kept, unit if torch.float16 in (input.dtype, target.dtype) else None)


_cross_entropy = Op(
    "cross_entropy_fwd(Tensor input, Tensor target, Tensor? weight, int ignore_index, int reduction, "
    "float label_smoothing, bool wide, int wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.cross_entropy,
    fake=_fake,
    kernels=[Kernel(CPU), Kernel(TRITON, "loss.cross_entropy_fwd")],
    dtype_of=["input", "target"],
    backward=_backward,
    save=_save,
    hidden=lambda args: IN_FORWARD,
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
    check_logits(input, "input")
    ignore_index, label_smoothing = checked_options(ignore_index, reduction, label_smoothing)
    target = checked_target(target, input, ignore_index)
    soft = target.is_floating_point()
    if weight is not None:
        check_weight("weight", weight, input.shape[min(1, input.dim() - 1)], "input", input)
    dtype = loss_dtype(input, target if soft else None, weight if soft else None)
    wide = dtype != input.dtype
    args = input, target, weight, ignore_index, REDUCTIONS[reduction], label_smoothing, wide, 0
    return _cross_entropy(*args).to(dtype)

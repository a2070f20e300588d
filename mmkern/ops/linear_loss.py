"""Cross-entropy of a linear layer's logits, which are never held all at once."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from mmkern import reference
from mmkern.ops._autograd import Late, Values
from mmkern.ops._checks import autocast_dtype, by_value
from mmkern.ops._choice import leave_threads
from mmkern.ops._linear_chunks import (
    backward_in_chunks,
    divisor_of,
    forward_in_chunks,
    rows_at_a_time,
)
from mmkern.ops._loss_arguments import REDUCTIONS, check_linear, check_weight, checked_options
from mmkern.ops._numbers import integer
from mmkern.ops.dispatch import CPU, TRITON, Kernel, Op
from mmkern.reference.gradients import bits, formula_gradients, in_order, of_bits
from mmkern.reference.linear_loss import DIFFERENTIABLE, kept_dtype
from mmkern.reference.loss import MEAN, NONE


def _fake_gradients(hidden: Tensor, weight: Tensor, wanted: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    shapes = {"hidden": hidden.shape, "weight": weight.shape, "bias": weight.shape[:1]}
    found = {name: hidden.new_empty(shapes[name], dtype=dtype) for name in of_bits(DIFFERENTIABLE, wanted)}
    return in_order(DIFFERENTIABLE, found, hidden.new_empty(0, dtype=dtype))


def _fake(*values: Any) -> tuple[Tensor, ...]:
    args = _linear_cross_entropy.record._make(values)
    dtype = torch.promote_types(args.hidden.dtype, torch.float32)
    loss = args.hidden.new_empty(args.target.shape if args.reduction == NONE else (), dtype=dtype)
    return loss, *_fake_gradients(args.hidden, args.weight, args.wanted, kept_dtype(args.hidden))


def _fake_backward(*values: Any) -> tuple[Tensor, ...]:
    args = _rows_backward.record._make(values)
    return _fake_gradients(args.hidden, args.weight, args.wanted, args.hidden.dtype)


_ARGUMENTS = "Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, int ignore_index, "


def _backward_twice(grads: Values, args: Any, outputs: Values, wanted: Collection[str]) -> dict[str, Tensor]:
    """Through the formula, a chunk of rows at a time."""
    parts: dict[str, list[Tensor]] = {"grad_loss": [], "hidden": []}  # gradients that have rows
    found: dict[str, Tensor] = {}
    step = rows_at_a_time(len(args.weight), 4, args.chunk_size)
    for start in range(0, len(args.hidden), step):
        rows = slice(start, start + step)
        of_part = [grads[0] if grads[0] is None else grads[0][rows], *grads[1:]]
        part = args._replace(grad_loss=args.grad_loss[rows], hidden=args.hidden[rows], target=args.target[rows])
        gradients = formula_gradients(reference.linear_cross_entropy_backward, of_part, part, wanted)
        for name, gradient in gradients.items():
            if name in parts:
                parts[name].append(gradient)
            else:
                found[name] = found[name] + gradient if name in found else gradient.double()
    found |= {name: torch.cat(several) for name, several in parts.items() if several}
    return {name: gradient.to(getattr(args, name).dtype) for name, gradient in found.items()}


_rows_backward = Op(
    f"linear_cross_entropy_bwd(Tensor grad_loss, {_ARGUMENTS}float label_smoothing, int chunk_size, int wanted) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.linear_cross_entropy_backward,
    fake=_fake_backward,
    kernels=[Kernel(CPU, backward_in_chunks), Kernel(TRITON, backward_in_chunks)],
    dtype_of=["hidden"],
    backward=_backward_twice,
    save=lambda args, outputs, wanted: (args, (None, None, None)),
)


def _backward(grads: Values, args: Any, outputs: Values, wanted: Collection[str]) -> dict[str, Tensor]:
    (grad_loss,) = grads
    if args.reduction == NONE or (torch.is_grad_enabled() and not torch.compiler.is_compiling()):
        if args.reduction == MEAN:
            divisor = divisor_of(args.target, args.class_weight, args.ignore_index)
            grad_loss = (grad_loss / divisor).to(grad_loss.dtype)
        given = args._replace(wanted=bits(DIFFERENTIABLE, wanted))._asdict()
        del given["reduction"]
        gradients = _rows_backward(grad_loss.expand(args.target.shape), *given.values())
        return {name: gradient for name, gradient in zip(DIFFERENTIABLE, gradients, strict=True) if name in wanted}
    saved = zip(DIFFERENTIABLE, outputs[1:], strict=True)
    return {name: _scaled(gradient, grad_loss).to(outputs[0].dtype) for name, gradient in saved if name in wanted}


def _scaled(saved: Tensor, grad_loss: Tensor) -> Tensor:
    """saved * grad_loss, in place where the graph is freed after this, so that nobody can read saved again."""
    if not by_value(saved, grad_loss) or torch._C._autograd._get_current_graph_task_keep_graph():
        return saved * grad_loss
    return saved if grad_loss.is_cpu and grad_loss.item() == 1.0 else saved.mul_(grad_loss)


def _save(args: Any, outputs: Values, wanted: Collection[str]) -> tuple[Values, Values]:
    """The gradients, where they are here already; in place of the loss something of hidden's dtype."""
    outputs = args.hidden.new_empty(0), *outputs[1:]
    if args.reduction != NONE:
        tensors = ("hidden", "weight", "target", "bias", "class_weight")
        args = args._replace(**{name: Late(getattr(args, name)) for name in tensors})
    return args, outputs


_linear_cross_entropy = Op(
    f"linear_cross_entropy_fwd({_ARGUMENTS}int reduction, float label_smoothing, int chunk_size, int wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.linear_cross_entropy,
    fake=_fake,
    kernels=[Kernel(CPU, forward_in_chunks), Kernel(TRITON, forward_in_chunks)],
    dtype_of=["hidden"],
    backward=_backward,
    save=_save,
    hidden=lambda args: () if args.reduction == NONE else DIFFERENTIABLE,
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
) -> Tensor:
    """cross_entropy(hidden @ weight^T + bias, target), a chunk of rows at a time: never all logits in memory.

    Args:
        hidden: (..., D), float32, bfloat16, float16 or float64.
        weight: (V, D), as torch.nn.Linear and embeddings hold it; hidden's dtype.
        target: (...), integer classes in [0, V), or ignore_index: such a row is not even multiplied.
        bias: (V), hidden's dtype.
        class_weight: (V), a factor for each class; no gradient.
        ignore_index, reduction, label_smoothing: see `cross_entropy`.
        chunk_size: rows at a time; by default what keeps their logits at 32 MiB, and the gradient of these at as much.

    Returns:
        A number, or with "none" a tensor of target's shape, in hidden's dtype; float32 under autocast.

    Raises:
        TypeError: a dtype or the kind of an argument is wrong.
        ValueError: shapes or devices do not agree, or a number is out of range.
        IndexError: a target is neither a class nor ignore_index.

    Gradients of a reduced loss are computed with it and kept: backward only multiplies them. Those of "none" are
    computed in backward, from new logits. Sums over chunks lose no digits, however many there are.

    Source: Hsu et al., Liger Kernel, 2024.

    Example:
        >>> import mmkern, torch
        >>> mmkern.linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([1, 3]))
        tensor(1.3863)
    """
    if has_torch_function_variadic(hidden, weight, target, bias, class_weight):
        return handle_torch_function(
            linear_cross_entropy, (hidden, weight, target, bias, class_weight), hidden, weight, target, bias,
            class_weight=class_weight, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing, chunk_size=chunk_size,
        )  # fmt: skip
    if not torch.compiler.is_compiling():
        leave_threads()
    check_linear(hidden, weight, target, bias)
    if class_weight is not None:
        check_weight("class_weight", class_weight, len(weight), "hidden", hidden)
        if class_weight.requires_grad and torch.is_grad_enabled():
            raise ValueError("class_weight: requires grad, which has no gradient here")
    ignore_index, label_smoothing = checked_options(ignore_index, reduction, label_smoothing)
    if chunk_size is not None and (chunk_size := integer("chunk_size", chunk_size)) < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    dtype = hidden.dtype
    if (cast := autocast_dtype(hidden)) is not None and dtype != torch.float64:
        dtype = torch.float32
        hidden, weight, bias = hidden.to(cast), weight.to(cast), None if bias is None else bias.to(cast)
    if bias is not None and reduction == "none" and torch.is_grad_enabled():
        bias = bias.clone()  # backward reads it, where torch's formula does not: the caller may write into his own
    loss = _linear_cross_entropy(
        hidden.flatten(0, -2) if hidden.dim() > 1 else hidden[None],
        weight,
        target.reshape(-1).long(),
        bias,
        class_weight,
        ignore_index,
        REDUCTIONS[reduction],
        label_smoothing,
        chunk_size or 0,
        0,
    )
    return (loss.view(target.shape) if reduction == "none" else loss).to(dtype)

"""Cross-entropy of a linear layer's logits, which are never held all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from mmkern import reference
from mmkern.ops._autograd import Late
from mmkern.ops._linear_chunks import (
    MEAN,
    NONE,
    chunked,
    chunked_on_gpu,
    divisor_of,
    gpu_divisor,
    rows_at_a_time,
)
from mmkern.ops._memory import check_linear_loss
from mmkern.ops._numbers import integer
from mmkern.ops.dispatch import (
    Op,
    Refusal,
    Values,
    _library,
    _state,
    autocast_dtype,
    by_value,
    check_dense,
    leave_threads,
)
from mmkern.ops.loss import _REDUCTIONS, _check_weight, _checked_options
from mmkern.reference.gradients import formula_gradients
from mmkern.reference.linear_loss import kept_dtype

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _refuse(hidden: Tensor, *_: object) -> str | None:
    if hidden.dtype not in _KERNEL_DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {hidden.dtype}"
    return None


_KERNELS: dict[str, Refusal] = {"cpu": _refuse, "triton": _refuse}


def _chunks(hidden: Tensor) -> Callable[..., tuple[Tensor, list[Tensor]]]:
    return chunked if hidden.is_cpu and not _state.interpreting else chunked_on_gpu


def _forward(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    class_weight, _, *options = rest
    check_linear_loss(None, hidden, weight, target, bias, class_weight, *options)
    leave_threads()
    with torch.autocast(hidden.device.type, enabled=False):
        loss, found = _chunks(hidden)(None, hidden, weight, target, bias, *rest)
        return loss, *(g.to(kept_dtype(hidden)) for g in found)


def _backward_none(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    *rest: Any,
) -> tuple[Tensor, ...]:
    if grad_loss is None:
        raise ValueError("grad_loss: expected a tensor, got None")
    check_linear_loss(grad_loss, hidden, weight, target, bias, class_weight, NONE, *rest)
    leave_threads()
    with torch.autocast(hidden.device.type, enabled=False):
        options = class_weight, ignore_index, NONE, *rest
        _, found = _chunks(hidden)(grad_loss.contiguous(), hidden, weight, target, bias, *options)
        return tuple(g.to(hidden.dtype) for g in found)


def _fake_gradients(hidden: Tensor, weight: Tensor, wanted: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    new = [hidden.new_empty(shape if wanted & 1 << i else 0, dtype=dtype) for i, shape in enumerate(shapes)]
    return new[0], new[1], new[2]


def _fake(hidden: Tensor, weight: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, reduction, _, _, wanted = rest
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    loss = hidden.new_empty(target.shape if reduction == NONE else (), dtype=dtype)
    return loss, *_fake_gradients(hidden, weight, wanted, kept_dtype(hidden))


_ARGUMENTS = "Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, int ignore_index, "


def _backward_twice(grads: Values, args: Values, outputs: Values, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Through the formula, a chunk of rows at a time."""
    grad_loss, hidden, weight, target, bias, *rest = args
    found: list[Any] = [None] * len(args)
    parts: list[list[Tensor]] = [[], []]  # of grad_loss and hidden, which have rows
    step = rows_at_a_time(len(weight), 4, rest[-2])
    for start in range(0, len(hidden), step):
        rows = slice(start, start + step)
        of_part = [grads[0] if grads[0] is None else grads[0][rows], *grads[1:]]
        part = [grad_loss[rows], hidden[rows], weight, target[rows], bias, *rest]
        gradients = formula_gradients(reference.linear_cross_entropy_backward, of_part, part, wanted)
        for i, gradient in enumerate(gradients):
            if gradient is not None and i < 2:
                parts[i].append(gradient)
            elif gradient is not None:
                found[i] = gradient.double() if found[i] is None else found[i] + gradient
    for i, several in enumerate(parts):
        found[i] = torch.cat(several) if several else None
    return [g if g is None else g.to(a.dtype) for g, a in zip(found, args, strict=True)]


_rows_backward = Op(
    f"linear_cross_entropy_bwd(Tensor grad_loss, {_ARGUMENTS}float label_smoothing, int chunk_size, int wanted) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.linear_cross_entropy_backward,
    fake=lambda grad_loss, hidden, weight, *rest: _fake_gradients(hidden, weight, rest[-1], hidden.dtype),
    kernels=dict.fromkeys(("cpu", "triton"), lambda grad_loss, hidden, *_: _refuse(hidden)),
    triton=_backward_none,
    backward=_backward_twice,
    save=lambda args, outputs, wanted: (args, (None, None, None)),
)


def _backward(grads: Values, args: Values, outputs: Values, wanted: Sequence[bool]) -> list[Tensor | None]:
    hidden, weight, target, bias, class_weight, ignore_index, reduction, *rest = args
    (grad_loss,), places = grads, (0, 1, 3)
    found: list[Tensor | None] = [None] * len(args)
    if reduction == NONE or (torch.is_grad_enabled() and not torch.compiler.is_compiling()):
        if reduction == MEAN:
            if target.is_cpu and by_value(target) and not _state.interpreting:
                grad_loss = grad_loss / torch.tensor(divisor_of(target[target != ignore_index], class_weight))
            else:
                grad_loss = (grad_loss / gpu_divisor(target, class_weight, ignore_index)).to(grad_loss.dtype)
        bits = sum(wanted[i] << bit for bit, i in enumerate(places))
        options = class_weight, ignore_index, *rest[:-1], bits
        gradients = _rows_backward(grad_loss.expand(target.shape), hidden, weight, target, bias, *options)
        for i, gradient in zip(places, gradients, strict=True):
            found[i] = gradient if wanted[i] else None
        return found
    for i, saved in zip(places, outputs[1:], strict=True):
        if wanted[i]:
            found[i] = _scaled(saved, grad_loss).to(outputs[0].dtype)
    return found


def _scaled(saved: Tensor, grad_loss: Tensor) -> Tensor:
    """saved * grad_loss, in place where the graph is freed after this, so that nobody can read saved again."""
    if not by_value(saved, grad_loss) or torch._C._autograd._get_current_graph_task_keep_graph():
        return saved * grad_loss
    return saved if grad_loss.is_cpu and grad_loss.item() == 1.0 else saved.mul_(grad_loss)


def _save(args: Values, outputs: Values, wanted: Sequence[bool]) -> tuple[Values, Values]:
    """The gradients, where they are here already; in place of the loss something of hidden's dtype."""
    outputs = args[0].new_empty(0), *outputs[1:]
    if args[6] == NONE:
        return args, outputs
    return (*(Late(t) for t in args[:5]), *args[5:]), outputs


def _wanted(args: Values) -> int:
    if args[6] == NONE:
        return 0
    return sum((t is not None and t.requires_grad) << bit for bit, t in enumerate((args[0], args[1], args[3])))


_linear_cross_entropy = Op(
    f"linear_cross_entropy_fwd({_ARGUMENTS}int reduction, float label_smoothing, int chunk_size, int wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.linear_cross_entropy,
    fake=_fake,
    kernels=_KERNELS,
    triton=_forward,
    backward=_backward,
    save=_save,
    hidden=_wanted,
)
_library.impl("linear_cross_entropy_fwd", _forward, "CPU")
_library.impl("linear_cross_entropy_bwd", _backward_none, "CPU")


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
    _check(hidden, weight, target, bias)
    if class_weight is not None:
        _check_weight("class_weight", class_weight, hidden, len(weight))
        if class_weight.requires_grad and torch.is_grad_enabled():
            raise ValueError("class_weight: requires grad, which has no gradient here")
    ignore_index, label_smoothing = _checked_options(ignore_index, reduction, label_smoothing)
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
        _REDUCTIONS[reduction],
        label_smoothing,
        chunk_size or 0,
        0,
    )
    return (loss.view(target.shape) if reduction == "none" else loss).to(dtype)


def _check(hidden: Any, weight: Any, target: Any, bias: Any) -> None:
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
        if t is not None and t.device != hidden.device:
            raise ValueError(f"{name}: on device {t.device} where hidden is on {hidden.device}")
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
    if target.device != hidden.device:
        raise ValueError(f"target: on device {target.device} where hidden is on {hidden.device}")

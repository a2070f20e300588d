"""Cross-entropy of a linear layer's logits, which are never held all at once."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from mmkern import reference
from mmkern.ops._memory import check_linear_loss
from mmkern.ops.dispatch import Op, Refusal, Values, _library, _state, _transformed
from mmkern.ops.loss import _REDUCTIONS, _check_options, _check_weight, _cross_entropy, _scale_
from mmkern.reference.gradients import formula_gradients
from mmkern.reference.linear_loss import kept_dtype

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NONE, _MEAN, _SUM = range(3)
_BUDGET = 32 << 20  # bytes of a chunk's logits, and of their gradient: larger ones are no faster
_GPU_BUDGET = 256 << 20  # a matmul of fewer rows leaves a GPU idle
_BLOCK = 1024  # rows of weight whose gradient is added at a time
_FEWEST_ROWS = 16  # of a chunk: fewer would read the whole weight for too little work


def _refuse(hidden: Tensor, *_: object) -> str | None:
    if hidden.dtype not in _KERNEL_DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {hidden.dtype}"
    return None


_KERNELS: dict[str, Refusal] = {"cpu": _refuse, "triton": _refuse}


def _rows(classes: int, itemsize: int, chunk_size: int, budget: int = _BUDGET) -> int:
    return chunk_size or max(_FEWEST_ROWS, budget // (max(1, classes) * itemsize))


@torch.no_grad()
def _chunked(
    grad_loss: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    chunk_size: int,
    wanted: int,
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradients for hidden, weight and bias: summed in float32, or for hidden in kept_dtype.

    A chunk of rows at a time: logits by torch's matmul, loss and gradient of them by one kernel, and two matmuls.
    torch's float16 matmul runs 300 times slower than its float32 one on CPU, so float16 is widened. grad_loss: that of
    each row's loss; None: 1 for all, of the reduced loss.
    """
    rows, half = len(hidden), hidden.dtype == torch.float16
    kept = (target != ignore_index).nonzero().squeeze(1)
    whole = len(kept) == rows
    h, y = (hidden, target) if whole else (hidden[kept], target[kept])
    _check_classes(y, len(weight))
    # Of a mean over nothing only the loss is NaN: there are no rows to scale.
    divisor = _divisor(y, class_weight).item() if reduction == _MEAN else 1.0
    factor = 1.0 / divisor if divisor else inf
    losses = hidden.new_zeros(rows if reduction == _NONE else (), dtype=torch.float32)
    new = hidden.new_zeros if len(h) < rows or rows == 0 else hidden.new_empty
    grad_hidden = new(hidden.shape if wanted & 1 else 0, dtype=kept_dtype(hidden))
    grad_weight = hidden.new_zeros(weight.shape if wanted & 2 and len(h) == 0 else 0, dtype=torch.float32)
    grad_bias = hidden.new_zeros(len(weight) if wanted & 4 else 0, dtype=torch.float32)
    w, b = (weight.float(), None if bias is None else bias.float()) if half else (weight, bias)
    step = _rows(len(weight), w.element_size(), chunk_size)
    buffer = w.new_empty(min(step, len(h)), len(weight))
    for start in range(0, len(h), step):
        part = h[start : start + step].to(w.dtype)
        place = slice(start, start + len(part)) if whole else kept[start : start + step]
        logits = buffer[: len(part)]
        if b is None:
            torch.mm(part, w.t(), out=logits)
        else:
            torch.addmm(b, part, w.t(), out=logits)
        options = ignore_index, reduction and _SUM, label_smoothing, True, int(wanted > 0)
        loss, grad, *_ = torch.ops.mmkern.cross_entropy_fwd(logits, y[start : start + step], class_weight, *options)
        if reduction == _NONE:
            losses[place] = loss
        else:
            losses += loss
        if wanted == 0:
            continue
        if grad_loss is not None:
            torch.ops.mmkern.cross_entropy_bwd_(grad, grad_loss[place], None)
        if wanted & 1 and whole:
            torch.addmm(grad_hidden[:1], grad, w, beta=0, alpha=factor, out=grad_hidden[place])
        elif wanted & 1:
            grad_hidden[place] = (grad @ w).mul_(factor)
        if wanted & 2 and start == 0:
            grad_weight = torch.addmm(weight[:1].to(w.dtype), grad.t(), part, beta=0, alpha=factor)
            if len(h) > step:
                grad_weight = grad_weight.float()
        elif wanted & 2 and grad.dtype == torch.float32:
            grad_weight.addmm_(grad.t(), part, alpha=factor)
        elif wanted & 2:
            more = torch.addmm(weight[:1], grad.t(), part, beta=0, alpha=factor)
            # torch adds two dtypes by copying one to the other's first: block by block the copy stays in cache.
            for into, block in zip(grad_weight.split(_BLOCK), more.split(_BLOCK), strict=True):
                into.add_(block)
        if wanted & 4:
            grad_bias.add_(grad.sum(0, dtype=torch.float32), alpha=factor)
    return losses / divisor if reduction == _MEAN else losses, [grad_hidden, grad_weight, grad_bias]


@torch.no_grad()
def _chunked_on_gpu(
    grad_loss: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    chunk_size: int,
    wanted: int,
) -> tuple[Tensor, list[Tensor]]:
    """`_chunked` without a value that the host would have to wait for: ignored rows are multiplied too, by 0."""
    rows, classes = len(hidden), len(weight)
    losses = hidden.new_zeros(rows if reduction == _NONE else (), dtype=torch.float32)
    grad_hidden = hidden.new_empty(hidden.shape if wanted & 1 else 0, dtype=kept_dtype(hidden))
    grad_weight = hidden.new_zeros(weight.shape if wanted & 2 else 0, dtype=torch.float32)
    grad_bias = hidden.new_zeros(classes if wanted & 4 else 0, dtype=torch.float32)
    step = _rows(classes, weight.element_size(), chunk_size, _GPU_BUDGET)
    buffer = weight.new_empty(min(step, rows), classes)
    for start in range(0, rows, step):
        place = slice(start, min(start + step, rows))
        part, logits = hidden[place], buffer[: place.stop - start]
        if bias is None:
            torch.mm(part, weight.t(), out=logits)
        else:
            torch.addmm(bias, part, weight.t(), out=logits)
        options = ignore_index, reduction and _SUM, label_smoothing, True, int(wanted > 0)
        loss, grad, *_ = _cross_entropy.direct(logits, target[place], class_weight, *options)
        if reduction == _NONE:
            losses[place] = loss
        else:
            losses += loss
        if grad_loss is not None and wanted:
            of_rows = torch.where(target[place] == ignore_index, 0.0, grad_loss[place])  # 0 * inf is not 0
            _scale_.direct(grad, of_rows, None)
        if wanted & 1:
            grad_hidden[place] = grad @ weight
        if wanted & 2:
            grad_weight += grad.t() @ part
        if wanted & 4:
            grad_bias += grad.sum(0, dtype=torch.float32)
    found = [grad_hidden, grad_weight, grad_bias]
    if reduction == _MEAN:
        divisor = _gpu_divisor(target, class_weight, ignore_index)
        losses = losses / divisor
        # Of a mean over nothing only the loss is NaN.
        found = [torch.where(divisor == 0, 0.0, g / divisor).to(g.dtype) for g in found]
    return losses, found


def _gpu_divisor(target: Tensor, class_weight: Tensor | None, ignore_index: int) -> Tensor:
    counted = target != ignore_index
    if class_weight is None:
        return counted.sum().float()
    return torch.where(counted, class_weight.double()[target.clamp(0, len(class_weight) - 1)], 0.0).sum().float()


def _check_classes(target: Tensor, classes: int) -> None:
    if target.numel():
        low, high = (int(t) for t in target.aminmax())
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise IndexError(f"target: expected classes in [0, {classes}) or ignore_index, got {wrong}")


def _divisor(target: Tensor, class_weight: Tensor | None) -> Tensor:
    if class_weight is None:
        return torch.tensor(float(len(target)))
    # One after the other: the order of torch's sum would depend on the number of threads.
    counts = torch.bincount(target, minlength=len(class_weight))
    return (class_weight.double() * counts).cumsum(0)[-1].float()


def _forward(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    class_weight, _, *options = rest
    check_linear_loss(None, hidden, weight, target, bias, class_weight, *options)
    with torch.autocast(hidden.device.type, enabled=False):
        chunked = _chunked if hidden.is_cpu and not _state.interpreting else _chunked_on_gpu
        loss, found = chunked(None, hidden, weight, target, bias, *rest)
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
    check_linear_loss(grad_loss, hidden, weight, target, bias, class_weight, _NONE, *rest)
    with torch.autocast(hidden.device.type, enabled=False):
        options = class_weight, ignore_index, _NONE, *rest
        chunked = _chunked if hidden.is_cpu and not _state.interpreting else _chunked_on_gpu
        _, found = chunked(grad_loss.contiguous(), hidden, weight, target, bias, *options)
        return tuple(g.to(hidden.dtype) for g in found)


def _fake_gradients(hidden: Tensor, weight: Tensor, wanted: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    new = [hidden.new_empty(shape if wanted & 1 << i else 0, dtype=dtype) for i, shape in enumerate(shapes)]
    return new[0], new[1], new[2]


def _fake(hidden: Tensor, weight: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, reduction, _, _, wanted = rest
    loss = hidden.new_empty(target.shape if reduction == _NONE else (), dtype=torch.float32)
    return loss, *_fake_gradients(hidden, weight, wanted, kept_dtype(hidden))


_ARGUMENTS = "Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, int ignore_index, "


def _backward_twice(grads: Values, args: Values, outputs: Values, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Through the formula, a chunk of rows at a time."""
    grad_loss, hidden, weight, target, bias, *rest = args
    found: list[Any] = [None] * len(args)
    parts: list[list[Tensor]] = [[], []]  # of grad_loss and hidden, which have rows
    step = _rows(len(weight), 4, rest[-2])
    for start in range(0, len(hidden), step):
        rows = slice(start, start + step)
        of_part = [grads[0] if grads[0] is None else grads[0][rows], *grads[1:]]
        part = [grad_loss[rows], hidden[rows], weight, target[rows], bias, *rest]
        gradients = formula_gradients(reference.linear_cross_entropy_backward, of_part, part, wanted)
        for i, gradient in enumerate(gradients):
            if gradient is not None and i < 2:
                parts[i].append(gradient)
            elif gradient is not None:
                found[i] = gradient if found[i] is None else found[i] + gradient
    for i, several in enumerate(parts):
        found[i] = torch.cat(several) if several else None
    return found


_rows_backward = Op(
    f"linear_cross_entropy_bwd(Tensor grad_loss, {_ARGUMENTS}float label_smoothing, int chunk_size, int wanted) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.linear_cross_entropy_backward,
    fake=lambda grad_loss, hidden, weight, *rest: _fake_gradients(hidden, weight, rest[-1], hidden.dtype),
    kernels=dict.fromkeys(("cpu", "triton"), lambda grad_loss, hidden, *_: _refuse(hidden)),
    triton=_backward_none,
    backward=_backward_twice,
    save=lambda args, outputs: (args, (None, None, None)),
)


def _backward(grads: Values, args: Values, outputs: Values, wanted: Sequence[bool]) -> list[Tensor | None]:
    hidden, weight, target, bias, class_weight, ignore_index, reduction, *rest = args
    (grad_loss,), places = grads, (0, 1, 3)
    found: list[Tensor | None] = [None] * len(args)
    if reduction == _NONE or (torch.is_grad_enabled() and not torch.compiler.is_compiling()):
        if reduction == _MEAN:
            if target.is_cpu and not _state.interpreting:
                grad_loss = grad_loss / _divisor(target[target != ignore_index], class_weight)
            else:
                grad_loss = grad_loss / _gpu_divisor(target, class_weight, ignore_index)
        bits = sum(wanted[i] << bit for bit, i in enumerate(places))
        options = class_weight, ignore_index, *rest[:-1], bits
        gradients = _rows_backward(grad_loss.expand(target.shape), hidden, weight, target, bias, *options)
        for i, gradient in zip(places, gradients, strict=True):
            found[i] = gradient if wanted[i] else None
        return found
    for i, saved in zip(places, outputs[1:], strict=True):
        if wanted[i]:
            found[i] = _scaled(saved, grad_loss).to(hidden.dtype)
    return found


def _scaled(saved: Tensor, grad_loss: Tensor) -> Tensor:
    """saved * grad_loss, in place where the graph is freed after this, so that nobody can read saved again."""
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        return saved * grad_loss
    return saved if grad_loss.is_cpu and grad_loss.item() == 1.0 else saved.mul_(grad_loss)


_linear_cross_entropy = Op(
    f"linear_cross_entropy_fwd({_ARGUMENTS}int reduction, float label_smoothing, int chunk_size, int wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.linear_cross_entropy,
    fake=_fake,
    kernels=_KERNELS,
    triton=_forward,
    backward=_backward,
    save=lambda args, outputs: (args, (None, *outputs[1:])),
    hidden=True,
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
    computed in backward, from new logits. The gradient of weight is summed over chunks in float32.

    Source: Hsu et al., Liger Kernel, 2024.

    Example:
        >>> import mmkern, torch
        >>> mmkern.linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([1, 3]))
        tensor(1.3863)
    """
    _check(hidden, weight, target, bias)
    if class_weight is not None:
        _check_weight("class_weight", class_weight, hidden, len(weight))
        if class_weight.requires_grad and torch.is_grad_enabled():
            raise ValueError("class_weight: requires grad, which has no gradient here")
    _check_options(ignore_index, reduction, label_smoothing)
    if chunk_size is not None and (not isinstance(chunk_size, int) or isinstance(chunk_size, bool)):
        raise TypeError(f"chunk_size: expected an integer or None, got {chunk_size!r}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    dtype, device = hidden.dtype, hidden.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype, cast = torch.float32, torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(cast), weight.to(cast), None if bias is None else bias.to(cast)
    wanted = 0
    if torch.is_grad_enabled() and reduction != "none" and not _transformed():
        wanted = sum((t is not None and t.requires_grad) << bit for bit, t in enumerate((hidden, weight, bias)))
    loss = _linear_cross_entropy(
        hidden.flatten(0, -2) if hidden.dim() > 1 else hidden[None],
        weight,
        target.reshape(-1).long(),
        bias,
        class_weight,
        ignore_index,
        _REDUCTIONS[reduction],
        float(label_smoothing),
        chunk_size or 0,
        wanted,
    )
    return (loss.view(target.shape) if reduction == "none" else loss).to(dtype)


def _check(hidden: Any, weight: Any, target: Any, bias: Any) -> None:
    for name, t in (("hidden", hidden), ("weight", weight), ("target", target), ("bias", bias)):
        if not isinstance(t, Tensor) and not (name == "bias" and t is None):
            raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
    if not hidden.is_floating_point():
        raise TypeError(f"hidden: expected a floating-point dtype, got {hidden.dtype}")
    if hidden.dim() == 0:
        raise ValueError("hidden: expected shape (..., D), got ()")
    autocast = torch.is_autocast_enabled(hidden.device.type)
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

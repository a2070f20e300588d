"""Gradients of an op: by its backward kernel, or by differentiating its formula, recomputed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkern.reference.gradients import formula_gradients

Values = Sequence[Any]


class Late:
    """What an op's `save` puts around an argument that only second derivatives read.

    It is looked at when these are asked for: until then, the caller may write into it.
    """

    def __init__(self, tensor: Tensor | None) -> None:
        self.tensor = tensor


def _save(ctx: Any, op: Any, args: Values, outputs: Values, wanted: Sequence[bool]) -> None:
    kept: Values = args
    saved: Values = ()
    ctx.late = ctx.lost = ()
    if op.backward is not None:
        kept, saved = op.save(args, outputs, wanted)
        ctx.set_materialize_grads(False)
        if op.hidden is not None:  # its gradients are here already: the formula's arguments may be late
            late = [i for i, t in enumerate(kept) if isinstance(t, Late) and t.tensor is not None]
            # A compiled graph has no second derivatives, and torch saves no tensor of inference mode.
            lost = [i for i in late if torch.compiler.is_compiling() or kept[i].tensor.is_inference()]
            kept = [t.tensor if isinstance(t, Late) and i not in lost else t for i, t in enumerate(kept)]
            kept = [None if isinstance(t, Late) else t for t in kept]
            ctx.late, ctx.lost = tuple(i for i in late if i not in lost), tuple(lost)
    ctx.op = op
    ctx.rest = list(kept)
    # save may have put a size where a tensor was
    ctx.where = [i for i in op._tensors if isinstance(kept[i], Tensor)]
    for i in ctx.where:
        ctx.rest[i] = None
    ctx.outputs = [t is not None for t in saved]
    ctx.save_for_backward(*(kept[i] for i in ctx.where), *(t for t in saved if t is not None))


def _gradients(ctx: Any, grads: Sequence[Tensor | None], wanted: Sequence[bool]) -> Sequence[Tensor | None]:
    op, args = ctx.op, list(ctx.rest)
    if op.backward is not None and all(grad is None for grad in grads):
        return (None,) * len(args)
    if ctx.lost and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        names = ", ".join(op.names[i] for i in ctx.lost)
        raise RuntimeError(f"{names}: made in inference mode, so not saved for second derivatives")
    # Only by this name can they be had one by one. A torch without it reads all: one that was written into raises.
    raw = getattr(ctx, "_raw_saved_tensors", None) if ctx.late and not torch.is_grad_enabled() else None
    if raw is not None:
        # Unpacking one that was written into since would raise, as it should where it is read.
        skipped = [i in ctx.late for i in ctx.where] + [False] * sum(ctx.outputs)
        saved = iter([None if skip else t.unpack() for t, skip in zip(raw, skipped, strict=True)])
    else:
        saved = iter(ctx.saved_tensors)
    for i in ctx.where:
        args[i] = next(saved)
    if op.backward is None:
        return formula_gradients(op.reference, grads, args, wanted)
    outputs = [next(saved) if there else None for there in ctx.outputs]
    return op.backward(grads, args, outputs, wanted)


class Differentiable(torch.autograd.Function):
    """Forward by the kernel that was chosen."""

    # Without setup_context, for which torch would inspect the signature at every call: 30 us.
    @staticmethod
    def forward(ctx: Any, op: Any, *args: Any) -> Any:
        output = op.direct(*args)
        _save(ctx, op, args, output if isinstance(output, tuple) else (output,), ctx.needs_input_grad[1:])
        return output[0] if op.hidden is not None else output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return None, *_gradients(ctx, grads, ctx.needs_input_grad[1:])


class DifferentiableWhenRun(torch.autograd.Function):
    """Forward by the op's twin, below autograd, which chooses when it runs; all of the op's outputs."""

    @staticmethod
    def forward(ctx: Any, op: Any, keys: Any, *args: Any) -> Any:
        output = op.called.redispatch(keys, *args)
        outputs = output if isinstance(output, tuple) else (output,)
        if op.hidden is not None:
            ctx.mark_non_differentiable(*outputs[1:])
        _save(ctx, op, args, outputs, ctx.needs_input_grad[2:])
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        grads = grads if ctx.op.hidden is None else grads[:1]
        return None, None, *_gradients(ctx, grads, ctx.needs_input_grad[2:])

"""Gradients of an op: by its backward kernel, or by differentiating its formula, recomputed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def _save(ctx: Any, op: Any, args: Values, outputs: Values, flags: tuple[bool, ...]) -> None:
    saved: Values = ()
    late = lost = ()
    if op.backward is not None:
        ctx.set_materialize_grads(False)
        if op.save is None:
            saved = outputs
        else:
            args, saved = op.save(op.record._make(args), outputs, op.named(flags))
        if op.hidden is not None:  # its gradients are here already: the formula's arguments may be late
            args, late, lost = _resolved(args)
    rest, kept, where = list(args), [], []
    for i in op.tensors:
        if isinstance(rest[i], Tensor):  # save may have put a size there
            kept.append(rest[i])
            where.append(i)
            rest[i] = None
    ctx.call = op, rest, where, [t is not None for t in saved], late, lost
    ctx.save_for_backward(*kept, *(t for t in saved if t is not None))


def _resolved(args: Values) -> tuple[Values, Any, Any]:
    """The arguments with `Late` ones as they are now, and the places of those that are kept, and of those that are not.

    A compiled graph has no second derivatives, and torch saves no tensor of inference mode.
    """
    values, late, lost = list(args), [], []
    compiling = torch.compiler.is_compiling()
    for i, t in enumerate(args):
        if isinstance(t, Late):
            values[i] = t.tensor
            if t.tensor is not None and (compiling or t.tensor.is_inference()):
                values[i] = None
                lost.append(i)
            elif t.tensor is not None:
                late.append(i)
    return values, late, lost


def _gradients(ctx: Any, grads: Sequence[Tensor | None], flags: tuple[bool, ...]) -> Sequence[Tensor | None]:
    op, rest, where, there, late, lost = ctx.call
    found: list[Tensor | None] = [None] * len(rest)
    if op.backward is not None and grads[0] is None and all(grad is None for grad in grads):
        return found
    if lost and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        names = ", ".join(op.names[i] for i in lost)
        raise RuntimeError(f"{names}: made in inference mode, so not saved for second derivatives")
    # Only by this name can they be had one by one. A torch without it reads all: one that was written into raises.
    raw = getattr(ctx, "_raw_saved_tensors", None) if late and not torch.is_grad_enabled() else None
    if raw is not None:
        # Unpacking one that was written into since would raise, as it should where it is read.
        skipped = [i in late for i in where] + [False] * sum(there)
        saved = iter([None if skip else t.unpack() for t, skip in zip(raw, skipped, strict=True)])
    else:
        saved = iter(ctx.saved_tensors)
    args = list(rest)
    for i in where:
        args[i] = next(saved)
    wanted, given = op.named(flags), op.record._make(args)
    if op.backward is None:
        named = formula_gradients(op.reference, grads, given, wanted)
    else:
        named = op.backward(grads, given, [next(saved) if t else None for t in there], wanted)
    for name, gradient in named.items():
        found[op.places[name]] = gradient
    return found


class Differentiable(torch.autograd.Function):
    """Forward by the kernel that was chosen."""

    # Without setup_context, for which torch would inspect the signature at every call: 30 us.
    @staticmethod
    def forward(ctx: Any, op: Any, kernel: Callable[..., Any], *args: Any) -> Any:
        output = kernel(*args)
        _save(ctx, op, args, output if isinstance(output, tuple) else (output,), ctx.needs_input_grad[2:])
        return output[0] if op.hidden is not None else output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return None, None, *_gradients(ctx, grads, ctx.needs_input_grad[2:])


# What `Differentiable.apply` ends in, 1 to 2.5 us sooner: where no transform is on or has left tensors, and eagerly.
apply_plainly = super(torch.autograd.Function, Differentiable).apply


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
        grads = grads if ctx.call[0].hidden is None else grads[:1]
        return None, None, *_gradients(ctx, grads, ctx.needs_input_grad[2:])

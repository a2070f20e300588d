"""How DTensor may split the ops: over batch entries, heads and rows, which know nothing of one another.

Registered when DTensor asks for the first shape, so that torch.distributed is not imported before its user does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from mmkern.reference.attention import DIFFERENTIABLE as of_attention
from mmkern.reference.gradients import of_bits, record_class
from mmkern.reference.linear_loss import DIFFERENTIABLE as of_linear
from mmkern.reference.loss import IN_FORWARD, MEAN, NONE
from mmkern.reference.softmax import DIFFERENTIABLE as of_masked_softmax

# The dim of each output (None: to be summed; -1: whole), and of each argument that is split.
Axis = tuple[Sequence[int | None], dict[str, int]]


def _shape(spec: Any) -> tuple[int, ...]:
    return tuple(spec.tensor_meta.shape)


def _given(args: Any, **dims: int | None) -> dict[str, int]:
    """The dims of those arguments that are tensors, and split."""
    return {name: dim for name, dim in dims.items() if dim is not None and hasattr(getattr(args, name), "tensor_meta")}


def _own(spec: Any, dim: int) -> int | None:
    """Dim `dim`, counted from the end, of an argument that has it; None where it is broadcast or missing."""
    if spec is None:
        return None
    shape = _shape(spec)
    return len(shape) + dim if -dim <= len(shape) and shape[dim] > 1 else None


def _gradients(names: Sequence[str], wanted: int, dims: Mapping[str, int | None]) -> list[int | None]:
    """The dims of an operator's gradients: to be summed for an argument that is whole, -1 for one not wanted."""
    asked = of_bits(names, wanted)
    return [dims.get(name) if name in asked else -1 for name in names]


def _softmax(args: Any) -> list[Axis]:
    tensors = [name for name in args._fields if name != "dim"]
    rank = len(_shape(getattr(args, tensors[0])))
    return [([i], _given(args, **dict.fromkeys(tensors, i))) for i in range(rank) if i != args.dim]


def _masked_terms(args: Any, rank: int, i: int) -> dict[str, int]:
    return _given(args, x=i, mask=_own(args.mask, i - rank), bias=_own(args.bias, i - rank))


def _masked_softmax(args: Any) -> list[Axis]:
    rank = len(_shape(args.x))
    return [([i], _masked_terms(args, rank, i)) for i in range(rank) if i != args.dim]


def _masked_softmax_backward(args: Any) -> list[Axis]:
    rank = len(_shape(args.grad))
    axes: list[Axis] = []
    for i in range(rank):
        if i != args.dim:
            dims = {"x": i, **_masked_terms(args, rank, i)}
            outs = _gradients(of_masked_softmax, args.wanted, dims)
            axes.append((outs, _given(args, **{**dims, "grad": i, "output": i})))
    return axes


def _cross_entropy(args: Any) -> list[Axis]:
    if len(_shape(args.input)) < 2 or args.reduction == MEAN:  # each part's mean has a divisor of its own
        return []
    grads = _gradients(IN_FORWARD, args.wanted, {"input": 0, "target": 0})
    return [([0 if args.reduction == NONE else None, *grads, -1], {"input": 0, "target": 0})]


def _cross_entropy_backward(args: Any) -> list[Axis]:
    if len(_shape(args.grad)) < 2:
        return []
    return [([0], _given(args, grad=0, grad_loss=0 if _shape(args.grad_loss) else None))]


def _linear(args: Any) -> list[Axis]:
    if args.reduction == MEAN:
        return []
    grads = _gradients(of_linear, args.wanted, {"hidden": 0})
    return [([0 if args.reduction == NONE else None, *grads], {"hidden": 0, "target": 0})]


def _linear_backward(args: Any) -> list[Axis]:
    return [(_gradients(of_linear, args.wanted, {"hidden": 0}), {"grad_loss": 0, "hidden": 0, "target": 0})]


def _positions(args: Any) -> list[Axis]:
    has_batch = len(_shape(args.x)) >= (4 if args.encoding == "sincos2d" else 3)
    return [([0], _given(args, x=0, offsets=0))] if has_batch else []


def _table_gradient(args: Any) -> list[Axis]:
    return [([None], _given(args, grad=0, offsets=0))] if len(_shape(args.grad)) >= 3 else []


def _embedding(args: Any) -> list[Axis]:
    return [([0], _given(args, tokens=0, offsets=0))] if len(_shape(args.tokens)) >= 2 else []


def _embedding_gradient(args: Any) -> list[Axis]:
    return [([None], {"grad": 0, "tokens": 0})] if len(_shape(args.grad)) >= 3 else []


def _rotary(args: Any) -> list[Axis]:
    turned = [name for name in ("q", "k") if name in args._fields]
    shapes = [_shape(getattr(args, name)) for name in turned]
    batched = args.positions is not None and len(_shape(args.positions)) == 2
    axes: list[Axis] = [([0] * len(turned), _given(args, **dict.fromkeys(turned, 0), positions=0 if batched else None))]
    if all(len(shape) == 4 and shape[1] % args.q.mesh.size() == 0 for shape in shapes):
        axes.append(([1] * len(turned), dict.fromkeys(turned, 1)))
    return axes


def _attention(args: Any) -> list[Axis]:
    heads, kv_heads = _shape(args.query)[-3], _shape(args.key)[-3]
    batch = len(_shape(args.query)) - 4

    def split(at: int, **dims: int | None) -> Axis:
        mask = _own(args.attn_mask, at - batch - 4)
        return [at, at], _given(args, query=at, attn_mask=mask, **dims)

    axes = [split(batch, key=batch, value=batch, alibi_slopes=0, key_lengths=0)]
    if heads == kv_heads or kv_heads % args.query.mesh.size() == 0:
        at = batch + 1
        slopes = None if args.alibi_slopes is None else len(_shape(args.alibi_slopes)) - 1
        axes.append(split(at, key=at, value=at, temperature=0, alibi_slopes=slopes, sinks=0))
    anywhere = not args.is_causal and args.window_left < 0 and args.window_right < 0
    if anywhere and args.alibi_slopes is None:  # rows that need not know where they stand
        axes.append(split(batch + 2))
    return axes


def _attention_backward(args: Any) -> list[Axis]:
    axes: list[Axis] = []
    for (at, _), given in _attention(args):
        grads = _gradients(of_attention, args.wanted, given)
        axes.append((grads, {**given, **_given(args, grad_out=at, grad_lse=at, out=at, lse=at)}))
    return axes


RULES: dict[str, Callable[[Any], list[Axis]]] = {
    **dict.fromkeys(("softmax_fwd", "log_softmax_fwd", "softmax_bwd", "log_softmax_bwd"), _softmax),
    "masked_softmax_fwd": _masked_softmax,
    "masked_softmax_bwd": _masked_softmax_backward,
    "cross_entropy_fwd": _cross_entropy,
    "cross_entropy_bwd": _cross_entropy_backward,
    "linear_cross_entropy_fwd": _linear,
    "linear_cross_entropy_bwd": _linear_backward,
    "add_positional_encoding_fwd": _positions,
    "position_table_bwd": _table_gradient,
    "embed_tokens_fwd": _embedding,
    "embed_tokens_bwd": _embedding_gradient,
    "rotary_fwd": _rotary,
    "rotary_qk_fwd": _rotary,
    "attention_fwd": _attention,
    "attention_bwd": _attention_backward,
}


@cache
def register() -> None:
    """Tell DTensor the rules."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def placed(dim: int | None, absent: Any) -> Any:
        return absent if dim is None else Replicate() if dim == -1 else Shard(dim)

    def rule(name: str, axes: Callable[[Any], list[Axis]]) -> Callable[..., Any]:
        schema = getattr(torch.ops.mmkern, name).default._schema
        record = record_class(name, [a.name for a in schema.arguments])

        def shardings(*values: Any) -> Any:
            args = record(*values)
            tensors = [field for field in args._fields if hasattr(getattr(args, field), "tensor_meta")]
            found = axes(args)
            for field in tensors:
                _refuse(name, field, getattr(args, field), found)

            def inputs(given: Mapping[str, int]) -> list[Any]:
                return [placed(given.get(n), Replicate()) if n in tensors else None for n in args._fields]

            whole = [Replicate()] * len(schema.returns), inputs({})
            return [whole] + [([placed(dim, Partial()) for dim in outs], inputs(given)) for outs, given in found]

        return shardings

    for name, axes in RULES.items():
        for op in (getattr(torch.ops.mmkern, name).default, getattr(torch.ops.mmkern, f"{name}_called").default):
            register_sharding(op)(rule(name, axes))


def _refuse(op: str, name: str, spec: Any, axes: Sequence[Axis]) -> None:
    """Raise ValueError for a tensor that is split where the op needs it whole: it would be gathered without a word."""
    for placement in spec.placements:
        if placement.is_shard() and not any(given.get(name) == placement.dim for _, given in axes):
            raise ValueError(
                f"{name}: a DTensor split over dim {placement.dim} of shape {_shape(spec)}, which {op} "
                "needs whole: redistribute it first"
            )

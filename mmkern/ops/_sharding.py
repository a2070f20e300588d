"""How DTensor may split the ops: over batch entries, heads and rows, which know nothing of one another.

Registered when DTensor asks for the first shape, so that torch.distributed is not imported before its user does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

Axis = tuple[
    Sequence[int | None], Sequence[int | None]
]  # the dim of each output (None: to be summed), of each argument


def _shape(spec: Any) -> tuple[int, ...]:
    return tuple(spec.tensor_meta.shape)


def _own(spec: Any, dim: int) -> int | None:
    """Dim `dim`, counted from the end, of an argument that has it; None where it is broadcast or missing."""
    shape = _shape(spec)
    return len(shape) + dim if -dim <= len(shape) and shape[dim] > 1 else None


def _softmax(*args: Any) -> list[Axis]:
    rank, dim = len(_shape(args[0])), args[-1]
    return [([i], [i if hasattr(a, "tensor_meta") else None for a in args]) for i in range(rank) if i != dim]


def _masked_softmax(x: Any, mask: Any, scale: Any, bias: Any, dim: int, *rest: Any) -> list[Axis]:
    rank = len(_shape(x))
    own = [(i, *(None if t is None else _own(t, i - rank) for t in (mask, bias))) for i in range(rank) if i != dim]
    return [([i], [i, of_mask, None, of_bias, *[None] * 3]) for i, of_mask, of_bias in own]


def _masked_softmax_backward(grad: Any, output: Any, x: Any, mask: Any, *rest: Any) -> list[Axis]:
    *options, wanted = rest
    axes: list[Axis] = []
    for _, (i, of_mask, _, of_bias, *none) in _masked_softmax(grad, mask, *options):
        outs = [at if wanted >> bit & 1 else -1 for bit, at in enumerate((i, of_mask, of_bias))]
        axes.append((outs, [i, i, i, of_mask, None, of_bias, *none, None]))
    return axes


def _cross_entropy(input: Any, target: Any, weight: Any, ignore: Any, reduction: int, *rest: Any) -> list[Axis]:
    if len(_shape(input)) < 2 or reduction == 1:  # each part's mean has a divisor of its own
        return []
    wanted = rest[-1]
    outs = [0 if reduction == 0 else None, 0 if wanted & 1 else -1, 0 if wanted & 2 else -1, -1]
    return [(outs, [0, 0, *[None] * 6])]


def _cross_entropy_backward(grad: Any, grad_loss: Any, unit: Any) -> list[Axis]:
    return [([0], [0, 0 if _shape(grad_loss) else None, None])] if len(_shape(grad)) > 1 else []


def _linear(*args: Any) -> list[Axis]:
    reduction, wanted = args[6], args[-1]
    if reduction == 1:
        return []
    grads = [at if wanted >> bit & 1 else -1 for bit, at in enumerate((0, None, None))]
    return [([0 if reduction == 0 else None, *grads], [0, None, 0, *[None] * 7])]


def _linear_backward(*args: Any) -> list[Axis]:
    grads = [at if args[-1] >> bit & 1 else -1 for bit, at in enumerate((0, None, None))]
    return [(grads, [0, 0, None, 0, *[None] * 6])]


def _positions(x: Any, encoding: str, table: Any, offset: Any, offsets: Any, *rest: Any) -> list[Axis]:
    has_batch = len(_shape(x)) >= (4 if encoding == "sincos2d" else 3)
    return [([0], [0, None, None, None, 0, *[None] * len(rest)])] if has_batch else []


def _table_gradient(grad: Any, max_length: Any, offset: Any, offsets: Any, *rest: Any) -> list[Axis]:
    return [([None], [0, None, None, 0, *[None] * len(rest)])] if len(_shape(grad)) >= 3 else []


def _embedding(tokens: Any, *rest: Any) -> list[Axis]:
    return [([0], [0, *[None] * 4, 0, *[None] * 4])] if len(_shape(tokens)) >= 2 else []


def _embedding_gradient(grad: Any, *rest: Any) -> list[Axis]:
    return [([None], [0, 0, *[None] * 5])] if len(_shape(grad)) >= 3 else []


def _rotary(*args: Any) -> list[Axis]:
    tensors = [a for a in args[:2] if hasattr(a, "tensor_meta") and len(_shape(a)) >= 3]
    count = 2 if len(args) == 8 else 1
    positions = args[count]
    batch = 0 if positions is not None and len(_shape(positions)) == 2 else None
    axes = [([0] * count, [0] * count + [batch])]
    heads = [_shape(t)[1] for t in tensors[:count] if len(_shape(t)) == 4]
    if len(heads) == count and all(n % args[0].mesh.size() == 0 for n in heads):
        axes.append(([1] * count, [1] * count + [None]))
    return [(out, [*inputs, *[None] * (len(args) - count - 1)]) for out, inputs in axes]


def _attention(*args: Any) -> list[Axis]:
    query, key = args[:2]
    rank = len(_shape(query))
    dims = {-4: rank - 4}
    if _shape(query)[-3] == _shape(key)[-3] or _shape(key)[-3] % query.mesh.size() == 0:
        dims[-3] = rank - 3
    axes: list[Axis] = []
    for dim, at in dims.items():
        given: list[int | None] = [at, at, at, None if args[3] is None else _own(args[3], dim), *[None] * 13]
        slopes, lengths = args[12], args[13]
        if dim == -4:
            given[12] = None if slopes is None else 0
            given[13] = None if lengths is None else 0
        else:
            for i in (8, 14):
                given[i] = None if args[i] is None else 0
            given[12] = None if slopes is None else len(_shape(slopes)) - 1
        axes.append(([at, at], given))
    if not args[5] and args[9] < 0 and args[10] < 0 and args[12] is None:  # rows that need not know where they stand
        given = [rank - 2, None, None, None if args[3] is None else _own(args[3], -2), *[None] * 13]
        axes.append(([rank - 2, rank - 2], given))
    return axes


def _attention_backward(*args: Any) -> list[Axis]:
    axes: list[Axis] = []
    for outs, given in _attention(*args[4:-1]):
        at = outs[0]
        grads = [given[i] if args[-1] >> bit & 1 else -1 for bit, i in enumerate((0, 1, 2, 3, 8, 12, 14))]
        axes.append((grads, [at, None if args[1] is None else at, at, at, *given, None]))
    return axes


RULES: dict[str, Callable[..., list[Axis]]] = {
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

    def rule(name: str, axes: Callable[..., list[Axis]]) -> Callable[..., Any]:
        def shardings(*args: Any) -> Any:
            tensors = [hasattr(a, "tensor_meta") for a in args]
            found = axes(*args)
            outputs = len(getattr(torch.ops.mmkern, name).default._schema.returns)
            _refuse(name, args, found)
            whole = [Replicate()] * outputs, [Replicate() if t else None for t in tensors]
            return [whole] + [
                (
                    [placed(dim, Partial()) for dim in outs],
                    [placed(dim, Replicate()) if t else None for t, dim in zip(tensors, ins, strict=True)],
                )
                for outs, ins in found
            ]

        return shardings

    for name, axes in RULES.items():
        for op in (getattr(torch.ops.mmkern, name).default, getattr(torch.ops.mmkern, f"{name}_called").default):
            register_sharding(op)(rule(name, axes))


def _refuse(name: str, args: Sequence[Any], axes: Sequence[Axis]) -> None:
    """Raise ValueError for a tensor that is split where the op needs it whole: it would be gathered without a word."""
    schema = getattr(torch.ops.mmkern, name).default._schema.arguments
    for i, spec in enumerate(args):
        if not hasattr(spec, "tensor_meta"):
            continue
        for placement in spec.placements:
            if placement.is_shard() and not any(given[i] == placement.dim for _, given in axes):
                raise ValueError(
                    f"{schema[i].name}: a DTensor split over dim {placement.dim} of shape {_shape(spec)}, which {name} "
                    "needs whole: redistribute it first"
                )

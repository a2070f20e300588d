"""What cross_entropy is tested on: logits, targets and weights of many shapes, and every option."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import Backend, hold
from torch import Tensor

import mmkern
from mmkern.testing import randn

LARGE = pytest.mark.large
REDUCTIONS = ("none", "mean", "sum")
KINDS = ("index", "soft")
# One row, few and many classes, one class, classes that are not the last dim, none; rows that stay on chip and longer.
SHAPES = [
    (7,), (7, 33), (3, 5, 7), (2, 17, 3, 4), (33, 1000), (2, 40001), (5, 1), (0, 4),
    *(pytest.param(s, marks=LARGE) for s in ((33,), (6, 9), (2, 3, 1), (2, 21, 6, 5), (3, 9, 70), (2, 4100))),
    pytest.param((2, 9001), marks=LARGE),
]  # fmt: skip
# These in every layout; an interpreter takes two of them.
LAYOUT_SHAPES = [
    (7, 33), (3, 5, 7),
    *(pytest.param(s, marks=LARGE) for s in ((2, 17, 3, 4), (3, 9, 70), (5, 1), (2, 3, 1), (0, 4), (2, 9001))),
    *(pytest.param(s, marks=LARGE) for s in ((33,), (2, 4100))),
]  # fmt: skip


def problem(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous", kind: str = "index", weighted: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, target and weight."""
    dim = min(1, len(shape) - 1)
    # Of few classes one would win a loss of nearly 0, whose digits cancel, in torch's as in ours.
    x = randn(*shape, dtype=dtype, layout=layout, scale=3.0 if shape[dim] > 8 else 0.5)
    weight = (randn(shape[dim], seed=4).abs() + 0.1).to(dtype) if weighted else None
    if kind == "soft":
        return x, torch.softmax(randn(*shape, seed=3), dim).to(dtype), weight
    draw = torch.Generator().manual_seed(5)
    target = torch.randint(0, shape[dim], shape[:dim] + shape[dim + 1 :], generator=draw)
    if target.numel() > 1:
        target.view(-1)[::3] = -100
    return x, target, weight


def check(backend: Backend, once: Any, x: Tensor, target: Tensor, weight: Tensor | None, **options: Any) -> None:
    """Loss and the gradients of logits and of soft targets; without gradients, the same loss."""
    soft = target.is_floating_point()
    shape = x.shape[:1] + x.shape[2:] if x.dim() > 1 else x.shape[:0]
    grad = randn(*(shape if options.get("reduction") == "none" else ()), dtype=x.dtype, seed=9)

    def call(op: Callable[..., Tensor], x: Tensor, *targets: Tensor) -> Tensor:
        w = None if weight is None else weight.to(x.device, x.dtype)
        return op(x, targets[0] if soft else target.to(x.device), w, **options)

    def ours(*leaves: Tensor) -> Tensor:
        loss = call(mmkern.cross_entropy, *leaves)
        with torch.no_grad():
            plain = call(mmkern.cross_entropy, *leaves)
        assert torch.equal(plain, loss) or plain.isnan().all()
        return loss

    inputs = [x, target] if soft else [x]
    hold(backend, once, ours, lambda *leaves: call(F.cross_entropy, *leaves), inputs, grad)


def loss_and_gradients(
    call: Callable[..., Tensor], x: Tensor, target: Tensor, weight: Tensor | None, **options: Any
) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_()]
    if target.is_floating_point():
        leaves.append(target.detach().requires_grad_())
        target = leaves[1]
    loss = call(leaves[0], target, weight, **options)
    grad = randn(*loss.shape, seed=9).to(loss)
    return loss.detach(), *torch.autograd.grad(loss, leaves, grad)


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None or not t.is_floating_point() else t.double() for t in tensors]

"""Softmax and its relatives at the sizes models have: attention scores, vocabularies, expert routers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mmkern
from mmkern.benchmarks.inputs import Rows, normal
from mmkern.benchmarks.records import DTYPES, Baseline, Case, Problem

# name, shape, dim, level
SHAPES: list[tuple[str, tuple[int, ...], Any, str]] = [
    ("smallest", (8, 32), -1, "quick"),
    ("classes 256x1000", (256, 1000), -1, "quick"),
    ("expert router", (8192, 64), -1, "default"),
    ("BERT-base scores 128", (8, 12, 128, 128), -1, "default"),
    ("4096 square", (4096, 4096), -1, "quick"),
    ("Llama-2 vocabulary", (512, 32000), -1, "default"),
    ("Llama-3 vocabulary", (128, 128256), -1, "full"),
    ("channels of an image", (8, 64, 56, 56), 1, "default"),
]
# timed a second time with the output preallocated on both sides, without the page faults of a new one
WITH_OUT = ("classes 256x1000", "4096 square", "Llama-2 vocabulary")
# name, shape of the scores, what is added or hidden, level
MASKED: list[tuple[str, tuple[int, ...], Any, str]] = [
    ("BERT-base padded 128", (8, 12, 128, 128), "padding", "quick"),
    ("BERT-base padded 512", (2, 12, 512, 512), "padding", "default"),
    ("T5-base bias 512", (1, 12, 512, 512), "bias", "default"),
    ("4096 square", (4096, 4096), "mask", "default"),
]
# backward alone, the graph kept: reads the output and its gradient, writes one
BACKWARD = ("BERT-base scores 128", "classes 256x1000", "Llama-3 vocabulary")


def cases() -> Iterator[Case]:
    for name, dtype in DTYPES.items():
        rows = []
        if name != "float16":
            for op in ("softmax", "log_softmax"):
                given = [row for row in SHAPES if row[0] in BACKWARD]
                rows += [
                    (f"{op}-backward", partial(_backward, op, row[1], row[2]), row, dtype.itemsize) for row in given
                ]
            rows += [
                ("masked_softmax-training", partial(_masked_training, row[1], row[2]), row, 0) for row in MASKED[:3]
            ]
        for op in ("softmax", "log_softmax") if name != "float16" else ("softmax",):
            rows += [(op, partial(_plain, op, row[1], row[2]), row, 0) for row in SHAPES]
            given = [row for row in SHAPES if row[0] in WITH_OUT]
            rows += [(f"{op}-out", partial(_given_output, op, row[1], row[2]), row, 0) for row in given]
        if name != "float16":
            extra = {"padding": 0, "bias": dtype.itemsize, "mask": 1}
            rows += [("masked_softmax", partial(_masked, row[1], row[2]), row, extra[row[2]]) for row in MASKED]
        for op, build, (shape_name, shape, _, level), read in rows:
            yield Case(
                family="softmax",
                op=op,
                shape=shape_name,
                dims="x".join(map(str, shape)),
                dtype=dtype,
                build=build,
                flops=14.0 * math.prod(shape),  # maximum, subtraction, exp (about 10), sum, scaling
                bytes=math.prod(shape) * (2.0 * dtype.itemsize + read),
                bound="copy",
                level=level,
            )


def _ops(op: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    return {"softmax": (mmkern.softmax, torch.softmax), "log_softmax": (mmkern.log_softmax, torch.log_softmax)}[op]


def _plain(op: str, shape: tuple[int, ...], dim: int, dtype: torch.dtype, device: str) -> Problem:
    x = normal(*shape, dtype=dtype, scale=3.0).to(device)
    ours, theirs = _ops(op)
    rows = Rows(shape, dim)
    return Problem(
        partial(ours, x, dim),
        [Baseline(op, partial(theirs, x, dim))],
        lambda: theirs(rows(x).double(), -1),
        compared=lambda outputs: (rows(outputs[0]),),
        inputs=[x],
    )


def _given_output(op: str, shape: tuple[int, ...], dim: int, dtype: torch.dtype, device: str) -> Problem:
    x = normal(*shape, dtype=dtype, scale=3.0).to(device)
    ours, theirs = _ops(op)
    into = [torch.full_like(x, math.nan) for _ in range(2)]
    baseline = Baseline(f"{op}, out=", partial(theirs, x, dim, out=into[1]))
    rows = Rows(shape, dim)
    return Problem(
        partial(ours, x, dim, out=into[0]),
        [baseline],
        lambda: theirs(rows(x).double(), -1),
        compared=lambda outputs: (rows(outputs[0]),),
        inputs=[x],
        reuses=True,
    )


def _gradients(out: Tensor, leaves: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, leaves, grad, retain_graph=True)


def _backward(op: str, shape: tuple[int, ...], dim: int, dtype: torch.dtype, device: str) -> Problem:
    x, grad = (normal(*shape, dtype=dtype, scale=3.0, seed=seed).to(device) for seed in (0, 1))
    ours, theirs = _ops(op)
    leaf, rows = x.requires_grad_(), Rows(shape, dim)
    wide = rows(x.detach()).double().requires_grad_()
    return Problem(
        partial(_gradients, ours(leaf, dim), (leaf,), grad),
        [Baseline(f"{op} backward", partial(_gradients, theirs(leaf, dim), (leaf,), grad))],
        lambda: _gradients(theirs(wide, -1), (wide,), rows(grad).double()),
        compared=lambda outputs: (rows(outputs[0]),),
        kind="gradient",
        inputs=[grad],  # what the graph has kept of x must stay
    )


def _masked_training(shape: tuple[int, ...], kind: str, dtype: torch.dtype, device: str) -> Problem:
    """Forward and backward of what `_masked` computes, a bias with its gradient."""
    x, grad = (normal(*shape, dtype=dtype, scale=3.0, seed=seed).to(device) for seed in (0, 3))
    lengths = torch.linspace(shape[-1] / 3, shape[-1], shape[0]).long()
    mask = (torch.arange(shape[-1]) < lengths[:, None])[:, None, None, :].to(device) if kind == "padding" else None
    learned = (normal(1, *shape[1:], dtype=dtype, seed=2).to(device),) if kind == "bias" else ()

    def eager(x: Tensor, *bias: Tensor) -> Tensor:
        scores = x * 0.125 + bias[0] if bias else x * 0.125
        return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1)

    def ours(x: Tensor, *bias: Tensor) -> Tensor:
        return mmkern.masked_softmax(x, mask, scale=0.125, bias=bias[0] if bias else None)

    def step(call: Callable[..., Tensor], up: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        leaves = tuple(t.detach().requires_grad_() for t in given)
        return torch.autograd.grad(call(*leaves), leaves, up)

    rows = Rows(shape)  # a bias is of one batch entry: a row of it has the gradient of one row of x
    hidden = None if mask is None else ~rows(mask)

    def exact(x: Tensor, *bias: Tensor) -> Tensor:
        scores = x * 0.125 + bias[0] if bias else x * 0.125
        return (scores if hidden is None else scores.masked_fill(hidden, -math.inf)).softmax(-1)

    return Problem(
        partial(step, ours, grad, x, *learned),
        [Baseline("scale + mask + softmax", partial(step, eager, grad, x, *learned))],
        lambda: step(exact, rows(grad).double(), *(rows(t).double() for t in (x, *learned))),
        compared=lambda outputs: tuple(map(rows, outputs)),
        kind="gradient",
        inputs=[x, grad, *learned],
    )


def _masked(shape: tuple[int, ...], kind: str, dtype: torch.dtype, device: str) -> Problem:
    x = normal(*shape, dtype=dtype, scale=3.0).to(device)
    mask = bias = None
    if kind == "padding":
        lengths = torch.linspace(shape[-1] / 3, shape[-1], shape[0]).long()
        mask = (torch.arange(shape[-1]) < lengths[:, None])[:, None, None, :].to(device)
    elif kind == "mask":
        mask = (normal(*shape, seed=1) > -1).to(device)
    else:
        bias = normal(*shape, dtype=dtype, seed=2).to(device)
    scale = 0.125

    rows = Rows(shape)

    def eager(x: Tensor, bias: Tensor | None, mask: Tensor | None = mask) -> Tensor:
        scores = x * scale
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return scores.softmax(-1)

    def exact() -> Tensor:
        picked = None if bias is None else rows(bias).double()
        return eager(rows(x).double(), picked, None if mask is None else rows(mask))

    def in_place() -> Tensor:
        scores = torch.add(bias, x, alpha=scale) if bias is not None else x * scale
        if mask is not None:
            scores.masked_fill_(~mask, -math.inf)
        return torch.softmax(scores, -1, out=scores)

    return Problem(
        partial(mmkern.masked_softmax, x, mask, scale=scale, bias=bias),
        [Baseline("scale + mask + softmax", partial(eager, x, bias)), Baseline("the same in place", in_place)],
        exact,
        compared=lambda outputs: (rows(outputs[0]),),
        inputs=[x] if bias is None else [x, bias],
    )

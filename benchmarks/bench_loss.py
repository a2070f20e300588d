"""Cross-entropy forward and backward at the sizes of classifiers and language models, from logits and from hidden."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkern
from mmkern.benchmarks.inputs import ELEMENTS, normal, sample
from mmkern.benchmarks.records import DTYPES, Baseline, Call, Case, Outputs, Problem

# name, shape of the logits, label smoothing, level
SHAPES: list[tuple[str, tuple[int, ...], float, str]] = [
    ("classes 256x1000", (256, 1000), 0.0, "quick"),
    ("classes smoothed", (256, 1000), 0.1, "default"),
    ("4096 square", (4096, 4096), 0.0, "quick"),
    ("4096 square smoothed", (4096, 4096), 0.1, "default"),
    ("Llama-2 vocabulary", (512, 32000), 0.0, "default"),
    ("Llama-3 vocabulary", (128, 128256), 0.0, "full"),
    ("segmentation 21 classes", (8, 21, 128, 128), 0.0, "default"),
]
# name, tokens, width, vocabulary, level
LINEAR: list[tuple[str, int, int, int, str]] = [
    ("Llama-2 vocabulary 256", 256, 512, 32000, "default"),
    ("Llama-2 vocabulary", 1024, 512, 32000, "full"),
    ("Llama-3 vocabulary", 512, 256, 128256, "full"),
]
TWO = ("float32", "bfloat16")
CHUNK = 64  # tokens whose logits are held in float64 at once: 64 MiB of a vocabulary of 128 thousand


def cases() -> Iterator[Case]:
    for name in TWO:
        dtype = DTYPES[name]
        for shape_name, shape, smoothing, level in SHAPES:
            size = math.prod(shape)
            yield Case(
                family="loss",
                op="cross_entropy",
                shape=shape_name,
                dims="x".join(map(str, shape)),
                dtype=dtype,
                build=partial(_cross_entropy, shape, smoothing),
                flops=16.0 * size,  # maximum, subtraction, exp (about 10), sum, scaling, and less the target
                bytes=2.0 * size * dtype.itemsize,  # logits read, their gradient written
                bound="copy",
                level=level,
            )
        for shape_name, tokens, width, classes, level in LINEAR:
            yield Case(
                family="loss",
                op="linear_cross_entropy",
                shape=shape_name,
                dims=f"{tokens}x{width}x{classes}",
                dtype=dtype,
                build=partial(_linear, tokens, width, classes),
                flops=6.0 * tokens * width * classes,  # logits, and the gradients of hidden and of weight
                bytes=2.0 * (tokens + classes) * width * dtype.itemsize,
                bound="bf16_dot" if dtype is torch.bfloat16 else "fma",
                level=level,
            )


def _cross_entropy(shape: tuple[int, ...], smoothing: float, dtype: torch.dtype, device: str) -> Problem:
    x = normal(*shape, dtype=dtype, scale=3.0).to(device)
    rows = shape[0] * math.prod(shape[2:])
    picked = sample(rows, max(4, ELEMENTS // shape[1])).to(device)
    draw = torch.Generator().manual_seed(1)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=draw).to(device)
    options = {"target": target, "label_smoothing": smoothing}
    others = {"cross_entropy": partial(F.cross_entropy, **options)}
    if device != "cpu" and find_spec("liger_kernel"):
        others["liger, on a copy"] = partial(_liger, **options)

    def by_row(gradient: Tensor) -> Tensor:
        return gradient.movedim(1, -1).reshape(rows, -1)[picked]

    def exact() -> tuple[Tensor, ...]:
        """A row's gradient is its own: the mean over all of them is the sum over those picked, and a division."""
        leaf = by_row(x.detach()).double().requires_grad_()
        chosen = target.reshape(-1)[picked]
        loss = F.cross_entropy(leaf, chosen, label_smoothing=smoothing, reduction="sum") / rows
        return torch.autograd.grad(loss, [leaf])

    ours = partial(mmkern.cross_entropy, **options)
    return _problem(ours, others, [x], exact, lambda outputs: (by_row(outputs[0]),))


def _liger(x: Tensor, **options: Any) -> Tensor:
    """Liger writes the gradient into the logits, so that they have to be copied to be kept."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(x.clone(), **options)


def _linear(tokens: int, width: int, classes: int, dtype: torch.dtype, device: str) -> Problem:
    hidden = normal(tokens, width, dtype=dtype, seed=1).to(device)
    weight = normal(classes, width, dtype=dtype, seed=2, scale=width**-0.5).to(device)
    target = torch.randint(classes, (tokens,), generator=torch.Generator().manual_seed(3)).to(device)

    def eager(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), target)

    picked, some = sample(tokens, 64).to(device), sample(classes, 64).to(device)

    def exact() -> tuple[Tensor, Tensor]:
        """d loss / d logits = (softmax - one at the target) / tokens: the gradient of some tokens needs their rows of
        it, that of some classes their columns, and a column needs every row's log-sum-exp."""
        h, w = hidden.detach().double(), weight.detach().double()
        lse = torch.cat([(part @ w.T).logsumexp(1) for part in h.split(CHUNK)])
        rows = (h[picked] @ w.T - lse[picked, None]).exp()
        rows[torch.arange(len(picked), device=device), target[picked]] -= 1.0
        columns = (h @ w[some].T - lse[:, None]).exp() - (target[:, None] == some).double()
        return rows @ w / tokens, columns.T @ h / tokens

    ours = partial(mmkern.linear_cross_entropy, target=target)
    given = {"linear + cross_entropy": eager}
    return _problem(ours, given, [hidden, weight], exact, lambda outputs: (outputs[0][picked], outputs[1][some]))


def _problem(
    ours: Callable[..., Tensor],
    theirs: dict[str, Callable[..., Tensor]],
    inputs: Sequence[Tensor],
    exact: Call,
    compared: Callable[[Outputs], Outputs],
) -> Problem:
    def gradients(call: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[[], Any]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        return lambda: torch.autograd.grad(call(*leaves), leaves)

    baselines = [Baseline(name, gradients(call, inputs)) for name, call in theirs.items()]
    return Problem(gradients(ours, inputs), baselines, exact, compared, kind="gradient", inputs=inputs)

"""Softmax and its relatives by their definitions."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkern.reference.gradients import in_order, of_bits
from mmkern.reference.numerics import dropped, wide
from mmkern.reference.numerics import visible as let_through

DIFFERENTIABLE = ("x", "mask", "bias")  # of masked_softmax, in the order of its gradients and of wanted's bits


def softmax(input: Tensor, dim: int) -> Tensor:
    """exp(x_i - max x) / sum_j exp(x_j - max x) along `dim`."""
    e = _shifted(input, dim).exp()
    return (e / e.sum(dim, keepdim=True)).to(input.dtype).contiguous()


def log_softmax(input: Tensor, dim: int) -> Tensor:
    """x_i - max x - log sum_j exp(x_j - max x) along `dim`."""
    shifted = _shifted(input, dim)
    return (shifted - shifted.exp().sum(dim, keepdim=True).log()).to(input.dtype).contiguous()


def softmax_out(input: Tensor, dim: int, out: Tensor) -> None:
    out.copy_(softmax(input, dim))


def log_softmax_out(input: Tensor, dim: int, out: Tensor) -> None:
    out.copy_(log_softmax(input, dim))


def softmax_backward(grad: Tensor, output: Tensor, dim: int) -> Tensor:
    """y * (g - sum_j g_j y_j) along `dim`: the gradient of softmax's input, from its output y."""
    g, y = wide(grad), wide(output)
    return (y * (g - (g * y).sum(dim, keepdim=True))).to(output.dtype).contiguous()


def log_softmax_backward(grad: Tensor, output: Tensor, dim: int) -> Tensor:
    """g - exp(y) sum_j g_j along `dim`: the gradient of log-softmax's input, from its output y."""
    g, y = wide(grad), wide(output)
    return (g - y.exp() * g.sum(dim, keepdim=True)).to(output.dtype).contiguous()


def masked_softmax(
    x: Tensor,
    mask: Tensor | None,
    scale: float,
    bias: Tensor | None,
    dim: int,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> Tensor:
    """Softmax of scale * x + bias (+ mask) over the visible elements along `dim`; 0 where there are none."""
    weights = _masked_weights(x, mask, scale, bias, dim)
    return _dropped(weights, dropout_p, dropout_seed).to(x.dtype).contiguous()


def masked_softmax_backward(
    grad: Tensor,
    output: Tensor | None,
    x: Tensor | None,
    mask: Tensor | None,
    scale: float,
    bias: Tensor | None,
    dim: int,
    dropout_p: float,
    dropout_seed: Tensor | None,
    wanted: int,
) -> tuple[Tensor, ...]:
    """Gradients of `masked_softmax` for what is DIFFERENTIABLE, empty where their bit of `wanted` is not set.

    From its output, or with dropout, which the output does not show, from its input. Elements that a term hides
    get 0, and whatever their gradient is, it reaches nobody.
    """
    weights = wide(output) if output is not None else _masked_weights(x, mask, scale, bias, dim)
    visible = _visible(weights, mask, bias)
    g = torch.where(visible, _dropped(wide(grad), dropout_p, dropout_seed), 0.0)
    w = torch.where(visible, weights, 0.0)
    scores = torch.where(visible, w * (g - (g * w).sum(dim, keepdim=True)), 0.0)
    found: dict[str, Tensor] = {}
    for name in of_bits(DIFFERENTIABLE, wanted):
        if name == "x":
            found[name] = (scores * scale).to(grad.dtype).contiguous()
        elif (term := mask if name == "mask" else bias) is not None:
            found[name] = scores.sum_to_size(term.shape).to(term.dtype).contiguous()
    return in_order(DIFFERENTIABLE, found, grad)


def _visible(like: Tensor, *terms: Tensor | None) -> Tensor:
    """What no mask or bias hides, in the shape of `like`."""
    visible = torch.ones_like(like, dtype=torch.bool)
    for term in terms:
        if term is not None:
            visible = visible & let_through(term)
    return visible


def _masked_weights(x: Tensor | None, mask: Tensor | None, scale: float, bias: Tensor | None, dim: int) -> Tensor:
    """What `masked_softmax` gives before dropout, in the dtype of the arithmetic."""
    assert x is not None
    visible = _visible(x, mask, bias)
    scores = torch.where(visible, wide(x) * scale, -torch.inf)
    for term in (bias, mask):
        if term is not None and term.dtype != torch.bool:
            scores = scores + torch.where(scores == -torch.inf, 0.0, term)
    top = scores.detach().amax(dim, keepdim=True) if scores.numel() else scores
    # What is hidden gets no gradient; a score of -inf gets what the formula gives, NaN beside an infinite one.
    empty = top == -torch.inf
    e = torch.where(visible & ~empty, torch.exp(scores - torch.where(empty, 0.0, top)), 0.0)
    total = e.sum(dim, keepdim=True)
    weights = e / torch.where(total == 0, 1.0, total)
    return torch.where(visible, weights, weights.detach())  # a hidden element's gradient reaches nobody


def _dropped(x: Tensor, dropout_p: float, dropout_seed: Tensor | None) -> Tensor:
    return dropped(x, dropout_p, dropout_seed) if dropout_p < 1 else torch.zeros_like(x)


def _shifted(x: Tensor, dim: int) -> Tensor:
    x = wide(x)
    return x - x.detach().amax(dim, keepdim=True) if x.numel() else x

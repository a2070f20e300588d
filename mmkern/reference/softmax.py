"""Softmax and its relatives by their definitions."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkern.reference.philox import keep_mask


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
    g, y = _wide(grad), _wide(output)
    return (y * (g - (g * y).sum(dim, keepdim=True))).to(output.dtype).contiguous()


def log_softmax_backward(grad: Tensor, output: Tensor, dim: int) -> Tensor:
    """g - exp(y) sum_j g_j along `dim`: the gradient of log-softmax's input, from its output y."""
    g, y = _wide(grad), _wide(output)
    return (g - y.exp() * g.sum(dim, keepdim=True)).to(output.dtype).contiguous()


def masked_softmax(
    input: Tensor,
    mask: Tensor | None,
    scale: float,
    bias: Tensor | None,
    dim: int,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> Tensor:
    """Softmax of scale * x + bias (+ mask) over the visible elements along `dim`; 0 where there are none."""
    weights = _masked_weights(input, mask, scale, bias, dim)
    return _dropout(weights, dropout_p, dropout_seed).to(input.dtype).contiguous()


def masked_softmax_backward(
    grad: Tensor,
    output: Tensor | None,
    input: Tensor | None,
    mask: Tensor | None,
    scale: float,
    bias: Tensor | None,
    dim: int,
    dropout_p: float,
    dropout_seed: Tensor | None,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `masked_softmax` for input, mask and bias, empty where their bit of `wanted` is not set.

    From its output, or with dropout, which the output does not show, from its input. Elements that a term hides
    get 0, and whatever their gradient is, it reaches nobody.
    """
    weights = _wide(output) if output is not None else _masked_weights(input, mask, scale, bias, dim)
    visible = _visible(weights, mask, bias)
    g = torch.where(visible, _dropout(_wide(grad), dropout_p, dropout_seed), 0.0)
    w = torch.where(visible, weights, 0.0)
    scores = torch.where(visible, w * (g - (g * w).sum(dim, keepdim=True)), 0.0)
    dtype = grad.dtype
    found = [(scores * scale).to(dtype).contiguous() if wanted & 1 else scores.new_empty(0, dtype=dtype)]
    for bit, term in ((2, mask), (4, bias)):
        if wanted & bit and term is not None:
            found.append(scores.sum_to_size(term.shape).to(term.dtype).contiguous())
        else:
            found.append(scores.new_empty(0, dtype=dtype))
    return found[0], found[1], found[2]


def _visible(like: Tensor, *terms: Tensor | None) -> Tensor:
    """What no mask or bias hides, in the shape of `like`."""
    visible = torch.ones_like(like, dtype=torch.bool)
    for term in terms:
        if term is not None:
            visible = visible & (term if term.dtype == torch.bool else term != -torch.inf)
    return visible


def _masked_weights(x: Tensor | None, mask: Tensor | None, scale: float, bias: Tensor | None, dim: int) -> Tensor:
    """What `masked_softmax` gives before dropout, in the dtype of the arithmetic."""
    assert x is not None
    visible = _visible(x, mask, bias)
    scores = torch.where(visible, _wide(x) * scale, -torch.inf)
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


def _dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """`x` with elements dropped, which are then 0 whatever they were, and the others divided by 1 - p."""
    if seed is None:
        return x
    shape = (1,) * max(0, 3 - x.dim()) + tuple(x.shape)
    keep = keep_mask(seed, p, shape, x.device).reshape(x.shape)
    return torch.where(keep, x / (1 - p), 0.0) if p < 1 else torch.zeros_like(x)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _shifted(x: Tensor, dim: int) -> Tensor:
    x = _wide(x)
    return x - x.detach().amax(dim, keepdim=True) if x.numel() else x

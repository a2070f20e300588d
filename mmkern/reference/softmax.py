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
    scores = _wide(input) * scale
    visible = torch.ones_like(scores, dtype=torch.bool)
    for term in (bias, mask):
        if term is None:
            continue
        if term.dtype == torch.bool:
            visible = visible & term
        else:
            visible = visible & (term != -torch.inf)
            scores = scores + torch.where(visible, term, 0.0)
    scores = torch.where(visible, scores, -torch.inf)
    top = scores.detach().amax(dim, keepdim=True) if scores.numel() else scores
    e = torch.where(scores == -torch.inf, 0.0, torch.exp(scores - torch.where(top == -torch.inf, 0.0, top)))
    total = e.sum(dim, keepdim=True)
    weights = e / torch.where(total == 0, 1.0, total)
    if dropout_seed is not None:
        shape = (1,) * max(0, 3 - weights.dim()) + tuple(weights.shape)
        keep = keep_mask(dropout_seed, dropout_p, shape, weights.device).reshape(weights.shape)
        weights = torch.where(keep, weights / (1 - dropout_p), 0.0) if dropout_p < 1 else weights * 0.0
    return weights.to(input.dtype).contiguous()


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _shifted(x: Tensor, dim: int) -> Tensor:
    x = _wide(x)
    return x - x.detach().amax(dim, keepdim=True) if x.numel() else x

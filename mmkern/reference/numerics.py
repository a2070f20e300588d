"""What formulas share: the dtype of their arithmetic, what a mask lets take part, and dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkern.reference.philox import keep_mask


def wide(x: Tensor) -> Tensor:
    """float16 and bfloat16 are computed in float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def visible(mask: Tensor) -> Tensor:
    """What a mask lets take part: True of a bool one; all but minus infinity of a float one, which is added."""
    return mask if mask.dtype == torch.bool else mask != -torch.inf


def kept(x: Tensor, dropout_p: float, keep: Tensor) -> Tensor:
    """`x` with elements dropped, which are then 0 whatever they were, and the others divided by 1 - dropout_p.

    Where all are dropped, a NaN stays, as in torch's dropout.
    """
    return torch.where(keep, x / (1 - dropout_p), 0.0) if dropout_p < 1 else x * 0.0


def dropped(x: Tensor, dropout_p: float, dropout_seed: Tensor | None) -> Tensor:
    """`x` after the dropout of a row op, of which the last three dims are heads, rows and columns."""
    if dropout_seed is None:
        return x
    shape = (1,) * max(0, 3 - x.dim()) + tuple(x.shape)
    return kept(x, dropout_p, keep_mask(dropout_seed, dropout_p, shape, x.device).reshape(x.shape))

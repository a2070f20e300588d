"""Softmax as a module."""

from __future__ import annotations

from torch import Tensor, nn

import mmkern


class Softmax(nn.Module):
    """`torch.nn.Softmax`, and a mask if one is given.

    Args:
        dim: the dim to sum over. (torch guesses one for None, and warns; here it must be named.)

    Example:
        >>> import mmkern.nn, torch
        >>> mmkern.nn.Softmax(dim=-1)(torch.zeros(2))
        tensor([0.5000, 0.5000])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """input: any shape. mask: as `mmkern.masked_softmax` takes it. Returns input's shape; raises as they do."""
        if mask is None:
            return mmkern.softmax(input, self.dim)
        return mmkern.masked_softmax(input, mask, dim=self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"

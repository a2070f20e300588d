"""Augmentation of training batches: pictures are cropped, shifted, coloured and occluded, tokens of prompts dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augment:
    """What is done to a batch; each sample is drawn for from a generator of its own.

    Args:
        pictures: crop, shift, jitter and occlude them.
        zoom: sides of a picture are scaled by 1 / (1 - zoom) .. 1 / (1 + zoom), which crops or shrinks it.
        shift: share of the side by which a picture moves at most.
        jitter: brightness and contrast change by this share at most.
        occlusion: chance of a grey rectangle over at most a third of each side.
        token_dropout: chance with which a token of a prompt is left out.
    """

    pictures: bool = True
    zoom: float = 0.08
    shift: float = 0.04
    jitter: float = 0.05
    occlusion: float = 0.1
    token_dropout: float = 0.0

    def images(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """(B, 3, H, W) in [0, 1] and B generators -> the same shape and range."""
        if not self.pictures or not len(images):
            return images
        height, width = images.shape[2:]
        draws = torch.stack([torch.rand(10, generator=generator) for generator in generators])  # in [0, 1)
        zoom, shift, jitter, corner, side, chance = draws.split([1, 2, 2, 2, 2, 1], 1)
        theta = torch.zeros(len(images), 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = 1 + self.zoom * (2 * zoom[:, 0] - 1)
        theta[:, :, 2] = 2 * self.shift * (2 * shift - 1)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        # 1 - x: what comes in from beyond the edge is white, as the background is
        images = 1 - F.grid_sample(1 - images, grid, align_corners=False)
        contrast, brightness = (self.jitter * (2 * jitter - 1))[..., None, None, None].unbind(1)
        images = ((images - 0.5) * (1 + contrast) + 0.5 + brightness).clamp(0, 1)
        hidden = chance[:, 0] < self.occlusion
        y, x = torch.arange(height)[None, :, None] / height, torch.arange(width)[None, None, :] / width
        (top, left), (tall, wide) = corner[:, :, None, None].unbind(1), side[:, :, None, None].div(3).unbind(1)
        inside = (y >= top) & (y < top + tall) & (x >= left) & (x < left + wide) & hidden[:, None, None]
        return images.masked_fill(inside[:, None], 0.5)

    def tokens(self, ids: list[int], generator: torch.Generator) -> list[int]:
        """The tokens of a prompt that are kept, in order."""
        if not self.token_dropout:
            return ids
        kept = torch.rand(len(ids), generator=generator) >= self.token_dropout
        return [token for token, keep in zip(ids, kept.tolist(), strict=True) if keep]

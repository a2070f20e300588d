"""Augmentation of training batches: pictures are cropped, shifted, coloured and occluded, tokens of prompts dropped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augment:
    """What is done to a batch; every draw comes from the generator that is given, and each sample has its own.

    Args:
        pictures: crop, shift, jitter and occlude them.
        zoom: sides of a picture are scaled by 1 / (1 - zoom) .. 1 / (1 + zoom), which crops or shrinks it.
        shift: share of the side by which a picture moves at most.
        jitter: brightness and contrast change by this share at most.
        occlusion: chance of a grey rectangle over at most a third of each side.
        token_dropout: chance with which a token of a prompt is left out.
    """

    pictures: bool = True
    zoom: float = 0.15
    shift: float = 0.08
    jitter: float = 0.1
    occlusion: float = 0.25
    token_dropout: float = 0.0

    def images(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> the same shape and range."""
        if not self.pictures or not len(images):
            return images
        count, _, height, width = images.shape

        def draw(*shape: int) -> Tensor:
            return 2 * torch.rand(count, *shape, generator=generator) - 1

        theta = torch.zeros(count, 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = 1 + self.zoom * draw()
        theta[:, :, 2] = 2 * self.shift * draw(2)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        # 1 - x: what comes in from beyond the edge is white, as the background is
        images = 1 - F.grid_sample(1 - images, grid, align_corners=False)
        scale, offset = 1 + self.jitter * draw(1, 1, 1), self.jitter * draw(1, 1, 1)
        images = ((images - 0.5) * scale + 0.5 + offset).clamp(0, 1)
        corner, side = (draw(2) + 1) / 2, (draw(2) + 1) / 6
        hidden = (draw() + 1) / 2 < self.occlusion
        y, x = torch.arange(height)[None, :, None] / height, torch.arange(width)[None, None, :] / width
        (top, left), (tall, wide) = corner[:, :, None, None].unbind(1), side[:, :, None, None].unbind(1)
        inside = (y >= top) & (y < top + tall) & (x >= left) & (x < left + wide) & hidden[:, None, None]
        return images.masked_fill(inside[:, None], 0.5)

    def tokens(self, ids: list[int], generator: torch.Generator) -> list[int]:
        """The tokens of a prompt that are kept, in order."""
        if not self.token_dropout:
            return ids
        kept = torch.rand(len(ids), generator=generator) >= self.token_dropout
        return [token for token, keep in zip(ids, kept.tolist(), strict=True) if keep]

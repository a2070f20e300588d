"""Pictures: which files are read, how they become squares, and what augmentation does to a batch of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mmkern.training import files
from mmkern.training.files import DataError

# Of what Pillow knows: others run a program (EPS: Ghostscript), or are told by nothing in the file.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
THINNEST = 50  # times as long as wide: of a narrower one a square of 72 pixels shows a line or less


def read(path: Path, decode: bool = True) -> Image.Image:
    """A picture, read to its end; decode=False: its head alone, which tells its kind and size. Raises DataError."""
    Image.init()
    try:
        with files.opened(path) as file, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
            if max(image.size) > THINNEST * min(image.size):
                width, height = image.size
                raise DataError(f"{path}: is {width} x {height}; one side may be {THINNEST} times the other at most")
            if decode:
                image.load()
            return image
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{path}: is no picture that Pillow can read as {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DataError(f"{path}: has more pixels than Pillow's limit, {Image.MAX_IMAGE_PIXELS}") from None
    except Exception as error:  # what decoders raise of a broken file is no closed list
        reason = getattr(error, "strerror", None) or f"is a broken picture ({error or type(error).__name__})"
        raise DataError(f"{path}: {reason}") from None


def square(image: Image.Image, side: int) -> Tensor:
    """(3, side, side) uint8 of a picture: upright, made square with white, and transparent parts white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = image.point(lambda value: value * (1 / 256)).convert("L")  # Pillow alone would clip at 255
    if image.mode != "RGB":
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    longest = max(image.size)
    if longest != side:  # before it is made square, which may be 50 times as large
        width, height = (max(1, round(length * side / longest)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    if image.width != image.height:
        padded = Image.new("RGB", (side, side), "white")
        padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = padded
    content = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return content.view(side, side, 3).permute(2, 0, 1)


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
        """(B, 3, H, W) in [0, 1] and B generators -> the same shape and range; what comes in from beyond is white."""
        if not self.pictures or not len(images):
            return images
        height, width = images.shape[2:]
        draws = torch.stack([torch.rand(10, generator=generator) for generator in generators])  # in [0, 1)
        zoom, shift, jitter, corner, side, chance = draws.split([1, 2, 2, 2, 2, 1], 1)
        theta = torch.zeros(len(images), 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = 1 + self.zoom * (2 * zoom[:, 0] - 1)
        theta[:, :, 2] = 2 * self.shift * (2 * shift - 1)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
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

"""Pictures from files: which are read, and how they become squares."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mmkern.training import files
from mmkern.training.problem import DataError

# Of what Pillow knows: others run a program (EPS: Ghostscript), or are told by nothing in the file.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
THINNEST = 50  # times as long as wide: of a narrower one a square of 72 pixels shows a line or less


def read(path: Path, decode: bool = True) -> Image.Image:
    """A picture, read to its end; decode=False: its head alone, which tells its kind and size.

    Raises:
        DataError: it cannot be read, is larger than Pillow's limit, or too narrow; the message names the file.
    """
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

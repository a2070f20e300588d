"""From pictures to tokens: convolutions and pooling, patches, VGG, or a backbone of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkern.model.config import ModelConfig

# Mean and deviation of a channel in [0, 1]; the first is what weights trained on ImageNet expect.
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PLAIN = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
# Convolutions in each of VGG's five blocks (Simonyan and Zisserman 2014), which have 64, 128, 256, 512, 512 channels.
VGG = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
_VGG_CHANNELS = (64, 128, 256, 512, 512)


class ImageStem(nn.Module):
    """Pictures to grids of features: (B, 3, side, side) in [0, 1] -> (B, height, width, config.width).

    `backbone` holds the transformers configuration that was used, as a dict, or the name of a VGG; None for the others.

    Raises:
        ValueError: a picture cannot be cut into patches, or config.image_stem is neither known here nor a backbone.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.backbone: dict[str, Any] | None = None
        self.statistics = _PLAIN  # numbers, no buffers: meta construction and `to_empty` would leave those undefined
        if config.image_stem == "conv":
            self.features: nn.Module = conv_stem(config.width)
        elif config.image_stem == "patch":
            if config.image_size % config.patch_size:
                raise ValueError(
                    f"patch_size: expected a divisor of image_size = {config.image_size}, got {config.patch_size}"
                )
            self.features = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        elif config.image_stem.removesuffix("_bn") in VGG:
            self.features, self.statistics = vgg(config), _IMAGENET
            self.backbone = {"model_type": config.image_stem}
        else:
            self.features, self.statistics = Backbone(config), _IMAGENET
            self.backbone = self.features.settings

    def forward(self, images: Tensor) -> Tensor:
        wide = images.to(torch.promote_types(images.dtype, torch.float32))  # rounded once, at the end
        channels = [
            (wide[:, c] - mean) / deviation for c, (mean, deviation) in enumerate(zip(*self.statistics, strict=True))
        ]
        x = torch.stack(channels, 1).to(images.dtype, memory_format=torch.channels_last)
        features: Tensor = self.features(x)  # (B, W, height, width)
        return features.permute(0, 2, 3, 1)


def conv_stem(width: int) -> nn.Sequential:
    """Four halvings and then a projection: (B, 3, 72, 72) -> (B, width, 5, 5).

    GroupNorm, so that a picture's tokens do not depend on the pictures beside it; pooling first, so that norm and GELU
    see a quarter of the pixels.
    """
    channels = [max(8, width // 4), max(8, width // 2), width]
    layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 5, stride=2, padding=2)]
    for i, wide in enumerate(channels):
        if i:
            layers.append(nn.Conv2d(channels[i - 1], wide, 3, padding=1))
        layers += [nn.MaxPool2d(2, ceil_mode=True), nn.GroupNorm(1, wide), nn.GELU()]
    return nn.Sequential(*layers, nn.Conv2d(width, width, 1))


def vgg(config: ModelConfig) -> nn.Sequential:
    """The convolutions of a VGG and a projection: (B, 3, side, side) -> (B, width, side // 32, side // 32).

    With config.image_weights, a file that names its tensors as torchvision does ("features.0.weight", ...), as its own
    .pth files and timm's .safetensors do; what belongs to the classifier is left aside. A .pth is read as plain tensors
    alone, so that nothing in it runs. Without, the weights are drawn.
    """
    name, normed = config.image_stem.removesuffix("_bn"), config.image_stem.endswith("_bn")
    layers: list[nn.Module] = []
    seen = 3
    for count, channels in zip(VGG[name], _VGG_CHANNELS, strict=True):
        for _ in range(count):
            layers += [nn.Conv2d(seen, channels, 3, padding=1), *[nn.BatchNorm2d(channels)] * normed, nn.ReLU()]
            seen = channels
        layers.append(nn.MaxPool2d(2))
    body = nn.Sequential(*layers)
    if config.image_weights is not None and config.image_backbone is None:
        _load_vgg(body, Path(config.image_weights), config.image_stem)
    return nn.Sequential(body, nn.Conv2d(seen, config.width, 1))


def _load_vgg(body: nn.Sequential, path: Path, name: str) -> None:
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"image_weights: expected a file with the weights of {name}, got {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
        tensors = {key.removeprefix("features."): t for key, t in found.items() if key.startswith("features.")}
        body.load_state_dict(tensors)
    except Exception as error:  # what the two readers raise of foreign files is no closed list
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"image_weights: {str(path)!r} are not the weights of {name} ({said})") from None


class Backbone(nn.Module):
    """A backbone of transformers by its model type, and a projection to config.width.

    Built from config.image_backbone (its own configuration, as a checkpoint keeps it), else with the weights in the
    folder config.image_weights, else from its default configuration. Nothing is downloaded.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        try:
            from transformers import AutoBackbone, AutoConfig
        except ImportError:
            raise ImportError(
                f"image_stem: {config.image_stem!r} needs transformers: pip install 'mmkern[transformers]'"
            ) from None
        weights = config.image_weights if config.image_backbone is None else None
        if weights is not None and not Path(weights).is_dir():
            raise ValueError(f"image_weights: expected a folder with a transformers model, got {weights!r}")
        if weights is not None and (odd := [p for p in Path(weights).iterdir() if not (p.is_file() or p.is_dir())]):
            raise ValueError(f"image_weights: {odd[0]} is no regular file")  # to read a pipe would wait for ever
        try:
            if weights is None:
                settings = {k: v for k, v in (config.image_backbone or {}).items() if k != "model_type"}
                self.model = AutoBackbone.from_config(AutoConfig.for_model(config.image_stem, **settings))
            else:  # AutoBackbone.from_pretrained would ask the hub, even for a folder
                found = AutoConfig.from_pretrained(weights, local_files_only=True, trust_remote_code=False)
                kind = type(AutoBackbone.from_config(found))
                self.model = kind.from_pretrained(weights, config=found, local_files_only=True, use_safetensors=True)
        except Exception as error:  # what transformers raises of foreign settings is no closed list
            raise ValueError(
                f"image_stem: expected conv, patch, vgg16 (11, 13, 19) or a backbone of transformers, got "
                f"{config.image_stem!r} with image_weights {weights!r} ({str(error)[:200]})"
            ) from None
        if self.model.config.model_type != config.image_stem:
            raise ValueError(
                f"image_stem: {config.image_stem!r}, but image_weights hold {self.model.config.model_type!r}"
            )
        self.settings: dict[str, Any] = self.model.config.to_dict()
        self.projection = nn.Conv2d(self.model.channels[-1], config.width, 1)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.projection(self.model(images).feature_maps[-1])
        return features

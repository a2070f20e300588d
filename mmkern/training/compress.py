"""Smaller models for inference: weights pruned to zero, and weights in int8."""

from __future__ import annotations

import copy
import io
import warnings
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune


@dataclass(frozen=True)
class Size:
    """What a model's weights take."""

    stored: int  # bytes, as they are
    packed: int  # bytes, compressed by zlib: zeros cost next to nothing
    zeros: float  # share of weights that are 0

    def __str__(self) -> str:
        return f"{self.stored / 2**20:.2f} MiB, {self.packed / 2**20:.2f} MiB zipped, {self.zeros:.0%} zeros"


def pruned(model: nn.Module, share: float) -> nn.Module:
    """A copy whose smallest weights are zero: `share` of all matrices but embeddings, by size over the whole model.

    Raises:
        ValueError: share is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"share: expected a number in [0, 1), got {share}")
    model = copy.deepcopy(model)
    weights = [
        (module, name)
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 2
    ]
    prune.global_unstructured(weights, prune.L1Unstructured, amount=share)
    for module, name in weights:
        prune.remove(module, name)
    return model


class Int8(nn.Module):
    """A weight as int8 codes times a float32 scale for each of its rows; `torch.nn.utils.parametrize` applies it."""

    def forward(self, codes: Tensor, scale: Tensor) -> Tensor:
        return codes * scale

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        largest = weight.abs().flatten(1).amax(1).clamp(min=torch.finfo(weight.dtype).tiny)
        scale = (largest / 127).view(-1, *[1] * (weight.dim() - 1))
        return (weight / scale).round().to(torch.int8), scale


def quantized(model: nn.Module) -> nn.Module:
    """A copy in int8; on CPU only.

    Linear layers multiply int8 weights with their input quantised as it comes. All other matrices (attention's input
    projections, convolutions, embeddings) are kept in int8 and become float32 whenever they are used: small, no faster.

    Raises:
        ValueError: the model is not on the CPU, or this torch has no int8 kernels.
    """
    if next(model.parameters()).device.type != "cpu":
        raise ValueError("model: int8 weights run on the CPU only")
    engines = [name for name in torch.backends.quantized.supported_engines if name != "none"]
    if not engines:
        raise ValueError("model: this torch has no int8 kernels")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch names torchao as the successor, which is one more dependency
        from torch.ao.quantization import quantize_dynamic

        model = quantize_dynamic(copy.deepcopy(model).eval().requires_grad_(False), {nn.Linear}, dtype=torch.qint8)
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() >= 2:
                parametrize.register_parametrization(module, name, Int8())
    return model


def size(model: nn.Module) -> Size:
    """What the weights take, and how many of them are zero."""
    written = io.BytesIO()
    state = model.state_dict()
    torch.save(state, written)
    tensors: list[torch.Tensor] = []
    for value in state.values():
        parts = value if isinstance(value, tuple) else (value,)  # a quantised layer packs weight and bias
        tensors += [t.dequantize() if t.is_quantized else t for t in parts if isinstance(t, torch.Tensor)]
    count = sum(t.numel() for t in tensors)
    zeros = sum(int((t == 0).sum()) for t in tensors)
    content = written.getvalue()
    return Size(len(content), len(zlib.compress(content, 1)), zeros / max(1, count))

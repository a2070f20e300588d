"""Arguments of the softmax family, checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkern.ops._checks import autocast_dtype, broadcasts, check_dense, check_device, kind
from mmkern.ops._numbers import integer

_HALVES = (torch.bfloat16, torch.float16)


def check_out(out: Any, input: Tensor) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out: expected a Tensor, got {type(out).__name__}")
    if out.dtype != input.dtype or out.device != input.device or (out.shape != input.shape and out.numel() != 0):
        raise ValueError(
            f"out: expected {tuple(input.shape)} {input.dtype} on {input.device}, "
            f"got {tuple(out.shape)} {out.dtype} on {out.device}"
        )
    if torch.is_grad_enabled() and (input.requires_grad or out.requires_grad):
        raise ValueError("out: an argument requires grad, and writing into out cannot be differentiated")
    if not out.is_contiguous() and any(n > 1 and step == 0 for n, step in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(f"out: shape {tuple(out.shape)} of strides {out.stride()} holds elements twice")
    if out.shape != input.shape:
        out.resize_(input.shape)


def checked_dim(x: Tensor, dim: int, name: str) -> int:
    """`dim` counted from the front, after x and dim are found to be right."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {x.dtype}")
    if type(dim) is not int:
        dim = integer("dim", dim)
    rank = x.dim() or 1
    if not -rank <= dim < rank:
        raise IndexError(f"dim: expected a value in [{-rank}, {rank - 1}] for shape {tuple(x.shape)}, got {dim}")
    return dim + rank if dim < 0 else dim


def checked_term(name: str, t: Any, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """`t`, after it is found to have one of `dtypes`, x's device, and a shape that broadcasts to x's."""
    if isinstance(t, Tensor):
        check_dense(name, t)
    if isinstance(t, Tensor) and t.dtype in _HALVES and t.dtype not in dtypes and autocast_dtype(x) is not None:
        t = t.float()  # autocast mixes the 16-bit dtypes; float32 holds either
    if not isinstance(t, Tensor) or t.dtype not in dtypes:
        raise TypeError(f"{name}: expected a Tensor of {', '.join(map(str, dict.fromkeys(dtypes)))}, got {kind(t)}")
    check_device(name, t, "x", x)
    if (
        t.dim() == x.dim() and t.shape == x.shape
    ):  # of other ranks, torch.export would compare the first dims, and fix them
        return t
    if not broadcasts(t, x.shape):
        raise ValueError(f"{name}: shape {tuple(t.shape)} does not broadcast to x's {tuple(x.shape)}")
    return t

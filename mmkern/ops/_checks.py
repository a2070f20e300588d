"""What public functions ask of any tensor, and what every backend agrees on: dtypes, layouts, a seed for dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of every backend's kernels
DTYPES = (*KERNEL_DTYPES, torch.float64)  # and of the reference
PLAIN = frozenset((Tensor, torch.nn.Parameter))  # the types that no __torch_dispatch__ stands behind


def kind(value: object) -> str:
    """What to call a wrong argument in an error."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def check_dense(name: str, t: Tensor) -> None:
    """Raise TypeError if elements of t do not lie in memory by strides, or are not the numbers they stand for."""
    if t.layout is not torch.strided or t.is_nested or t.is_quantized:
        found = "nested" if t.is_nested else t.dtype if t.is_quantized else t.layout
        raise TypeError(f"{name}: expected a dense tensor, got a {found} one")


def check_device(name: str, t: Tensor, other: str, of_other: Tensor) -> None:
    if t.device != of_other.device:
        raise ValueError(f"{name}: on device {t.device} where {other} is on {of_other.device}")


def broadcasts(t: Tensor, shape: tuple[int, ...]) -> bool:
    missing = len(shape) - t.dim()
    return missing >= 0 and all(n in (1, m) for n, m in zip(t.shape, shape[missing:], strict=True))


def check_memory(name: str, t: Tensor) -> None:
    """ValueError unless the storage of a dense tensor holds all of its elements: it may have been freed."""
    if t.layout != torch.strided or t.device.type == "meta" or t.numel() == 0:
        return
    steps = zip(t.shape, t.stride(), strict=True)
    end = (t.storage_offset() + 1 + sum((n - 1) * step for n, step in steps)) * t.element_size()
    if end > t.untyped_storage().nbytes():
        raise ValueError(
            f"{name}: its storage of {t.untyped_storage().nbytes()} bytes does not hold the elements of shape "
            f"{tuple(t.shape)} and strides {t.stride()}; was it freed?"
        )


def autocast_dtype(t: Tensor) -> torch.dtype | None:
    """What autocast turns tensors on t's device into; None where it is off, or unknown as on "meta"."""
    device = t.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def dropout_seed(dropout_p: float, like: Tensor) -> Tensor | None:
    """The seed of a call, where it drops anything.

    One draw from the device's default generator: manual_seed and checkpointing work as with torch's dropout.
    """
    if not dropout_p:
        return None
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=like.device)


def transformed() -> bool:
    """Whether forward-mode AD or a torch.func transform is on: these act on torch's own ops, so on the reference."""
    return forward_ad._current_level >= 0 or _are_functorch_transforms_active()


def by_value(*tensors: Any) -> bool:
    """Whether these can be read and written as what they are: nothing is traced, faked, batched or spread."""
    if transformed() or torch.compiler.is_compiling():
        return False
    return all(type(t) in PLAIN and not torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors)

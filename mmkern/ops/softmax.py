"""Softmax and its relatives."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkern import reference
from mmkern.ops.dispatch import Op


def _refuse_cpu(input: Tensor, *_: object) -> str | None:
    if input.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the CPU kernels take float32, bfloat16 and float16, not {input.dtype}"
    return None


_softmax = Op(
    "softmax_fwd(Tensor input, int dim) -> Tensor",
    reference=reference.softmax,
    fake=lambda input, dim: torch.empty_like(input),
    kernels={"cpu": _refuse_cpu},
)


def softmax(input: Tensor, dim: int) -> Tensor:
    return _softmax(input, dim)

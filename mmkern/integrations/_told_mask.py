"""A mask of which attention knows what it hides without reading it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

# What a ToldMask answers without being written out.
_FACTS = {
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cpu", "is_cuda",
                                               "is_meta", "is_nested", "is_sparse", "requires_grad", "grad_fn")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point}  # fmt: skip


def added(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask to add to scores that Transformers' eager attention gets: 0, or the lowest finite number."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


class ToldMask(Tensor):
    """A mask (batch, 1, q_len, k_len) that is causal, or hides each row's last keys, or both: bool, or to be added.

    Its memory is one element. Whoever computes with it, slices it, moves it or edits it gets, and edits, the written
    mask, which is then also what attention reads (`written`).

    is_causal: key j is hidden from query i where j > i.
    key_lengths: int64 (batch,): keys from there on are hidden; or None.
    """

    is_causal: bool
    key_lengths: Tensor | None
    written: Tensor | None

    @classmethod
    def tell(
        cls, shape: tuple[int, ...], dtype: torch.dtype, device: Any, *, is_causal: bool, lengths: Tensor | None
    ) -> ToldMask:
        mask = torch.zeros((), dtype=dtype, device=device).expand(shape).as_subclass(cls)
        mask.is_causal, mask.key_lengths, mask.written = is_causal, lengths, None
        return mask

    def write(self) -> Tensor:
        """The mask as a plain tensor, made once."""
        if self.written is None:
            batch, _, q_len, k_len = self.shape
            key = torch.arange(k_len, device=self.device)
            visible = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=self.device)
            if self.is_causal:
                visible = visible & (key <= torch.arange(q_len, device=self.device)[:, None])
            if self.key_lengths is not None:
                visible = visible & (key < self.key_lengths[:, None, None, None])
            mask = visible if self.dtype == torch.bool else added(visible, self.dtype)
            self.written = mask.expand(batch, 1, q_len, k_len).contiguous()  # an edit is of one row
        return self.written

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func not in _FACTS:
                args, kwargs = tree_map(lambda t: t.write() if isinstance(t, ToldMask) else t, (args, kwargs or {}))
            return func(*args, **(kwargs or {}))

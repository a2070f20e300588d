"""Arguments of positional encodings, checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkern.ops._checks import DTYPES, autocast_dtype, check_dense, kind
from mmkern.ops._numbers import integer

ENCODINGS = ("sinusoidal", "scalar", "sincos2d")


def promoted(x: Tensor, encoding: Any) -> tuple[torch.dtype, Any]:
    """The dtype of `x + table` as torch promotes it under autocast, and the table in it; else x's own."""
    if isinstance(encoding, Tensor) and encoding.dtype in DTYPES and autocast_dtype(x) is not None:
        dtype = torch.promote_types(x.dtype, encoding.dtype)
        return dtype, encoding.to(dtype)
    return x.dtype, encoding


def checked_positions(
    name: str, encoding: str | Tensor, offset: int | Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[str, Tensor | None, int, Tensor | None]:
    """The checked schema arguments (encoding, table, offset, offsets) for activations of `shape`."""
    length, dim = shape[-2], shape[-1]
    table: Tensor | None = None
    offsets: Tensor | None = None
    if not isinstance(encoding, str):
        table, name_of = encoding, "table"
        if not isinstance(table, Tensor):
            raise TypeError(f"encoding: expected a name or a tensor, got {kind(table)}")
        check_dense("encoding", table)
        if table.dim() != 2 or table.shape[1] != dim:
            raise ValueError(f"encoding: expected a table (max_length, {dim}), got shape {tuple(table.shape)}")
        if table.dtype != dtype:
            raise TypeError(f"encoding: the table has {table.dtype}, what it is added to {dtype}")
    else:
        name_of = encoding
        if name_of == "sincos2d" and (len(shape) < 3 or dim % 4):
            raise ValueError(
                f"{name}: 'sincos2d' takes (..., height, width, dim) with dim divisible by 4, got shape {tuple(shape)}"
            )
        if name_of != "none" and name_of not in ENCODINGS:
            raise ValueError(f"encoding: expected a tensor or one of {', '.join(ENCODINGS)}, got {encoding!r}")
    if isinstance(offset, Tensor) and (offset.dim() > 0 or len(shape) > 2):
        offsets, offset = offset, 0
        if offsets.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"offset: expected an int or a tensor of int64 or int32, got {kind(offsets)}")
        check_dense("offset", offsets)
        if len(shape) < 3 or (offsets.shape != shape[:1] and offsets.shape not in ((), (1,))):
            raise ValueError(
                f"offset: expected one per batch entry of {name}, got shape {tuple(offsets.shape)} for {tuple(shape)}"
            )
        offsets = offsets.long().expand(shape[0]).contiguous()
    elif (offset := integer("offset", offset)) < 0:
        raise ValueError(f"offset: expected an int >= 0 or a tensor, got {offset!r}")
    elif table is not None and offset + length > table.shape[0]:
        raise IndexError(
            f"offset: {offset} + length {length} = {offset + length} exceeds max_length {table.shape[0]} of the table"
        )
    if name_of == "sincos2d" and (offsets is not None or offset):
        raise ValueError("offset: 'sincos2d' takes none, a grid starts at row 0, column 0")
    return name_of, table, offset, offsets

"""Positions told by turning queries and keys (rotary), and by a bias on the scores (ALiBi)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from mmkern import reference
from mmkern.ops._autograd import Values
from mmkern.ops._checks import DTYPES, check_dense, kind
from mmkern.ops._numbers import integer, number
from mmkern.ops.dispatch import CPU, TRITON, Kernel, Op
from mmkern.ops.position import _empty_rows


def _turn_back(grads: Values, args: Any, outputs: Values, wanted: Collection[str]) -> dict[str, Tensor]:
    """The gradient of turning is the gradient of the result, turned back; nothing of q or k is needed."""
    where = args.positions, args.base, args.layout, args.rotary_dim, args.grid, not args.inverse
    asked = {name: grad for name, grad in zip("qk", grads, strict=False) if grad is not None and name in wanted}
    if len(asked) == 2:
        return dict(zip("qk", _rotary_qk(*asked.values(), *where), strict=True))
    return {name: _rotary(grad, *where) for name, grad in asked.items()}


def _save(args: Any, outputs: Values, wanted: Collection[str]) -> tuple[Values, Values]:
    """Positions and options; the positions copied, since a caller may count them up in place."""
    positions = None if args.positions is None else args.positions.clone()
    turned = dict.fromkeys(name for name in ("q", "k") if name in args._fields)
    return args._replace(positions=positions, **turned), ()


_rotary = Op(
    "rotary_fwd(Tensor q, Tensor? positions, float base, str layout, SymInt rotary_dim, int[]? grid, bool inverse) "
    "-> Tensor",
    reference=reference.rotary,
    fake=lambda q, *_: _empty_rows(q),
    kernels=[Kernel(CPU), Kernel(TRITON, "rotary.rotary_fwd")],
    dtype_of=["q"],
    backward=_turn_back,
    save=_save,
)
_rotary_qk = Op(
    "rotary_qk_fwd(Tensor q, Tensor k, Tensor? positions, float base, str layout, SymInt rotary_dim, int[]? grid, "
    "bool inverse) -> (Tensor, Tensor)",
    reference=reference.rotary_qk,
    fake=lambda q, k, *_: (_empty_rows(q), _empty_rows(k)),
    kernels=[Kernel(CPU), Kernel(TRITON, "rotary.rotary_qk_fwd")],
    dtype_of=["q"],
    backward=_turn_back,
    save=_save,
)


@overload
def rotary(
    q: Tensor,
    k: None = None,
    positions: Tensor | None = None,
    *,
    base: float = ...,
    layout: str = ...,
    rotary_dim: int | None = ...,
    grid: tuple[int, int] | None = ...,
) -> Tensor: ...
@overload
def rotary(
    q: Tensor,
    k: Tensor,
    positions: Tensor | None = None,
    *,
    base: float = ...,
    layout: str = ...,
    rotary_dim: int | None = ...,
    grid: tuple[int, int] | None = ...,
) -> tuple[Tensor, Tensor]: ...
def rotary(
    q: Tensor,
    k: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    base: float = 10000.0,
    layout: str = "half",
    rotary_dim: int | None = None,
    grid: tuple[int, int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Rotary position embedding (Su et al. 2021, "RoFormer") of queries and keys, both in one pass.

    Pair i of the first `rotary_dim` channels of a row at position p is turned by p * base^(-2i / rotary_dim)
    radians: (a, b) becomes (a cos - b sin, b cos + a sin). The other channels stay.

    Args:
        q: (..., length, dim), float32, bfloat16, float16 or float64; any strides with the last dim contiguous are
            read where they lie, so a transposed (batch, length, heads, dim) projection is not copied.
        k: q's rank, length, dim and dtype, and q's batch (first of four or more dims); the heads may differ.
            None turns q alone.
        positions: int64 or int32 (length,), or (batch, length) with batch = q.shape[0] or 1, any value; None: 0, 1, 2,
            ...
        base: > 0; 10000 in the paper, 500000 in Llama 3.
        layout: "half" pairs channels (i, i + rotary_dim/2), as GPT-NeoX and Llama do (rotate_half); "interleaved" pairs
            (2i, 2i+1), as the paper and GPT-J do.
        rotary_dim: even, at most dim; None: dim.
        grid: (height, width): 2-D axial rotary for images. Position p is row p // width, column p % width; the first
            half of the pairs turns by the row, the second by the column, each with base^(-4i / rotary_dim), i counted
            within the half. rotary_dim must be divisible by 4, and without positions length = height * width.

    Returns:
        q turned, or (q turned, k turned): q's and k's shapes and dtypes, and their strides where the last
            dim is contiguous and there are up to four dims, else contiguous.
        Angles are exact to 1e-9 radians up to position 2^20.

    Raises:
        TypeError: dtypes. ValueError: shapes and options.

    Example:
        >>> import mmkern, torch
        >>> mmkern.rotary(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        tensor([[1.0000, 0.0000],
                [0.5403, 0.8415]])
    """
    if has_torch_function_variadic(q, k, positions):
        options: dict[str, Any] = {"base": base, "layout": layout, "rotary_dim": rotary_dim, "grid": grid}
        return handle_torch_function(rotary, (q, k, positions), q, k, positions, **options)  # type: ignore[arg-type]
    if not isinstance(q, Tensor) or q.dtype not in DTYPES:
        raise TypeError(f"q: expected a floating-point tensor, got {kind(q)}")
    check_dense("q", q)
    if q.dim() < 2:
        raise ValueError(f"q: expected (..., length, dim), got shape {tuple(q.shape)}")
    shape = q.shape
    length, dim = shape[-2], shape[-1]
    if k is not None:
        if not isinstance(k, Tensor) or k.dtype != q.dtype:
            raise TypeError(f"k: expected a tensor of q's dtype {q.dtype}, got {kind(k)}")
        check_dense("k", k)
        k_shape = k.shape
        same = len(k_shape) == len(shape) and k_shape[-2] == length and k_shape[-1] == dim
        if not same or (len(shape) > 3 and k_shape[0] != shape[0]):
            raise ValueError(
                f"k: expected q's rank, batch, length and dim, got k {tuple(k.shape)} and q {tuple(q.shape)}"
            )
    if positions is not None:
        if not isinstance(positions, Tensor) or positions.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"positions: expected a tensor of int64 or int32, got {kind(positions)}")
        check_dense("positions", positions)
        positions = positions.long()
        if positions.dim() == 2 and positions.shape[0] == 1:  # one row for all
            positions = positions[0]
        expected = (length,) if positions.dim() == 1 or q.dim() < 3 else (shape[0], length)
        if positions.dim() != len(expected) or positions.shape != expected:
            raise ValueError(
                f"positions: expected (length,) or (batch, length), got {tuple(positions.shape)} for q {tuple(q.shape)}"
            )
        if k is not None and positions.dim() == 2 and k.shape[0] != q.shape[0]:
            raise ValueError(f"k: expected q's batch with 2-D positions, got k {tuple(k.shape)} and q {tuple(q.shape)}")
    if layout not in ("half", "interleaved"):
        raise ValueError(f"layout: expected 'half' or 'interleaved', got {layout!r}")
    base = number("base", base)
    if not base > 0:
        raise ValueError(f"base: expected a number above 0, got {base!r}")
    rotary_dim = dim if rotary_dim is None else integer("rotary_dim", rotary_dim)
    if not 0 < rotary_dim <= dim or rotary_dim % (2 if grid is None else 4):
        need = "even" if grid is None else "divisible by 4 with a grid"
        raise ValueError(f"rotary_dim: expected 1..dim = {dim} and {need}, got {rotary_dim}")
    if grid is not None:
        if not isinstance(grid, (tuple, list)) or len(grid) != 2:
            raise TypeError(f"grid: expected a pair (height, width), got {grid!r}")
        height, width = grid = integer("grid", grid[0]), integer("grid", grid[1])
        if height < 1 or width < 1 or (positions is None and height * width != length):
            raise ValueError(f"grid: expected height * width = length {length} without positions, got {grid!r}")
    where = (positions, base, layout, rotary_dim, grid, False)
    return _rotary(q, *where) if k is None else _rotary_qk(q, k, *where)


def alibi_slopes(
    num_heads: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """Slopes of attention with linear biases (Press et al. 2022, "Train short, test long").

    For n = num_heads a power of two, slope h is 2^(-8 (h + 1) / n). Otherwise those of the power of two below n come
    first, then every other slope of the power of two above, as the paper's code has it.

    Args:
        num_heads: number of attention heads, at least 1.
        dtype, device: of the result.

    Returns:
        (num_heads,); the bias of key j for query i in head h is -slope[h] * (i - j).

    Raises:
        ValueError: num_heads < 1.

    Example:
        >>> import mmkern
        >>> mmkern.alibi_slopes(3)
        tensor([0.0625, 0.0039, 0.2500])
    """
    if (num_heads := integer("num_heads", num_heads)) < 1:
        raise ValueError(f"num_heads: expected at least 1, got {num_heads}")
    below = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (h + 1) / below) for h in range(below)]
    slopes += [2.0 ** (-4 * (h + 1) / below) for h in range(0, 2 * (num_heads - below), 2)]
    return torch.tensor(slopes, dtype=dtype, device=device)

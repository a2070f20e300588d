"""Positional encodings added to activations or to looked-up embeddings."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from mmkern import reference
from mmkern.ops._autograd import Values
from mmkern.ops._checks import DTYPES, check_dense, dropout_seed, kind
from mmkern.ops._numbers import integer, number, probability
from mmkern.ops._position_arguments import checked_positions, promoted
from mmkern.ops.dispatch import CPU, TRITON, Kernel, Op


def _has_rows(x: Tensor) -> bool:
    return (x.shape[-1] <= 1 or x.stride(-1) == 1) and (x.dim() <= 4 or x.is_contiguous())


def _empty_rows(x: Tensor) -> Tensor:
    """What the kernels allocate for x (csrc/cpu/tensor.h: empty_rows)."""
    out = torch.empty_like(x)
    return out if _has_rows(x) and _has_rows(out) else torch.empty_like(x.contiguous())


_table_backward = Op(
    "position_table_bwd(Tensor grad, SymInt max_length, SymInt offset, Tensor? offsets, float dropout_p, "
    "Tensor? dropout_seed) -> Tensor",
    reference=reference.position_table_gradient,
    fake=lambda grad, max_length, *_: grad.new_empty(max_length, grad.shape[-1]),
    kernels=[Kernel(CPU), Kernel(TRITON, "position.position_table_bwd")],
    dtype_of=["grad"],
)
_embed_backward = Op(
    "embed_tokens_bwd(Tensor grad, Tensor tokens, SymInt vocabulary, float scale, float dropout_p, int? padding_idx, "
    "Tensor? dropout_seed) -> Tensor",
    reference=reference.embedding_gradient,
    fake=lambda grad, tokens, vocabulary, *_: grad.new_empty(vocabulary, grad.shape[-1]),
    kernels=[Kernel(CPU), Kernel(TRITON, "position.embed_tokens_bwd")],
    dtype_of=["grad"],
)


def _add_backward(grads: Values, args: Any, outputs: Values, wanted: Collection[str]) -> dict[str, Tensor]:
    (grad,) = grads
    found = {}
    if "x" in wanted:  # scaled and dropped as x was, with nothing added
        found["x"] = _add(grad, "none", None, 0, None, args.scale, args.dropout_p, args.dropout_seed)
    if "table" in wanted:
        found["table"] = _table_gradient(grad, args)
    return found


def _table_gradient(grad: Tensor, args: Any) -> Tensor:
    return _table_backward(grad, args.table, args.offset, args.offsets, args.dropout_p, args.dropout_seed)


def _embed_tokens_backward(grads: Values, args: Any, outputs: Values, wanted: Collection[str]) -> dict[str, Tensor]:
    (grad,) = grads
    found = {}
    if "weight" in wanted:
        options = args.scale, args.dropout_p, args.padding_idx, args.dropout_seed
        found["weight"] = _embed_backward(grad, args.tokens, args.weight, *options)
    if "table" in wanted:
        found["table"] = _table_gradient(grad, args)
    return found


def _with_sizes(args: Any, wanted: Collection[str]) -> Any:
    """The arguments with the table's number of rows in its place, as far as backward reads them.

    Offsets are a few numbers, which a caller may count up in place: they are copied.
    """
    if "table" not in wanted:
        return args._replace(table=None, offset=0, offsets=None)
    offsets = None if args.offsets is None else args.offsets.clone()
    return args._replace(table=args.table.shape[0], offsets=offsets)


def _save_added(args: Any, outputs: Values, wanted: Collection[str]) -> tuple[Values, Values]:
    return _with_sizes(args, wanted)._replace(x=None), ()


def _save_embedding(args: Any, outputs: Values, wanted: Collection[str]) -> tuple[Values, Values]:
    tokens = args.tokens if "weight" in wanted else None
    return _with_sizes(args, wanted)._replace(tokens=tokens, weight=args.weight.shape[0]), ()


_add = Op(
    "add_positional_encoding_fwd(Tensor x, str encoding, Tensor? table, SymInt offset, Tensor? offsets, float scale, "
    "float dropout_p, Tensor? dropout_seed) -> Tensor",
    reference=reference.add_positional_encoding,
    fake=lambda x, *_: _empty_rows(x),
    kernels=[Kernel(CPU), Kernel(TRITON, "position.add_positional_encoding_fwd")],
    dtype_of=["x"],
    backward=_add_backward,
    save=_save_added,
)
_embed = Op(
    "embed_tokens_fwd(Tensor tokens, Tensor weight, str encoding, Tensor? table, SymInt offset, Tensor? offsets, "
    "float scale, float dropout_p, int? padding_idx, Tensor? dropout_seed) -> Tensor",
    reference=reference.embed_tokens,
    fake=lambda tokens, weight, *_: weight.new_empty(*tokens.shape, weight.shape[1]),
    kernels=[Kernel(CPU), Kernel(TRITON, "position.embed_tokens_fwd")],
    dtype_of=["weight"],
    backward=_embed_tokens_backward,
    save=_save_embedding,
)


def add_positional_encoding(
    x: Tensor,
    encoding: str | Tensor = "sinusoidal",
    *,
    offset: int | Tensor = 0,
    scale: float = 1.0,
    dropout_p: float = 0.0,
) -> Tensor:
    """`dropout(scale * x + encoding)`, row t of x at position `offset + t`, in one pass over x.

    Args:
        x: (..., length, dim), float32, bfloat16, float16 or float64; for "sincos2d" (..., height, width, dim).
            Read where it lies if its last dim is contiguous.
        encoding:
            "sinusoidal" (Vaswani et al. 2017, "Attention is all you need"): channel 2i is
            sin(position / 10000^(2i / dim)), channel 2i+1 its cosine. dim may be odd.
            "scalar": sin(position / 10000) + cos(position / 10000) in every channel.
            "sincos2d", for image grids, as MAE and ViT have it (He et al. 2022): the first half of the channels
            encodes the column, the second the row; in each half, dim/4 sines, then as many cosines, with
            frequencies 10000^(-4i / dim). dim must be divisible by 4, offset 0.
            A tensor (max_length, dim) of x's dtype: a learned table, which gets a gradient. Under autocast dtypes
            may differ: both become what `x + table` gives.
        offset: position of the first row, >= 0; or tensor of int64 or int32, one for each batch entry (x.shape[0],),
            a cache's lengths, or one for all. Positions wrap as int64 does.
        scale: factor on x, usually 1 or sqrt(dim).
        dropout_p: probability in [0, 1] of zeroing an element; the others grow by 1 / (1 - dropout_p).

    Returns:
        x's shape and dtype; x's strides if its last dim is contiguous and it has up to four dims, else contiguous.
        Sines and cosines are within 3e-7 up to position 2^28, with the same bits at a position whatever the offset.

    Raises:
        TypeError: dtypes. ValueError: shapes, an unknown encoding, a negative offset, dropout_p.
        IndexError: offset + length exceeds the table's max_length.

    Example:
        >>> import mmkern, torch
        >>> mmkern.add_positional_encoding(torch.zeros(1, 2, 4))
        tensor([[[0.0000, 1.0000, 0.0000, 1.0000],
                 [0.8415, 0.5403, 0.0100, 0.9999]]])
    """
    if has_torch_function_variadic(x, encoding, offset):
        options: dict[str, Any] = {"offset": offset, "scale": scale, "dropout_p": dropout_p}
        return handle_torch_function(add_positional_encoding, (x, encoding, offset), x, encoding, **options)
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        raise TypeError(f"x: expected a floating-point tensor, got {kind(x)}")
    check_dense("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: expected (..., length, dim), got shape {tuple(x.shape)}")
    dtype, encoding = promoted(x, encoding)
    x = x.to(dtype)
    where = checked_positions("x", encoding, offset, x.shape, x.dtype)
    scale, dropout_p = number("scale", scale), probability("dropout_p", dropout_p)
    return _add(x, *where, scale, dropout_p, dropout_seed(dropout_p, x))


def embed_tokens(
    tokens: Tensor,
    weight: Tensor,
    encoding: str | Tensor | None = None,
    *,
    offset: int | Tensor = 0,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    padding_idx: int | None = None,
) -> Tensor:
    """`dropout(scale * weight[tokens] + encoding)`: lookup, scale and positions in one pass.

    Args:
        tokens: (..., length), int32 or int64, each in [0, vocabulary).
        weight: (vocabulary, dim), float32, bfloat16, float16 or float64.
        encoding: None, or as in `add_positional_encoding`, without "sincos2d".
        offset: as there; a tensor has shape (tokens.shape[0],).
        scale: factor on the looked-up rows (Vaswani et al. 2017 use sqrt(dim)).
        dropout_p: as in `add_positional_encoding`.
        padding_idx: row of weight that gets no gradient, as in `torch.nn.functional.embedding`.

    Returns:
        (..., length, dim), contiguous, dtype of weight.

    Raises:
        TypeError, ValueError: as `add_positional_encoding`. IndexError: a token outside the vocabulary, a position
        outside the table, padding_idx outside weight; nothing has been written then. On a GPU, where no value is read
        before the launch, such a row is NaN instead. In backward, tokens that were filled anew with ids outside the
        vocabulary add to no row of the gradient.

    Example:
        >>> import mmkern, torch
        >>> mmkern.embed_tokens(torch.tensor([1, 0]), torch.eye(2), scale=3.0)
        tensor([[0., 3.],
                [3., 0.]])
    """
    if has_torch_function_variadic(tokens, weight, encoding, offset):
        options: dict[str, Any] = {"offset": offset, "scale": scale, "dropout_p": dropout_p, "padding_idx": padding_idx}
        given = tokens, weight, encoding, offset
        return handle_torch_function(embed_tokens, given, tokens, weight, encoding, **options)
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"tokens: expected an int64 or int32 tensor, got {kind(tokens)}")
    if not isinstance(weight, Tensor) or weight.dtype not in DTYPES:
        raise TypeError(f"weight: expected a floating-point tensor, got {kind(weight)}")
    check_dense("tokens", tokens)
    check_dense("weight", weight)
    if tokens.dim() < 1 or weight.dim() != 2:
        raise ValueError(
            f"expected tokens (..., length) and weight (vocabulary, dim), "
            f"got {tuple(tokens.shape)} and {tuple(weight.shape)}"
        )
    if isinstance(encoding, str) and encoding == "sincos2d":
        raise ValueError("encoding: 'sincos2d' is for image grids; tokens take 'sinusoidal', 'scalar' or a table")
    dtype, encoding = promoted(weight, encoding)
    if dtype != weight.dtype and encoding is not None:  # the looked-up rows are converted, not the whole weight
        rows = embed_tokens(tokens, weight, padding_idx=padding_idx).to(dtype)
        return add_positional_encoding(rows, encoding, offset=offset, scale=scale, dropout_p=dropout_p)
    vocabulary, dim = weight.shape
    where = checked_positions(
        "tokens", "none" if encoding is None else encoding, offset, (*tokens.shape, dim), weight.dtype
    )
    scale, dropout_p = number("scale", scale), probability("dropout_p", dropout_p)
    if padding_idx is not None:
        padding_idx = integer("padding_idx", padding_idx)
        if not -vocabulary <= padding_idx < vocabulary:
            raise IndexError(f"padding_idx: {padding_idx} is outside the vocabulary of {vocabulary} rows of weight")
        padding_idx %= vocabulary
    return _embed(tokens, weight, *where, scale, dropout_p, padding_idx, dropout_seed(dropout_p, weight))

"""Softmax, log-softmax and masked softmax."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

from mmkern import reference
from mmkern.ops._autograd import Values
from mmkern.ops._checks import check_dense, dropout_seed
from mmkern.ops._numbers import number, probability
from mmkern.ops._softmax_arguments import check_out, checked_dim, checked_term
from mmkern.ops.dispatch import CPU, CUDA, TRITON, Kernel, Op
from mmkern.reference.gradients import bits, in_order, of_bits
from mmkern.reference.softmax import DIFFERENTIABLE


def _fake(input: Tensor, *_: object) -> Tensor:
    return input.new_empty(input.shape)


def _fake_backward(grad: Tensor, output: Tensor, dim: int) -> Tensor:
    return output.new_empty(output.shape)


_softmax_backward = Op(
    "softmax_bwd(Tensor grad, Tensor output, int dim) -> Tensor",
    reference.softmax_backward,
    _fake_backward,
    kernels=[Kernel(CPU), Kernel(CUDA), Kernel(TRITON, "softmax.softmax_bwd")],
    dtype_of=["grad"],
)
_log_softmax_backward = Op(
    "log_softmax_bwd(Tensor grad, Tensor output, int dim) -> Tensor",
    reference.log_softmax_backward,
    _fake_backward,
    kernels=[Kernel(CPU), Kernel(CUDA), Kernel(TRITON, "softmax.log_softmax_bwd")],
    dtype_of=["grad"],
)


def _save_output(args: Any, outputs: Values, wanted: Collection[str]) -> tuple[Values, Values]:
    return (None, args.dim), outputs


_softmax = Op(
    "softmax_fwd(Tensor input, int dim) -> Tensor",
    reference.softmax,
    _fake,
    kernels=[Kernel(CPU), Kernel(CUDA), Kernel(TRITON, "softmax.softmax_fwd")],
    dtype_of=["input"],
    backward=lambda grads, args, outputs, wanted: {"input": _softmax_backward(grads[0], outputs[0], args.dim)},
    save=_save_output,
)
_log_softmax = Op(
    "log_softmax_fwd(Tensor input, int dim) -> Tensor",
    reference.log_softmax,
    _fake,
    kernels=[Kernel(CPU), Kernel(CUDA), Kernel(TRITON, "softmax.log_softmax_fwd")],
    dtype_of=["input"],
    backward=lambda grads, args, outputs, wanted: {"input": _log_softmax_backward(grads[0], outputs[0], args.dim)},
    save=_save_output,
)
_softmax_out = Op(
    "softmax_out(Tensor input, int dim, Tensor(a!) out) -> ()",
    reference.softmax_out,
    lambda input, dim, out: None,
    kernels=[Kernel(CPU), Kernel(CUDA), Kernel(TRITON, "softmax.softmax_out")],
    dtype_of=["input"],
)
_log_softmax_out = Op(
    "log_softmax_out(Tensor input, int dim, Tensor(a!) out) -> ()",
    reference.log_softmax_out,
    lambda input, dim, out: None,
    kernels=[Kernel(CPU), Kernel(CUDA), Kernel(TRITON, "softmax.log_softmax_out")],
    dtype_of=["input"],
)


def _fake_masked_backward(
    grad: Tensor, output: Tensor | None, x: Tensor | None, mask: Tensor | None, scale: float, bias: Tensor | None,
    dim: int, dropout_p: float, dropout_seed: Tensor | None, wanted: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    terms = {"x": grad, "mask": mask, "bias": bias}
    found = {name: t.new_empty(t.shape) for name in of_bits(DIFFERENTIABLE, wanted) if (t := terms[name]) is not None}
    return in_order(DIFFERENTIABLE, found, grad)


_masked_softmax_backward = Op(
    "masked_softmax_bwd(Tensor grad, Tensor? output, Tensor? x, Tensor? mask, float scale, Tensor? bias, int dim, "
    "float dropout_p, Tensor? dropout_seed, int wanted) -> (Tensor, Tensor, Tensor)",
    reference.masked_softmax_backward,
    _fake_masked_backward,
    kernels=[Kernel(CPU), Kernel(TRITON, "softmax.masked_softmax_bwd")],
    dtype_of=["grad"],
)


def _masked_backward(grads: Values, args: Any, outputs: Values, wanted: Collection[str]) -> dict[str, Tensor]:
    found = _masked_softmax_backward(grads[0], outputs[0], *args, bits(DIFFERENTIABLE, wanted))
    return {name: gradient for name, gradient in zip(DIFFERENTIABLE, found, strict=True) if name in wanted}


def _save_masked(args: Any, outputs: Values, wanted: Collection[str]) -> tuple[Values, Values]:
    """The output, which whatever comes next keeps too. With dropout it no longer shows all weights: then the input,
    from which the kernel computes them again. Keeping them instead would cost as much, and a write in forward."""
    return (args._replace(x=None), outputs) if args.dropout_seed is None else (args, (None,))


_masked_softmax = Op(
    "masked_softmax_fwd(Tensor x, Tensor? mask, float scale, Tensor? bias, int dim, float dropout_p, "
    "Tensor? dropout_seed) -> Tensor",
    reference.masked_softmax,
    _fake,
    kernels=[Kernel(CPU), Kernel(TRITON, "softmax.masked_softmax_fwd")],
    dtype_of=["x"],
    backward=_masked_backward,
    save=_save_masked,
)


def softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
    """exp(x_i) / sum_j exp(x_j) along one dim, as `torch.softmax`.

    Args:
        input: any shape, float32, bfloat16, float16 or float64; other dtypes need `dtype`.
        dim: the dim to sum over, negative ones from the end.
        dtype: convert `input` to it first, and return it.
        out: tensor of the result's shape and dtype to write into, or one without elements to resize; may share
            memory with `input`. No gradient then.

    Returns:
        Contiguous tensor of input's shape. Rows of nothing but minus infinity give NaN, as torch's do.

    Raises:
        TypeError: input or dtype is not floating point, or an argument is of the wrong kind (dim=None, too: name one).
        IndexError: dim is out of range.
        ValueError: out has another shape, dtype or device or holds elements twice, or a gradient is wanted with out.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018.

    Example:
        >>> import mmkern, torch
        >>> mmkern.softmax(torch.zeros(2, 4), dim=-1)[0]
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    if has_torch_function_unary(input):
        return handle_torch_function(softmax, (input,), input, dim, dtype, out=out)
    return _run(_softmax, _softmax_out, input, dim, dtype, out)


def log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
    """x_i - log sum_j exp(x_j) along one dim, as `torch.log_softmax`. Arguments, result and errors: see `softmax`.

    Example:
        >>> import mmkern, torch
        >>> mmkern.log_softmax(torch.zeros(4), dim=0)
        tensor([-1.3863, -1.3863, -1.3863, -1.3863])
    """
    if has_torch_function_unary(input):
        return handle_torch_function(log_softmax, (input,), input, dim, dtype, out=out)
    return _run(_log_softmax, _log_softmax_out, input, dim, dtype, out)


def masked_softmax(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    dim: int = -1,
    dropout_p: float = 0.0,
) -> Tensor:
    """Softmax of scale * x + bias over the elements that the mask lets take part, in one pass.

    Args:
        x: any shape, float32, bfloat16, float16 or float64.
        mask: broadcastable to x: bool (True takes part) or float (added; x's dtype or float32), read with its
            strides and never expanded in memory.
        scale: finite factor of x.
        bias: float, added, broadcastable to x; x's dtype or float32. Minus infinity hides an element.
        dim: the dim to sum over.
        dropout_p: chance in [0, 1] with which a weight is dropped, the others being divided by 1 - dropout_p.

    Returns:
        Contiguous tensor of x's shape and dtype. Hidden elements get 0, whatever x holds there; so do rows with
        nothing visible.

    Raises:
        TypeError: a dtype or the kind of an argument is wrong.
        IndexError: dim is out of range.
        ValueError: mask or bias does not broadcast to x, devices differ, or a number is out of range.

    Example:
        >>> import mmkern, torch
        >>> mmkern.masked_softmax(torch.zeros(3), torch.tensor([True, True, False]))
        tensor([0.5000, 0.5000, 0.0000])
    """
    if has_torch_function_variadic(x, mask, bias):
        options: dict[str, Any] = {"scale": scale, "bias": bias, "dim": dim, "dropout_p": dropout_p}
        return handle_torch_function(masked_softmax, (x, mask, bias), x, mask, **options)
    dim = checked_dim(x, dim, "x")
    check_dense("x", x)
    if mask is not None:
        mask = checked_term("mask", mask, x, (torch.bool, torch.float32, x.dtype))
    if bias is not None:
        bias = checked_term("bias", bias, x, (torch.float32, x.dtype))
    scale, dropout_p = number("scale", scale), probability("dropout_p", dropout_p)
    if x.dim() == 0:
        return masked_softmax(x[None], mask, scale=scale, bias=bias, dropout_p=dropout_p)[0]
    seed = dropout_seed(dropout_p, x)
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, mask, bias))
    if wants_grad and not torch.compiler.is_compiling():  # which would ask for the sizes of a dynamic shape
        mask, bias = _kept_from_edits(mask, x), _kept_from_edits(bias, x)
    return _masked_softmax(x, mask, scale, bias, dim, dropout_p, seed)


def _kept_from_edits(term: Tensor | None, x: Tensor) -> Tensor | None:
    """An added term of which backward may read a copy: torch's formula reads none, so that its caller may edit it.

    One that is broadcast costs nothing beside x. One of x's size is not copied: backward raises if it was edited, as
    it does for a bool mask, which torch's formula keeps, too.
    """
    return term if term is None or term.dtype == torch.bool or 8 * term.numel() > x.numel() else term.clone()


def _run(op: Op, op_out: Op, input: Tensor, dim: int, dtype: torch.dtype | None, out: Tensor | None) -> Tensor:
    if dtype is not None:
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating-point torch.dtype, got {dtype!r}")
        if isinstance(input, Tensor):
            input = input.to(dtype)
    dim = checked_dim(input, dim, "input")
    if out is not None:
        check_out(out, input)
        if input.dim() == 0 or out.is_neg():  # a negated view's memory is not what it says
            out.copy_(_run(op, op_out, input, dim, None, None))
        else:
            op_out(input, dim, out)
        return out
    return op(input, dim) if dim or input.dim() else op(input[None], 0)[0]

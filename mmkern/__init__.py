"""Fused attention, softmax and positional encoding for PyTorch, with the same meaning on CPU and GPU."""

from mmkern import _torch as _torch
from mmkern.ops.attention import scaled_dot_product_attention
from mmkern.ops.dispatch import Choice, backend, explain
from mmkern.ops.linear_loss import linear_cross_entropy
from mmkern.ops.loss import cross_entropy
from mmkern.ops.position import add_positional_encoding, embed_tokens
from mmkern.ops.rotary import alibi_slopes, rotary
from mmkern.ops.softmax import log_softmax, masked_softmax, softmax

__version__ = "0.1.0"
__all__ = [
    "Choice",
    "add_positional_encoding",
    "alibi_slopes",
    "backend",
    "cross_entropy",
    "embed_tokens",
    "explain",
    "linear_cross_entropy",
    "log_softmax",
    "masked_softmax",
    "rotary",
    "scaled_dot_product_attention",
    "softmax",
]

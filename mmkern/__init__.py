"""Fused attention, softmax and positional encoding for PyTorch, with the same meaning on CPU and GPU."""

from mmkern.ops.attention import scaled_dot_product_attention
from mmkern.ops.dispatch import Choice, backend, explain
from mmkern.ops.softmax import softmax

__version__ = "0.1.0"
__all__ = ["Choice", "backend", "explain", "scaled_dot_product_attention", "softmax"]

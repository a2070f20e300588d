"""Modules built on the ops; each replaces torch's module of its name, with its parameters and state_dict."""

from mmkern.nn.attention import KVCache, MultiheadAttention
from mmkern.nn.maps import attention_weights
from mmkern.nn.position import PositionalEncoding, RotaryEmbedding, SinusoidalPositionalEncoding, TokenEmbedding
from mmkern.nn.softmax import Softmax

__all__ = [
    "KVCache",
    "MultiheadAttention",
    "PositionalEncoding",
    "RotaryEmbedding",
    "SinusoidalPositionalEncoding",
    "Softmax",
    "TokenEmbedding",
    "attention_weights",
]

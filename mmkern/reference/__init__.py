"""The definition of each op in plain torch: what tests, benchmarks and devices without a kernel use."""

from mmkern.reference.attention import Similarity, attention
from mmkern.reference.position import add_positional_encoding, embed_tokens, positional_encoding
from mmkern.reference.rotary import rotary, rotary_qk
from mmkern.reference.softmax import softmax

__all__ = [
    "Similarity",
    "add_positional_encoding",
    "attention",
    "embed_tokens",
    "positional_encoding",
    "rotary",
    "rotary_qk",
    "softmax",
]

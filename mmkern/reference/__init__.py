"""The definition of each op in plain torch: what tests, benchmarks and devices without a kernel use."""

from mmkern.reference.attention import Similarity, attention
from mmkern.reference.softmax import log_softmax, log_softmax_out, masked_softmax, softmax, softmax_out

__all__ = [
    "Similarity",
    "attention",
    "log_softmax",
    "log_softmax_out",
    "masked_softmax",
    "softmax",
    "softmax_out",
]

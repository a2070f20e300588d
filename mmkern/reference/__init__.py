"""The definition of each op in plain torch: what tests, benchmarks and devices without a kernel use."""

from mmkern.reference.attention import Similarity, attention
from mmkern.reference.softmax import softmax

__all__ = ["Similarity", "attention", "softmax"]

"""The definition of each op in plain torch: what tests, benchmarks and devices without a kernel use."""

from mmkern.reference.attention import (
    Similarity,
    attention,
    attention_backward,
    attention_backward_gradients,
    attention_scores,
    empty_output,
)
from mmkern.reference.linear_loss import linear_cross_entropy, linear_cross_entropy_backward
from mmkern.reference.loss import (
    cross_entropy,
    cross_entropy_backward,
    cross_entropy_backward_,
    cross_entropy_loss,
)
from mmkern.reference.position import (
    add_positional_encoding,
    embed_tokens,
    embedding_gradient,
    position_table_gradient,
    positional_encoding,
)
from mmkern.reference.rotary import rotary, rotary_qk
from mmkern.reference.softmax import (
    log_softmax,
    log_softmax_backward,
    log_softmax_out,
    masked_softmax,
    masked_softmax_backward,
    softmax,
    softmax_backward,
    softmax_out,
)

__all__ = [
    "Similarity",
    "add_positional_encoding",
    "attention",
    "attention_backward",
    "attention_backward_gradients",
    "attention_scores",
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_backward_",
    "cross_entropy_loss",
    "embed_tokens",
    "embedding_gradient",
    "empty_output",
    "linear_cross_entropy",
    "linear_cross_entropy_backward",
    "log_softmax",
    "log_softmax_backward",
    "log_softmax_out",
    "masked_softmax",
    "masked_softmax_backward",
    "position_table_gradient",
    "positional_encoding",
    "rotary",
    "rotary_qk",
    "softmax",
    "softmax_backward",
    "softmax_out",
]

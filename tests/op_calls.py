"""One valid call of every public op: what tests of torch's machinery are run over."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import mmkern
from mmkern.testing import randn

B, H, L, S, D, V = 2, 4, 3, 5, 4, 6
TOKENS = torch.tensor([[0, 2, 1], [4, 2, 5]])
TARGET = torch.tensor([1, 4, 0])


@dataclass(frozen=True)
class OpCall:
    """fn(**tensors, **options).

    tensors: by argument; floating-point ones get gradients, but for those in `constant`.
    numbers: arguments that are numbers: each with another value than the default's.
    """

    name: str
    fn: Callable[..., Any]
    tensors: dict[str, Tensor]
    numbers: dict[str, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    constant: tuple[str, ...] = ()
    batched: tuple[str, ...] = (
        "query",
        "key",
        "value",
        "key_lengths",
        "input",
        "x",
        "target",
        "hidden",
        "tokens",
        "q",
        "k",
    )

    def __str__(self) -> str:
        return self.name

    @property
    def leaves(self) -> list[str]:
        return [n for n, t in self.tensors.items() if t.is_floating_point() and n not in self.constant]

    def copies(self, requires_grad: bool = False) -> dict[str, Tensor]:
        """Fresh tensors, whose memory a test may write into."""
        return {n: t.clone().requires_grad_(requires_grad and n in self.leaves) for n, t in self.tensors.items()}

    def larger(self, requires_grad: bool = False) -> dict[str, Tensor]:
        """Tensors with twice as many batch entries."""
        more = {n: torch.cat([t, t * (t < 3)]) if self.is_batched(n) else t.clone() for n, t in self.tensors.items()}
        return {n: t.requires_grad_(requires_grad and n in self.leaves) for n, t in more.items()}

    def is_batched(self, name: str) -> bool:
        return name in self.batched or (name in ("offset", "positions") and self.tensors[name].shape[0] == B)

    def run(self, tensors: dict[str, Tensor] | None = None, **more: Any) -> tuple[Tensor, ...]:
        """The results, as a tuple."""
        out = self.fn(**(self.tensors if tensors is None else tensors), **{**self.options, **self.numbers, **more})
        return out if isinstance(out, tuple) else (out,)


Q, K = randn(B, H, L, D, seed=1), randn(B, H, S, D, seed=2)
VALUE = randn(B, H, S, D, seed=3)
X = randn(B, L, D, seed=4)
LOGITS = randn(3, V, seed=5)
CLASS_WEIGHT = randn(V, seed=6).abs() + 0.1
FACTORS = {"scale": 0.7}
CALLS = [
    OpCall(
        "attention",
        mmkern.scaled_dot_product_attention,
        {"query": Q, "key": K, "value": VALUE},
        {"scale": 0.7, "softcap": 2.5, "temperature": 1.25},
        {"return_lse": True},
    ),
    OpCall(
        "attention-all",
        mmkern.scaled_dot_product_attention,
        {
            "query": Q,
            "key": K,
            "value": VALUE,
            "attn_mask": randn(L, S, seed=7),
            "temperature": randn(H, seed=8).abs(),
            "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625]),
            "key_lengths": torch.tensor([5, 4]),
            "sinks": randn(H, seed=9),
        },
        FACTORS,
        {"is_causal": True, "window": (2, 1)},
    ),
    OpCall("softmax", mmkern.softmax, {"input": X}, {"dim": 1}),
    OpCall("log_softmax", mmkern.log_softmax, {"input": X}, {"dim": 1}),
    OpCall(
        "masked_softmax",
        mmkern.masked_softmax,
        {"x": X, "mask": randn(L, D, seed=10) > -1, "bias": randn(L, D, seed=11)},
        {"scale": 0.7, "dim": 1},
    ),
    OpCall(
        "cross_entropy",
        mmkern.cross_entropy,
        {"input": LOGITS, "target": TARGET},
        {"label_smoothing": 0.125, "ignore_index": 4},
    ),
    OpCall(
        "cross_entropy-none",
        mmkern.cross_entropy,
        {"input": LOGITS, "target": TARGET, "weight": CLASS_WEIGHT},
        {"label_smoothing": 0.125},
        {"reduction": "none"},
        constant=("weight",),
    ),
    OpCall(
        "cross_entropy-soft",
        mmkern.cross_entropy,
        {"input": LOGITS, "target": randn(3, V, seed=12).softmax(1)},
        {"label_smoothing": 0.125},
    ),
    *(
        OpCall(
            f"linear_cross_entropy-{reduction}",
            mmkern.linear_cross_entropy,
            {
                "hidden": randn(3, D, seed=13),
                "weight": randn(V, D, seed=14),
                "target": TARGET,
                "bias": randn(V, seed=15),
            },
            {"label_smoothing": 0.125, "ignore_index": -100, "chunk_size": 2},
            {"reduction": reduction},
        )
        for reduction in ("mean", "none")
    ),
    OpCall("positions", mmkern.add_positional_encoding, {"x": X}, {"offset": 3, "scale": 0.7}),
    OpCall(
        "positions-table",
        mmkern.add_positional_encoding,
        {"x": X, "encoding": randn(9, D, seed=16), "offset": torch.tensor([1, 3])},
        FACTORS,
    ),
    OpCall(
        "embed_tokens",
        mmkern.embed_tokens,
        {"tokens": TOKENS, "weight": randn(V, D, seed=17), "encoding": randn(9, D, seed=18)},
        {"scale": 0.7, "offset": 2, "padding_idx": 1},
    ),
    OpCall("rotary", mmkern.rotary, {"q": Q}, {"base": 500.0, "rotary_dim": 2}),
    OpCall(
        "rotary-qk",
        mmkern.rotary,
        {"q": Q, "k": randn(B, 1, L, D, seed=19), "positions": torch.tensor([[3, 1, 0], [7, 2, 4]])},
        {"base": 500.0},
        {"layout": "interleaved"},
    ),
]


def gradients(call: OpCall, tensors: dict[str, Tensor], out: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, ...]:
    """Of the leaves, for upstream gradients that are the same in every test."""
    upstream = [randn(*t.shape, seed=30).to(t) for t in out]
    return torch.autograd.grad(out, [tensors[n] for n in call.leaves], upstream, **options)

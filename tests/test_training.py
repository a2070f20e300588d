"""A small transformer trained with our ops and with torch's: step by step the same, however torch runs it."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mmkern
from mmkern.testing import assert_accurate, randn

VOCABULARY, CLASSES, LENGTH, DIM, HEADS, EXPERTS = 64, 5, 24, 32, 4, 3
STEPS = 200


@dataclass(frozen=True)
class Ops:
    """What the model computes with: our functions, or torch's ways to the same."""

    embed: Callable[[Tensor, Tensor, Tensor], Tensor]
    attention: Callable[..., Tensor]
    softmax: Callable[[Tensor, int], Tensor]
    masked_softmax: Callable[[Tensor, Tensor], Tensor]
    cross_entropy: Callable[[Tensor, Tensor], Tensor]


OURS = Ops(
    embed=lambda tokens, weight, table: mmkern.embed_tokens(tokens, weight, table, scale=DIM**0.5),
    attention=mmkern.scaled_dot_product_attention,
    softmax=mmkern.softmax,
    masked_softmax=mmkern.masked_softmax,
    cross_entropy=mmkern.cross_entropy,
)
TORCH = Ops(
    embed=lambda tokens, weight, table: F.embedding(tokens, weight) * DIM**0.5 + table[: tokens.shape[-1]],
    attention=F.scaled_dot_product_attention,
    softmax=torch.softmax,
    masked_softmax=lambda x, mask: x.masked_fill(~mask, -torch.inf).softmax(-1),
    cross_entropy=F.cross_entropy,
)


class Block(nn.Module):
    """Causal attention, then experts mixed by a softmax router."""

    def __init__(self, ops: Ops, dropout_p: float) -> None:
        super().__init__()
        self.ops, self.dropout_p = ops, dropout_p
        self.norms = nn.ModuleList([nn.LayerNorm(DIM), nn.LayerNorm(DIM)])
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.out = nn.Linear(DIM, DIM, bias=False)
        self.router = nn.Linear(DIM, EXPERTS)
        self.experts = nn.Linear(DIM, EXPERTS * DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, D) each
        mixed = self.ops.attention(q, k, v, dropout_p=self.dropout_p, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        h = self.norms[1](x)
        gates = self.ops.softmax(self.router(h), -1)
        return x + (gates.unsqueeze(-2) @ F.gelu(self.experts(h)).unflatten(-1, (EXPERTS, DIM))).squeeze(-2)


class Model(nn.Module):
    """Next tokens, and the class of a text from a weighted mean of its rows."""

    def __init__(self, ops: Ops, dropout_p: float = 0.0, run: Callable[..., Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ops, self.run = ops, run or (lambda block, x: block(x))
        self.weight = nn.Parameter(torch.randn(VOCABULARY, DIM) / DIM**0.5)
        self.table = nn.Parameter(torch.randn(LENGTH + 8, DIM) / DIM**0.5)
        self.blocks = nn.ModuleList([Block(ops, dropout_p) for _ in range(2)])
        self.norm = nn.LayerNorm(DIM)
        self.pool = nn.Linear(DIM, 1, bias=False)
        self.classify = nn.Linear(DIM, CLASSES)

    def loss(self, tokens: Tensor, lengths: Tensor, classes: Tensor) -> Tensor:
        x = self.ops.embed(tokens, self.weight, self.table)
        for block in self.blocks:
            x = self.run(block, x)
        x = self.norm(x)
        logits = F.linear(x[:, :-1], self.weight)
        there = torch.arange(LENGTH) < lengths[:, None]
        pooled = self.ops.masked_softmax(self.pool(x).squeeze(-1), there).unsqueeze(-2) @ x
        ahead = tokens[:, 1:].where(there[:, 1:], -100)
        return self.ops.cross_entropy(logits.flatten(0, 1), ahead.flatten()) + self.ops.cross_entropy(
            self.classify(pooled.squeeze(-2)), classes
        )


def batch(size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (size, LENGTH), generator=generator)
    return tokens, torch.randint(LENGTH // 3, LENGTH + 1, (size,), generator=generator), torch.arange(size) % CLASSES


def train(model: Model, steps: int = STEPS, context: Callable[[], Any] = nullcontext) -> Tensor:
    """The loss of each step, on the same batch."""
    torch.manual_seed(3)  # for dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    data, losses = batch(), []
    for _ in range(steps):
        with context():
            loss = model.loss(*data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Where other processes keep the cores busy, threads that wait for one another make small calls 20 times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def of_torch(one_thread: None) -> Tensor:
    return train(Model(TORCH))


def test_every_step_of_training_is_torchs(of_torch):
    found = train(Model(OURS))
    assert of_torch[-1] < 0.02 * of_torch[0], "the model has learned its batch by heart"
    # 5e-7 measured: rounding that the optimizer carries on
    torch.testing.assert_close(found, of_torch, rtol=1e-5, atol=0)


def test_the_kernels_train():
    model = Model(OURS)
    ran = mmkern.explain(lambda: model.loss(*batch()).backward())
    assert {choice.op for choice in ran} >= {
        "embed_tokens_fwd", "attention_fwd", "attention_bwd", "softmax_fwd", "masked_softmax_fwd",
    }  # fmt: skip
    assert {choice.backend for choice in ran} == {"cpu"}


def test_autocast_loses_no_more_than_torchs(of_torch):
    bf16 = partial(torch.autocast, "cpu", torch.bfloat16)
    ours, theirs = ((train(Model(ops), context=bf16) / of_torch - 1).abs().max() for ops in (OURS, TORCH))
    assert theirs > 1e-4, "it did run in bfloat16"
    assert ours < 3 * theirs, "the rule for gradients"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit_and_repeats_dropout(reentrant):
    plain, saving = Model(OURS, 0.2), Model(OURS, 0.2, partial(checkpoint, use_reentrant=reentrant))
    losses = train(plain, 20)
    assert torch.equal(train(saving, 20), losses)
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)
    assert not torch.isclose(losses, train(Model(OURS), 20)).all(), "dropout drops"


def gradients(block: Callable[[Tensor], Tensor], leaves: list[Tensor], x: Tensor) -> list[Tensor]:
    out = block(x)
    grad = randn(*out.shape, seed=2).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def test_a_block_compiles_whole_forward_and_backward():
    blocks = [Model(ops).blocks[0] for ops in (OURS, TORCH, TORCH)]
    blocks[2].double()
    x = randn(8, LENGTH, DIM)
    calls = [torch.compile(blocks[0], fullgraph=True), *blocks[1:]]
    found = []
    for call, block in zip(calls, blocks, strict=True):
        given = x.to(block.out.weight.dtype).requires_grad_()
        found.append(gradients(call, [given, *block.parameters()], given))
    for i, (actual, baseline, exact) in enumerate(zip(*found, strict=True)):
        assert_accurate(actual, exact, baseline, "gradient" if i else "forward")


def test_compiled_dropout_drops_the_same_backward_as_forward():
    torch.manual_seed(0)
    q, k, v = (randn(2, HEADS, LENGTH, 8, seed=seed).requires_grad_() for seed in range(3))
    attend = torch.compile(partial(mmkern.scaled_dot_product_attention, dropout_p=0.4), fullgraph=True)
    results = []
    for _ in range(2):
        out, *_, dv = gradients(lambda q: attend(q, k, v), [q, k, v], q)
        # out is linear in v, so <grad, out> = <dv, v> holds for one mask and for no two
        terms = out.double() * randn(*out.shape, seed=2)
        assert abs((dv.double() * v).sum() - terms.sum()) < 1e-5 * terms.abs().sum()  # the limit for gradients
        results.append(out)
    assert not torch.isclose(*results).all(), "each call draws anew"

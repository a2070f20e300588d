"""Row ops at the ends of a dtype's range, and sums of very many parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from backends import Backend, backends
from torch import Tensor

import mmkern
from mmkern.testing import randn

MOST = torch.finfo(torch.float32).max
LOGITS = {
    "lowest": torch.full((3, 9), -MOST),
    "some lowest": randn(3, 9).masked_fill(randn(3, 9, seed=1) > 0, -MOST),
    "largest": torch.full((3, 9), MOST),
    "1e30": randn(3, 9) * 1e30,
}


@pytest.mark.parametrize("backend", backends("cross_entropy"))
@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("dim", [0, 1])
def test_softmax_family(name: str, dim: int, backend: Backend) -> None:
    """As torch's own in float32, forward and backward; a bias of the lowest number among them."""
    x, grad, target = LOGITS[name], randn(3, 9, seed=2), torch.tensor([0, 8, 3])
    calls = {
        "softmax": (lambda m, t: m.softmax(t, dim), (x,)),
        "log_softmax": (lambda m, t: m.log_softmax(t, dim), (x,)),
        "masked_softmax": (
            lambda m, t, b: m.masked_softmax(t, bias=b, dim=dim) if m is mmkern else torch.softmax(t + b, dim),
            (randn(3, 9), x),
        ),
        "cross_entropy": (lambda m, t: m.cross_entropy(t, backend.to(target), reduction="none"), (x,)),
    }
    for what, (call, given) in calls.items():
        results = []
        for module in (mmkern, F):
            leaves = [backend.to(t).clone().requires_grad_() for t in given]
            with backend:
                out = call(module, *leaves)
                upstream = grad.expand_as(out) if out.dim() > 1 else grad[:, 0]
                results.append(
                    [t.detach().cpu() for t in (out, *torch.autograd.grad(out, leaves, backend.to(upstream)))]
                )
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, msg=lambda m, what=what: f"{what}: {m}")


def error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).abs().max() / exact.abs().max()).item()


LONG = {
    "a row": lambda: (mmkern.masked_softmax(x := torch.rand(1, 2**21), scale=0.5), (x.double() * 0.5).softmax(1)),
    "columns": lambda: (mmkern.softmax(x := torch.rand(2**18, 16), 0), x.double().softmax(0)),
    "a loss": lambda: (
        mmkern.cross_entropy(x := torch.rand(1, 2**21), t := torch.tensor([5]), label_smoothing=0.1),
        F.cross_entropy(x.double(), t, label_smoothing=0.1),
    ),
}


@pytest.mark.parametrize("name", LONG)
def test_long_sums(name: str) -> None:
    torch.manual_seed(0)
    assert error(*LONG[name]()) < 3e-7


def test_one_token_and_one_position_many_times() -> None:
    torch.manual_seed(0)
    tokens, weight, grad = (
        torch.zeros(300_000, dtype=torch.long),
        torch.zeros(2, 8, requires_grad=True),
        torch.rand(300_000, 8),
    )
    (found,) = torch.autograd.grad(mmkern.embed_tokens(tokens, weight), weight, grad)
    assert error(found[0], grad.double().sum(0)) < 1e-7
    table, x = torch.zeros(1, 8, requires_grad=True), torch.zeros(300_000, 1, 8)
    (found,) = torch.autograd.grad(mmkern.add_positional_encoding(x, table), table, grad[:, None])
    assert error(found[0], grad.double().sum(0)) < 1e-7


@pytest.mark.parametrize("backend", backends("embed_tokens"))
def test_one_token_many_times(backend: Backend) -> None:
    torch.manual_seed(0)
    grad, tokens = torch.rand(20_000, 4), torch.zeros(20_000, dtype=torch.long)
    weight = torch.zeros(1, 4, device=backend.device, requires_grad=True)
    with backend:
        (found,) = torch.autograd.grad(mmkern.embed_tokens(backend.to(tokens), weight), weight, backend.to(grad))
    assert error(found[0].cpu(), grad.double().sum(0)) < 1e-7

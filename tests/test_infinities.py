"""Infinities and NaN at every kind of place of a row: what torch's formula and ours give of them, on every backend."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from backends import Backend, backends
from torch import Tensor

import mmkern

INF, NAN = torch.inf, torch.nan
REFERENCE = pytest.param(Backend("reference"), id="reference")
PLACES = (
    {0: INF}, {2: INF}, {0: INF, 2: INF}, {0: -INF}, {2: -INF}, {0: -INF, 1: -INF, 3: -INF, 4: -INF},
    {0: INF, 2: -INF}, {0: -INF, 2: INF}, {0: NAN}, {2: NAN}, {0: NAN, 2: INF}, {0: NAN, 1: -INF, 2: -INF},
    dict.fromkeys(range(5), INF), dict.fromkeys(range(5), -INF),
)  # fmt: skip
ROWS = torch.tensor([0.3, -1.2, 0.8, 0.1, -0.5]).repeat(len(PLACES), 1)
for row, places in zip(ROWS, PLACES, strict=True):
    for at, value in places.items():
        row[at] = value
SOFT = {"soft": [0.1, 0.2, 0.4, 0.2, 0.1], "one-hot": [0.0, 0, 1, 0, 0], "signed": [0.5, 0, -0.2, 0.7, 0]}
WEIGHTS = (None, torch.tensor([0.0, 2, 0.5, 1, 0]))


def results(fn, *tensors: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = fn(*leaves)
    upstream = torch.linspace(0.5, 1.5, out.numel()).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def columns(t: Tensor) -> Tensor:
    """Twice side by side, so that classes are not contiguous."""
    return torch.stack([t, t], -1)


def of_losses(loss) -> list[list[Tensor]]:
    found = []
    target = torch.full((len(ROWS),), 2)
    for smoothing, weight in itertools.product((0.0, 0.1), WEIGHTS):
        options = {"weight": weight, "label_smoothing": smoothing, "reduction": "none"}
        found.append(results(lambda x, o=options: loss(x, target, **o), ROWS))
        found.append(results(lambda x, o=options: loss(columns(x), columns(target), **o), ROWS))
        for soft in SOFT.values():
            t = torch.tensor(soft).repeat(len(ROWS), 1)
            found.append(results(lambda x, t, o=options: loss(x, t, **o), ROWS, t))
            found.append(results(lambda x, t, o=options: loss(columns(x), columns(t), **o), ROWS, t))
    return found


def of_softmax(softmax) -> list[list[Tensor]]:
    return [results(lambda x: softmax(x, 1), ROWS), results(lambda x: softmax(columns(x), 1), ROWS)]


def linear(fn) -> list[list[Tensor]]:
    """Five rows at a time as the weight of five classes."""
    hidden, target = torch.tensor([[1.0, 0.5, 2, 1, 0.25], [2.0, 1, 1, 0.5, 0.5]]), torch.tensor([0, 3])
    bias = torch.zeros(5)
    return [results(lambda h, w, b: fn(h, w, target, b), hidden, ROWS[i : i + 5], bias) for i in range(len(ROWS) - 4)]


def masked(fn) -> list[list[Tensor]]:
    """No row without a score above -inf, which is 0 here and NaN in torch's formula."""
    rows = ROWS[:-1]
    mask = torch.tensor([True, True, True, False, True])
    return [results(lambda x: fn(x, None), rows), results(lambda x: fn(x, mask), rows[:5])]


OPS = {
    "cross_entropy": (of_losses, mmkern.cross_entropy, F.cross_entropy),
    "softmax": (of_softmax, mmkern.softmax, torch.softmax),
    "log_softmax": (of_softmax, mmkern.log_softmax, torch.log_softmax),
    "masked_softmax": (
        masked,
        mmkern.masked_softmax,
        lambda x, mask: (x if mask is None else torch.where(mask, x, -INF)).softmax(-1),
    ),
    "linear_cross_entropy": (
        linear,
        lambda h, w, t, b: mmkern.linear_cross_entropy(h, w, t, b, reduction="none"),
        lambda h, w, t, b: F.cross_entropy(h @ w.t() + b, t, reduction="none"),
    ),
}


@pytest.mark.parametrize("backend", [REFERENCE, *backends("linear_cross_entropy")])
@pytest.mark.parametrize("op", OPS)
def test_rows_with_infinities_give_what_torch_gives(op, backend):
    run, ours, torchs = OPS[op]
    if backend.device != "cpu":
        pytest.skip("the interpreter's case")
    with backend.forced():
        found = run(ours)
    for f, e in zip(itertools.chain(*found), itertools.chain(*run(torchs)), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5, equal_nan=True)

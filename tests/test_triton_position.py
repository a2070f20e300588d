"""Triton's positional encodings, embeddings and rotations, forward and gradients, against float64.

On a GPU if there is one, else in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

import mmkern
from mmkern.testing import LAYOUTS, assert_accurate, poisoned, randn

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def triton() -> Iterator[None]:
    """The Triton kernels or an error; dropout seeds from the CPU's generator, as for the reference beside them."""
    draw = torch.randint

    def randint(*args: object, device: object = None, **kwargs: object) -> Tensor:
        return draw(*args, **kwargs).to(DEVICE)

    with mmkern.backend("triton", strict=True), mock.patch("torch.randint", randint), poisoned():
        yield


def results(call: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    torch.manual_seed(7)
    out = call(*leaves)
    return [out.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(out, leaves, grad))]


def check(call: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> None:
    """Output and every gradient by Triton, against the reference in float64; its own dtype is the yardstick."""
    with mmkern.backend("reference"):
        exact = results(call, [t.double() for t in inputs], grad.double())
        baseline = results(call, inputs, grad)
    with triton():
        found = results(call, [t.to(DEVICE) for t in inputs], grad.to(DEVICE))
    for i, (mine, wanted, base) in enumerate(zip(found, exact, baseline, strict=True)):
        assert_accurate(mine, wanted, base, "gradient" if i else "forward")


ADD = {
    "one row": ((1, 4), 1, 0),
    "two dims": ((5, 7), 9, 2),
    "batch": ((3, 20, 33), 20, 0),
    "wide": ((2, 3, 700), 5, 1),
    "many entries": ((19, 2, 5), 2, 0),
    "heads": ((2, 3, 17, 64), 30, 13),
    "five dims": ((2, 1, 3, 5, 16), 5, 0),
    "a start each": ((3, 2, 11, 40), 50, torch.tensor([0, 39, 7])),
    "no rows": ((2, 0, 8), 3, 0),
    "no batch": ((0, 5, 8), 6, 1),
    "no channels": ((2, 3, 0), 6, 1),
}


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize(("name", "dtype"), [(n, DTYPES[i % 3]) for i, n in enumerate(ADD)], ids=str)
def test_add_positional_encoding(name: str, dtype: torch.dtype, dropout_p: float) -> None:
    shape, max_length, offset = ADD[name]
    options = {"scale": 1.7, "dropout_p": dropout_p}

    def at(x: Tensor) -> object:
        return offset.to(x.device) if isinstance(offset, Tensor) else offset

    for layout in LAYOUTS if name == "heads" else ("contiguous",):
        x, grad = (randn(*shape, dtype=dtype, layout=layout, seed=seed) for seed in (0, 2))
        table = randn(max_length, shape[-1], dtype=dtype, seed=1)
        check(lambda x, t: mmkern.add_positional_encoding(x, t, offset=at(x), **options), [x, table], grad)
    for encoding in ("sinusoidal", "scalar"):
        check(lambda x, e=encoding: mmkern.add_positional_encoding(x, e, offset=at(x), **options), [x], grad)


@pytest.mark.parametrize("shape", [(2, 5, 3, 44), (4, 9, 8), (2, 3, 2, 17, 64), (1, 1, 4)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_grids(shape: tuple[int, ...], dropout_p: float) -> None:
    for layout in ("contiguous", "transposed"):
        x, grad = (randn(*shape, layout=layout, seed=seed) for seed in (0, 2))
        check(lambda x: mmkern.add_positional_encoding(x, "sincos2d", scale=0.5, dropout_p=dropout_p), [x], grad)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("ids", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("shape", [(4,), (2, 65), (2, 3, 10), (3, 0)], ids=str)
def test_embed_tokens(shape: tuple[int, ...], ids: torch.dtype, dropout_p: float) -> None:
    """Many places of one token, tokens that nothing says, a padding row without gradient."""
    tokens = torch.randint(30, shape, generator=torch.Generator().manual_seed(3)).to(ids)
    tokens[..., ::2] = 5
    dtype = DTYPES[len(shape) % 3]
    weight, table = randn(33, 24, dtype=dtype), randn(70, 24, dtype=dtype, seed=1)
    grad = randn(*shape, 24, dtype=dtype, seed=2)
    options = {"scale": 1.7, "dropout_p": dropout_p}
    check(lambda w, t: mmkern.embed_tokens(tokens.to(w.device), w, t, offset=2, **options), [weight, table], grad)
    options["padding_idx"] = 5
    check(lambda w: mmkern.embed_tokens(tokens.to(w.device), w, "sinusoidal", **options), [weight], grad)


# q shape, k shape, options
ROTARY = [
    ((2, 4, 35, 64), (2, 2, 35, 64), {}),
    ((1, 9, 20, 128), (1, 2, 20, 128), {"base": 500000.0}),
    ((2, 3, 9, 50), (2, 1, 9, 50), {"rotary_dim": 26}),
    ((3, 2, 1, 6), (3, 2, 1, 6), {"rotary_dim": 2}),
    ((2, 2, 35, 24), (2, 1, 35, 24), {"grid": (5, 7)}),
    ((2, 2, 12, 44), (2, 2, 12, 44), {"grid": (3, 4), "rotary_dim": 36}),
    ((2, 2, 5, 8), (2, 1, 5, 8), {"positions": torch.tensor([[0, 1, -3, 70000, 2**20], [5, 4, 3, 2, 1]])}),
    ((2, 2, 3, 16), (2, 1, 3, 16), {"positions": torch.tensor([-7, 3, 1999 * 1000 + 1]), "grid": (2000, 1000)}),
    ((5, 16), (5, 16), {}),
    ((3, 7, 10), (2, 7, 10), {}),
    ((2, 3, 2, 7, 34), (2, 1, 2, 7, 34), {}),
    ((2, 3, 0, 8), (2, 1, 0, 8), {}),
    ((0, 3, 4, 8), (0, 1, 4, 8), {}),
]


@pytest.mark.parametrize("pairs", ["half", "interleaved"])
@pytest.mark.parametrize("case", range(len(ROTARY)))
def test_rotary(case: int, pairs: str) -> None:
    q_shape, k_shape, options = ROTARY[case]
    dtype, layout = DTYPES[case % 3], LAYOUTS[case % 5]
    q, k = randn(*q_shape, dtype=dtype, layout=layout), randn(*k_shape, dtype=dtype, seed=1)

    def both(q: Tensor, k: Tensor) -> Tensor:
        given = {n: x.to(q.device) if isinstance(x, Tensor) else x for n, x in options.items()}
        out = mmkern.rotary(q, k, layout=pairs, **given)
        assert q.dtype == torch.float64 or torch.equal(mmkern.rotary(q, layout=pairs, **given), out[0])
        return torch.cat([t.flatten() for t in out])

    check(both, [q, k], randn(q.numel() + k.numel(), dtype=dtype, seed=2))


def test_outputs_keep_the_layout() -> None:
    x = randn(2, 3, 7, 16, layout="transposed").to(DEVICE)
    with triton():
        assert mmkern.rotary(x).stride() == x.stride()
        assert mmkern.add_positional_encoding(x).stride() == x.stride()


@pytest.mark.parametrize("offset", [100_003, 1_048_576, 2**40 + 5])
def test_large_positions_keep_their_accuracy(offset: int) -> None:
    zeros = torch.zeros(40, 64, device=DEVICE)
    with triton():
        out = mmkern.add_positional_encoding(zeros, offset=offset).cpu()
    exact = mmkern.add_positional_encoding(torch.zeros(40, 64, dtype=torch.float64), offset=offset)
    assert (out - exact).abs().max() < 3e-7 + offset * 4e-16  # a float64 frequency is known to 4e-16


def test_deterministic_and_inputs_stay() -> None:
    tokens = torch.arange(300).remainder(7).view(3, 100).to(DEVICE)
    weight, grad = randn(9, 40).to(DEVICE), randn(3, 100, 40, seed=1).to(DEVICE)
    kept = [t.clone() for t in (tokens, weight, grad)]
    found = []
    for _ in range(3):
        leaf = weight.detach().requires_grad_()
        with triton():
            out = mmkern.embed_tokens(tokens, leaf)
            found.append((out.detach(), torch.autograd.grad(out, leaf, grad)[0]))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((tokens, weight, grad), kept, strict=True))


def test_an_unknown_token_or_position_shows() -> None:
    """On a GPU no value is read before the launch, so it cannot raise: the row is NaN."""
    tokens, weight = torch.tensor([0, 4, -1, 3]).to(DEVICE), torch.ones(4, 8, device=DEVICE)
    with mmkern.backend("triton", strict=True):
        out = torch.ops.mmkern.embed_tokens_fwd if DEVICE == "cuda" else mmkern.ops.position._embed._launch
        found = out(tokens, weight, "none", None, 0, None, 1.0, 0.0, None, None)
    assert found.isnan().any(1).tolist() == [False, True, True, False]

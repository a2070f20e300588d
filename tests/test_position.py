"""Positional encodings and embeddings with their gradients: one table over every backend, against float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from backends import DTYPES, Backend, backends, factors, hold, outcome
from position_cases import ADD, GRIDS, LARGE, SHAPES, TOKENS, eager, exact
from torch import Tensor

import mmkern
from mmkern.testing import LAYOUTS, assert_accurate, randn

EACH = backends("add_positional_encoding")
EMBED = backends("embed_tokens")


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("encoding", ["sinusoidal", "scalar", "table"])
def test_add_matches_definition(encoding: str, dtype: torch.dtype, backend: Backend) -> None:
    for i, shape in enumerate(SHAPES):
        x = randn(*shape, dtype=dtype, layout=LAYOUTS[i % len(LAYOUTS)], seed=i)
        kind = randn(300, shape[-1], dtype=dtype, seed=9) if encoding == "table" else encoding
        for offset, scale in ((0, 1.0), (199, math.sqrt(shape[-1]))):
            with backend:
                out = mmkern.add_positional_encoding(backend.to(x), backend.to(kind), offset=offset, scale=scale)
            assert_accurate(out.cpu(), exact(x, kind, offset, scale), eager(x, kind, offset, scale))


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ADD)
def test_add_positional_encoding(name: str, dtype: torch.dtype, dropout_p: float, backend: Backend, once) -> None:
    """x gets the scale, a table the sum over what stands at each position, both as dropped."""
    shape, max_length, offset = ADD[name]
    keep, options = once(lambda: factors(shape, dropout_p)), {"scale": 1.7, "dropout_p": dropout_p}
    at = torch.arange(shape[-2]) + (offset.view(-1, *[1] * (len(shape) - 2)) if torch.is_tensor(offset) else offset)

    def ours(x: Tensor, encoding: str | Tensor) -> Tensor:
        start = offset.to(x.device) if torch.is_tensor(offset) else offset
        return mmkern.add_positional_encoding(x, encoding, offset=start, **options)

    def formula(x: Tensor, table: Tensor) -> Tensor:
        return (x * 1.7 + F.embedding(at, table)) * keep

    for layout in LAYOUTS if name == "heads" else ("contiguous",):
        x, grad = (randn(*shape, dtype=dtype, layout=layout, seed=seed) for seed in (0, 2))
        hold(backend, once, ours, formula, [x, randn(max_length, shape[-1], dtype=dtype, seed=1)], grad)
    for encoding in ("sinusoidal", "scalar"):
        call = lambda x, e=encoding: ours(x, e)  # noqa: E731
        hold(backend, once, call, call, [x], grad)


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("layout", [*LAYOUTS[:2], *(pytest.param(layout, marks=LARGE) for layout in LAYOUTS[2:])])
@pytest.mark.parametrize("shape", GRIDS, ids=str)
def test_grids(shape: tuple[int, ...], layout: str, dropout_p: float, backend: Backend, once) -> None:
    x, grad = (randn(*shape, layout=layout, seed=seed) for seed in (0, 2))
    call = lambda x: mmkern.add_positional_encoding(x, "sincos2d", scale=2.0, dropout_p=dropout_p)  # noqa: E731
    hold(backend, once, call, call, [x], grad)


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("encoding", ["sinusoidal", "scalar", "sincos2d"])
def test_gradients_of_computed_encodings(encoding: str, backend: Backend) -> None:
    shape = (2, 3, 6, 20)
    x, grad, keep = randn(*shape), randn(*shape, seed=2), factors(shape, 0.3)
    with backend:
        call = lambda x: mmkern.add_positional_encoding(x, encoding, scale=3.0, dropout_p=0.3)  # noqa: E731
        found = outcome(call, [backend.to(x)], backend.to(grad))[1]
    want = grad.double() * 3.0 * keep
    assert_accurate(found, want, want.float(), "gradient")


@pytest.mark.parametrize("backend", EMBED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embed_matches_definition(dtype: torch.dtype, backend: Backend) -> None:
    weight = randn(50, 38, dtype=dtype, layout="strided")
    table = randn(40, 38, dtype=dtype, seed=3)
    for shape in ((3, 17), (9,), (2, 3, 5), (2, 0)):
        tokens = torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(1))
        across = tokens.mT if len(shape) == 2 else tokens
        for encoding in (None, "sinusoidal", "scalar", table):
            given, rows = backend.to(encoding), backend.to(weight)
            with backend:
                out = mmkern.embed_tokens(backend.to(tokens.int()), rows, given, offset=4, scale=1.5)
                wide = mmkern.embed_tokens(backend.to(across), rows, given, offset=4)
            kind = "none" if encoding is None else encoding
            x, xt = F.embedding(tokens, weight), F.embedding(across, weight)
            assert_accurate(out.cpu(), exact(x, kind, 4, 1.5), eager(x, kind, 4, 1.5))
            assert_accurate(wide.cpu(), exact(xt, kind, 4), eager(xt, kind, 4, 1.0))


@pytest.mark.parametrize("backend", EMBED)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("padding", [None, pytest.param(3, marks=LARGE)])
@pytest.mark.parametrize("ids", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", TOKENS, ids=str)
def test_embed_tokens(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    ids: torch.dtype,
    padding: int | None,
    dropout_p: float,
    backend: Backend,
    once,
) -> None:
    """Rows of weight get the scaled sum over their tokens, many of one token, the padding row and unused rows 0."""
    tokens = torch.randint(50, shape, generator=torch.Generator().manual_seed(1)).to(ids)
    tokens[..., ::2] = 5
    keep = once(lambda: factors((*shape, 24), dropout_p))
    weight, table = randn(60, 24, dtype=dtype), randn(702, 24, dtype=dtype, seed=1)
    grad, options = randn(*shape, 24, dtype=dtype, seed=2), {"scale": 4.0, "dropout_p": dropout_p}

    def formula(weight: Tensor, table: Tensor) -> Tensor:
        return (F.embedding(tokens, weight, padding_idx=padding) * 4.0 + table[2 : 2 + shape[-1]]) * keep

    def ours(weight: Tensor, table: Tensor) -> Tensor:
        return mmkern.embed_tokens(backend.to(tokens), weight, table, offset=2, padding_idx=padding, **options)

    hold(backend, once, ours, formula, [weight, table], grad)
    computed = lambda w: mmkern.embed_tokens(tokens.to(w.device), w, "sinusoidal", padding_idx=5, **options)  # noqa: E731
    hold(backend, once, computed, computed, [weight], grad)


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("dropout_p", [0.1, 1.0])
def test_dropped_elements(dropout_p: float, backend: Backend) -> None:
    shape = (2, 30, 96) if backend.slow else (8, 300, 96)
    keep = factors(shape, dropout_p)
    with backend:
        torch.manual_seed(7)
        x, table = (torch.full(s, v, device=backend.device) for s, v in ((shape, 1.0), (shape[1:], 0.0)))
        found = mmkern.add_positional_encoding(x, table, dropout_p=dropout_p)
    torch.testing.assert_close(found.double().cpu(), keep, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("offset", [100_003, 1_048_576, 2**40 + 5])
def test_large_positions_keep_their_accuracy(offset: int, backend: Backend) -> None:
    zeros = torch.zeros(40, 64)
    with backend:
        out = mmkern.add_positional_encoding(backend.to(zeros), offset=offset).cpu()
    limit = 3e-7 + offset * 4e-16  # a float64 frequency is known to 4e-16
    assert (out - exact(zeros, "sinusoidal", offset)).abs().max() < limit


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("encoding", ["sinusoidal", "scalar"])
def test_encoding_depends_on_the_position_alone(encoding: str, backend: Backend) -> None:
    x, starts = randn(3, 61, 96), torch.tensor([0, 13, 2])
    rows = torch.stack([x[b, s : s + 9] for b, s in enumerate(starts.tolist())])

    def call(x: Tensor, **options) -> Tensor:
        given = {name: backend.to(option) for name, option in options.items()}
        with backend:
            return mmkern.add_positional_encoding(backend.to(x), encoding, **given).cpu()

    whole = call(x)
    for first in (1, 7, 8, 43):
        assert torch.equal(call(x[:, first:], offset=first), whole[:, first:])
    expected = torch.stack([whole[b, s : s + 9] for b, s in enumerate(starts.tolist())])
    assert torch.equal(call(rows, offset=starts), expected)
    assert torch.equal(call(x[1:2]), whole[1:2])


@pytest.mark.parametrize("backend", EACH)
def test_nan_and_inf_stay_where_they_are(backend: Backend) -> None:
    x = randn(2, 5, 16)
    x[0, 1, 3], x[1, 4, 0], x[1, 0, 5] = math.nan, math.inf, -math.inf
    with backend:
        found = mmkern.add_positional_encoding(backend.to(x)).cpu()
        huge = mmkern.add_positional_encoding(torch.full((1, 3, 4), 3e38, device=backend.device), scale=2.0)
    assert_accurate(found, exact(x, "sinusoidal"))
    assert huge.isposinf().all()


@pytest.mark.parametrize("backend", EMBED)
def test_deterministic_and_inputs_stay(backend: Backend) -> None:
    tokens = torch.arange(300).remainder(7).view(3, 100).to(backend.device)
    weight, grad = (t.to(backend.device) for t in (randn(9, 40), randn(3, 100, 40, seed=1)))
    kept = [t.clone() for t in (tokens, weight, grad)]
    with backend:
        found = [outcome(lambda w: mmkern.embed_tokens(tokens, w), [weight], grad) for _ in range(3)]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((tokens, weight, grad), kept, strict=True))


@pytest.mark.parametrize("backend", backends("embed_tokens", ["triton", "cuda"]))
def test_an_unknown_token_or_position_shows(backend: Backend) -> None:
    """On a GPU no value is read before the launch, so it cannot raise: the row is NaN."""
    tokens, weight = torch.tensor([0, 4, -1, 3]).to(backend.device), torch.ones(4, 8, device=backend.device)
    with backend:
        found = mmkern.ops.position._embed.direct(tokens, weight, "none", None, 0, None, 1.0, 0.0, None, None)
    assert found.isnan().any(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("backend", EACH)
def test_outputs_keep_the_layout(backend: Backend) -> None:
    x = backend.to(randn(2, 3, 7, 16, layout="transposed"))
    with backend:
        assert mmkern.rotary(x).stride() == x.stride()
        assert mmkern.add_positional_encoding(x).stride() == x.stride()

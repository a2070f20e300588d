"""Positional encodings in torch's machinery, and as the papers define them: errors, threads, compile."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from position_cases import exact
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import mmkern
from mmkern.testing import assert_accurate, randn

op = torch.ops.mmkern


def test_sincos2d_is_the_convention_of_mae():
    # MAE's pos_embed.py: np.meshgrid(grid_w, grid_h) puts the column first, whatever its names say.
    column, row = torch.meshgrid(torch.arange(6.0).double(), torch.arange(4.0).double(), indexing="xy")
    omega = 1.0 / 10000 ** (torch.arange(8).double() / 8)
    parts = [f(grid.flatten()[:, None] * omega) for grid in (column, row) for f in (torch.sin, torch.cos)]
    out = mmkern.add_positional_encoding(torch.zeros(4, 6, 32), "sincos2d")
    assert (out.flatten(0, 1) - torch.cat(parts, 1)).abs().max() < 3e-7


def test_sinusoidal_is_the_formula_of_the_paper():
    out = mmkern.add_positional_encoding(torch.zeros(12, 7), offset=90)
    for p in range(12):
        for c in range(7):
            angle = (90 + p) / 10000 ** (c // 2 * 2 / 7)
            assert abs(out[p, c].item() - (math.cos(angle) if c % 2 else math.sin(angle))) < 3e-7


def test_same_bits_for_any_thread_count_and_streamed_outputs():
    x = randn(9, 301, 768)  # 8.3 MB: streamed
    before, kept = torch.get_num_threads(), x.clone()
    try:
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(mmkern.add_positional_encoding(x, scale=3.0))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)
    assert torch.equal(x, kept)
    assert torch.equal(results[0][:1], mmkern.add_positional_encoding(x[:1], scale=3.0))
    assert_accurate(results[0], exact(x, "sinusoidal", scale=3.0))


def test_gradients_reach_x_table_and_weight():
    x = randn(2, 5, 6).requires_grad_()
    table = randn(9, 6, seed=1).requires_grad_()
    weight = randn(7, 6, seed=2).requires_grad_()
    up = randn(2, 5, 6, seed=3)
    mmkern.add_positional_encoding(x, table, offset=2, scale=3.0).backward(up)
    assert torch.equal(x.grad, 3.0 * up)
    assert torch.allclose(table.grad, F.pad(up.sum(0), (0, 0, 2, 2)), atol=1e-6)
    tokens = torch.tensor([[0, 1, 1, 6, 2], [2, 3, 0, 6, 6]])
    mmkern.embed_tokens(tokens, weight, "sinusoidal", scale=2.0, padding_idx=-1).backward(up)
    expected = torch.zeros(7, 6).index_add(0, tokens.flatten(), 2.0 * up.flatten(0, 1))
    expected[6] = 0
    assert torch.allclose(weight.grad, expected, atol=1e-6)


def test_float64_runs_by_the_reference_and_says_so():
    said = mmkern.explain(mmkern.embed_tokens, torch.tensor([1]), torch.ones(64, 64).double())[0]
    assert said.backend == "reference"
    assert "float64" in said.refused["cpu"]
    assert mmkern.explain(mmkern.add_positional_encoding, torch.ones(64, 64))[0].backend == "cpu"


def test_compiles_for_any_offset():
    x, weight = randn(2, 5, 6), randn(9, 6).requires_grad_()
    tokens = torch.tensor([[0, 1, 8]])
    compiled = torch.compile(lambda x, o: mmkern.add_positional_encoding(x, offset=o, scale=2.0), fullgraph=True)
    for offset in (0, 3, 4):
        assert torch.equal(compiled(x, offset), mmkern.add_positional_encoding(x, offset=offset, scale=2.0))
    embed = torch.compile(lambda w: mmkern.embed_tokens(tokens, w, "sinusoidal"), fullgraph=True)
    embed(weight).sum().backward()
    assert torch.equal(weight.grad.sum(1), torch.tensor([6.0, 6, 0, 0, 0, 0, 0, 0, 6]))


CALLS = {
    "add": lambda x, w, t: mmkern.add_positional_encoding(x, t, offset=3, scale=0.5, dropout_p=0.2),
    "embed": lambda x, w, t: mmkern.embed_tokens(TOKENS, w, t, scale=2.0, dropout_p=0.2),
    "rotary": lambda x, w, t: mmkern.rotary(x),
}
TOKENS = torch.randint(40, (8, 300), generator=torch.Generator().manual_seed(1))


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = (8, 300, 96), (40, 96), (310, 96)
    return [randn(*shape, dtype=dtype, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("name", CALLS)
def test_deterministic(name: str) -> None:
    """The same bits over 20 repeats and 1, 2 and 4 threads; the gradient that came in stays as it was."""
    given, grad, threads = inputs(), randn(8, 300, 96, seed=5), torch.get_num_threads()
    kept, found = grad.clone(), []
    try:
        for i in range(20):
            torch.set_num_threads((1, 2, 4)[i % 3])
            torch.manual_seed(2)
            out = CALLS[name](*given)
            found.append([out, *torch.autograd.grad(out, given, grad, allow_unused=True)])
            for a, b in zip(found[-1], found[0], strict=True):
                assert (a is None and b is None) or torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(grad, kept)


@pytest.mark.parametrize("name", ["add", "embed"])
def test_checkpoint_drops_the_same_again(name: str) -> None:
    given, found = inputs(), []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        torch.manual_seed(3)
        out = wrap(CALLS[name], *given)
        found.append([out, *torch.autograd.grad(out.square().sum(), given, allow_unused=True)])
    assert all(a is None or torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_saves_no_activation(name: str) -> None:
    given, saved = inputs(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        CALLS[name](*given)
    known = {t.data_ptr() for t in (TOKENS, given[1], given[2])}
    assert sum(t.numel() for t in saved if t.data_ptr() not in known) <= 1  # the seed of dropout


def test_opcheck_and_what_ran() -> None:
    grad, seed = randn(2, 3, 5, 8, layout="transposed"), torch.tensor([3])
    torch.library.opcheck(op.position_table_bwd.default, (grad, 9, 1, None, 0.0, None))
    torch.library.opcheck(op.position_table_bwd.default, (grad.mT, 20, 0, torch.tensor([1, 2]), 0.5, seed))
    tokens = torch.randint(7, (2, 3, 5))
    torch.library.opcheck(op.embed_tokens_bwd.default, (grad, tokens, 9, 2.0, 0.5, 1, seed))
    x, table, few = randn(2, 3, 5, 8, layout="transposed"), randn(9, 8), torch.tensor([[1, 2, 8]])
    starts = torch.tensor([1, 2])
    for args in ((x, "table", table, 1, None, 1.0, 0.0, None), (x.mT, "scalar", None, 0, starts, 2.0, 0.5, starts[:1])):
        torch.library.opcheck(op.add_positional_encoding_fwd.default, args)
    torch.library.opcheck(op.embed_tokens_fwd.default, (few, table, "sinusoidal", None, 3, None, 1.0, 0.0, None, None))
    for name, ops in {
        "add": ["add_positional_encoding_fwd", "add_positional_encoding_fwd", "position_table_bwd"],
        "embed": ["embed_tokens_fwd", "embed_tokens_bwd", "position_table_bwd"],
        "rotary": ["rotary_fwd", "rotary_fwd"],
    }.items():
        ran = mmkern.explain(lambda name=name: CALLS[name](*inputs()).sum().backward())
        assert [(choice.op, choice.backend) for choice in ran] == [(op_name, "cpu") for op_name in ops]


def test_compiles_whole() -> None:
    x, weight, table = inputs()

    def embed(w: Tensor, t: Tensor) -> Tensor:
        return mmkern.rotary(mmkern.embed_tokens(TOKENS, w, t, scale=2.0)).tanh()

    compiled = torch.compile(embed, fullgraph=True)
    found = torch.autograd.grad(compiled(weight, table), (weight, table), x.detach())
    want = torch.autograd.grad(embed(weight, table), (weight, table), x.detach())
    for actual, expected in zip(found, want, strict=True):
        torch.testing.assert_close(actual, expected)


X, T = torch.zeros(2, 3, 8), torch.zeros(4, 8)
IDS = torch.tensor([[0, 3]])
ERRORS = [
    (lambda: mmkern.add_positional_encoding(X.int()), TypeError, "x: .*int32"),
    (lambda: mmkern.add_positional_encoding(torch.zeros(3)), ValueError, r"x: .*\(3,\)"),
    (lambda: mmkern.add_positional_encoding(X, "sine"), ValueError, "encoding: .*'sine'"),
    (lambda: mmkern.add_positional_encoding(X, 3), TypeError, "encoding: .*int"),
    (lambda: mmkern.add_positional_encoding(X, offset=1.0), TypeError, "offset: .*float"),
    (lambda: mmkern.add_positional_encoding(X, T[:, :5]), ValueError, r"encoding: .*8.*\(4, 5\)"),
    (lambda: mmkern.add_positional_encoding(X, T.half()), TypeError, "encoding: .*float16.*float32"),
    (lambda: mmkern.add_positional_encoding(X, T, offset=2), IndexError, "offset: 2 .*length 3.*max_length 4"),
    (lambda: mmkern.add_positional_encoding(X, T, offset=torch.tensor([0, 2])), IndexError, "2.*max_length 4"),
    (lambda: mmkern.add_positional_encoding(X, T, offset=torch.tensor([0, -1])), IndexError, "-1.*max_length 4"),
    (lambda: mmkern.add_positional_encoding(X, offset=-1), ValueError, "offset: .*-1"),
    (lambda: mmkern.add_positional_encoding(X, offset=torch.zeros(3).long()), ValueError, r"offset: .*\(3,\)"),
    (lambda: mmkern.add_positional_encoding(X, offset=torch.zeros(2)), TypeError, "offset: .*float32"),
    (lambda: mmkern.add_positional_encoding(X, "sincos2d", offset=1), ValueError, "offset: "),
    (lambda: mmkern.add_positional_encoding(X[..., :6], "sincos2d"), ValueError, r"divisible by 4.*\(2, 3, 6\)"),
    (lambda: mmkern.add_positional_encoding(X, dropout_p=1.5), ValueError, "dropout_p: .*1.5"),
    (lambda: mmkern.embed_tokens(IDS.float(), T), TypeError, "tokens: .*float32"),
    (lambda: mmkern.embed_tokens(IDS, T[0]), ValueError, r"\(1, 2\) and \(8,\)"),
    (lambda: mmkern.embed_tokens(IDS, T, "sincos2d"), ValueError, "encoding: "),
    (lambda: mmkern.embed_tokens(IDS + 1, T), IndexError, "tokens: id 4 .*4 rows"),
    (lambda: mmkern.embed_tokens(IDS.int() - 1, T), IndexError, "tokens: id -1 .*4 rows"),
    (lambda: mmkern.embed_tokens(IDS + 1, T.double()), IndexError, "tokens: .*4 rows"),
    (lambda: mmkern.embed_tokens(IDS, T, padding_idx=4), IndexError, "padding_idx: 4 .*4 rows"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


HALF, FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize(("dtype", "table_dtype"), [(HALF, FULL), (FULL, HALF), (HALF, torch.float16)])
def test_a_table_of_another_dtype_under_autocast_is_added_as_torch_adds_it(dtype, table_dtype):
    """Type promotion: torch's autocast leaves additions and lookups as they are."""
    tokens = torch.tensor([[3, 1], [0, 4]])
    with torch.autocast("cpu", torch.bfloat16):
        for ours in (True, False):
            x, table = randn(2, 2, 6, seed=1).to(dtype), randn(4, 6, seed=2).to(table_dtype)
            weight = randn(5, 6, seed=3).to(dtype)
            leaves = [t.requires_grad_() for t in (x, table, weight)]
            if ours:
                placed = mmkern.add_positional_encoding(x, table, offset=1)
                embedded = mmkern.embed_tokens(tokens, weight, table, scale=2.0, padding_idx=3)
            else:
                placed = x + table[1:3]
                embedded = torch.nn.functional.embedding(tokens, weight, padding_idx=3) * 2.0 + table[:2]
            assert placed.dtype == embedded.dtype == FULL
            grads = torch.autograd.grad([placed, embedded], leaves, [randn(2, 2, 6, seed=4), randn(2, 2, 6, seed=5)])
            found = [placed, embedded, *grads]
            if ours:
                expected = found
            assert [g.dtype for g in grads] == [t.dtype for t in leaves]
        for f, e in zip(expected, found, strict=True):
            torch.testing.assert_close(f, e)
    with pytest.raises(TypeError, match="encoding: the table has"):
        mmkern.add_positional_encoding(x, table)

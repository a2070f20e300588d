import math

import pytest
import torch
import torch.nn.functional as F

import mmkern
from mmkern import reference, testing
from mmkern.testing import randn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 37, 50), (3, 2, 9, 7), (4, 9, 1), (1, 1, 2), (70, 96), (2, 3, 2, 5, 18), (5, 0, 8), (0, 3, 8), (2, 3, 0)]
op = torch.ops.mmkern


def exact(x, encoding, offset=0, scale=1.0):
    table = encoding.double() if isinstance(encoding, torch.Tensor) else None
    offsets = offset if isinstance(offset, torch.Tensor) else None
    name = "table" if table is not None else encoding
    start = 0 if offsets is not None else offset
    return reference.add_positional_encoding(x.double(), name, table, start, offsets, scale, 0.0, None)


def eager(x, encoding, offset, scale):
    """How torch users write it: the encoding's rows rounded to x's dtype, then scaled and added."""
    zero = torch.zeros(x.shape, dtype=torch.float64)
    return x * scale + exact(zero, encoding, offset).to(x.dtype)


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("encoding", ["sinusoidal", "scalar", "table"])
def test_add_matches_definition(isa, dtype, encoding):
    for i, shape in enumerate(SHAPES):
        layout = testing.LAYOUTS[i % len(testing.LAYOUTS)]
        x = testing.randn(*shape, dtype=dtype, layout=layout, seed=i)
        kind = testing.randn(300, shape[-1], dtype=dtype, seed=9) if encoding == "table" else encoding
        for offset, scale in ((0, 1.0), (199, math.sqrt(shape[-1]))):
            with mmkern.backend("cpu", strict=True, isa=isa), testing.poisoned():
                out = mmkern.add_positional_encoding(x, kind, offset=offset, scale=scale)
            testing.assert_accurate(out, exact(x, kind, offset, scale), eager(x, kind, offset, scale))


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_sincos2d_matches_definition(isa, layout):
    for shape in ((2, 5, 3, 44), (4, 9, 8), (2, 3, 2, 17, 64), (1, 1, 4)):
        x = testing.randn(*shape, layout=layout)
        with mmkern.backend("cpu", strict=True, isa=isa), testing.poisoned():
            out = mmkern.add_positional_encoding(x, "sincos2d", scale=2.0)
        testing.assert_accurate(out, exact(x, "sincos2d", scale=2.0))


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


@pytest.mark.parametrize("offset", [100_003, 1_048_576, 2**40 + 5])
def test_large_positions_keep_their_accuracy(offset):
    out = mmkern.add_positional_encoding(torch.zeros(40, 64), offset=offset)
    limit = 3e-7 + offset * 4e-16  # a float64 frequency is known to 4e-16
    assert (out - exact(torch.zeros(40, 64), "sinusoidal", offset)).abs().max() < limit


@pytest.mark.parametrize("encoding", ["sinusoidal", "scalar"])
def test_encoding_depends_on_the_position_alone(encoding):
    x = testing.randn(3, 61, 96)
    whole = mmkern.add_positional_encoding(x, encoding)
    for first in (1, 7, 8, 43):
        assert torch.equal(mmkern.add_positional_encoding(x[:, first:], encoding, offset=first), whole[:, first:])
    starts = torch.tensor([0, 13, 2])
    rows = torch.stack([x[b, s : s + 9] for b, s in enumerate(starts.tolist())])
    expected = torch.stack([whole[b, s : s + 9] for b, s in enumerate(starts.tolist())])
    assert torch.equal(mmkern.add_positional_encoding(rows, encoding, offset=starts), expected)
    assert torch.equal(mmkern.add_positional_encoding(x[1:2], encoding), whole[1:2])


def test_same_bits_for_any_thread_count_and_streamed_outputs():
    x = testing.randn(9, 301, 768)  # 8.3 MB: streamed
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
    testing.assert_accurate(results[0], exact(x, "sinusoidal", scale=3.0))


def test_nan_and_inf_stay_where_they_are():
    x = testing.randn(2, 5, 16)
    x[0, 1, 3], x[1, 4, 0], x[1, 0, 5] = math.nan, math.inf, -math.inf
    testing.assert_accurate(mmkern.add_positional_encoding(x), exact(x, "sinusoidal"))
    huge = torch.full((1, 3, 4), 3e38)
    assert mmkern.add_positional_encoding(huge, scale=2.0).isposinf().all()


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embed_matches_definition(isa, dtype):
    weight = testing.randn(50, 38, dtype=dtype, layout="strided")
    table = testing.randn(40, 38, dtype=dtype, seed=3)
    for shape in ((3, 17), (9,), (2, 3, 5), (2, 0)):
        tokens = torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(1))
        for encoding in (None, "sinusoidal", "scalar", table):
            x = F.embedding(tokens, weight)
            with mmkern.backend("cpu", strict=True, isa=isa), testing.poisoned():
                out = mmkern.embed_tokens(tokens.int(), weight, encoding, offset=4, scale=1.5)
                wide = mmkern.embed_tokens(tokens.mT if len(shape) == 2 else tokens, weight, encoding, offset=4)
            kind = "none" if encoding is None else encoding
            testing.assert_accurate(out, exact(x, kind, 4, 1.5), eager(x, kind, 4, 1.5))
            xt = F.embedding(tokens.mT, weight) if len(shape) == 2 else x
            testing.assert_accurate(wide, exact(xt, kind, 4), eager(xt, kind, 4, 1.0))


def test_gradients_reach_x_table_and_weight():
    x = testing.randn(2, 5, 6).requires_grad_()
    table = testing.randn(9, 6, seed=1).requires_grad_()
    weight = testing.randn(7, 6, seed=2).requires_grad_()
    up = testing.randn(2, 5, 6, seed=3)
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


def test_opcheck():
    x, table, tokens = testing.randn(2, 3, 5, 8, layout="transposed"), testing.randn(9, 8), torch.tensor([[1, 2, 8]])
    starts = torch.tensor([1, 2])
    for args in ((x, "table", table, 1, None, 1.0, 0.0, None), (x.mT, "scalar", None, 0, starts, 2.0, 0.5, starts[:1])):
        torch.library.opcheck(op.add_positional_encoding_fwd.default, args)
    torch.library.opcheck(
        op.embed_tokens_fwd.default, (tokens, table, "sinusoidal", None, 3, None, 1.0, 0.0, None, None)
    )


def test_compiles_whole():
    x, weight = testing.randn(2, 5, 6), testing.randn(9, 6).requires_grad_()
    tokens = torch.tensor([[0, 1, 8]])
    compiled = torch.compile(lambda x, o: mmkern.add_positional_encoding(x, offset=o, scale=2.0), fullgraph=True)
    for offset in (0, 3, 4):
        assert torch.equal(compiled(x, offset), mmkern.add_positional_encoding(x, offset=offset, scale=2.0))
    embed = torch.compile(lambda w: mmkern.embed_tokens(tokens, w, "sinusoidal"), fullgraph=True)
    embed(weight).sum().backward()
    assert torch.equal(weight.grad.sum(1), torch.tensor([6.0, 6, 0, 0, 0, 0, 0, 0, 6]))


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

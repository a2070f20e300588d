"""softmax, log_softmax and masked_softmax against float64, on every instruction set, dtype, dim and layout."""

import math

import pytest
import torch

import mmkern
from mmkern import testing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = {"softmax": (mmkern.softmax, torch.softmax), "log_softmax": (mmkern.log_softmax, torch.log_softmax)}
SHAPES = [((5,), 0), ((3, 1), 1), ((3, 1), 0), ((7, 33), 1), ((7, 33), 0), ((2, 5, 200), 1), ((2, 3, 17, 5), 0)]
SHAPES += [((1100, 70), 0), ((3, 1200, 4), 1), ((2, 6, 7, 13), 1), ((4, 9, 2, 64), 1)]
SHAPES += [((2, 5, 4, 70), -2), ((5, 49, 49), 2), ((2, 70001), 1), ((0, 4), 1), ((4, 0), 1), ((), 0)]


def kernels(isa):
    return mmkern.backend("cpu", strict=True, isa=isa)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_matches_float64(name, dtype, shape, dim):
    ours, torchs = OPS[name]
    for layout in testing.LAYOUTS:
        x = testing.randn(*shape, dtype=dtype, layout=layout, scale=3.0)
        exact, baseline = torchs(x.double(), dim), torchs(x, dim)
        for isa in testing.isas():
            with kernels(isa), testing.poisoned():
                y = ours(x, dim)
                out = torch.empty_like(y)
                assert ours(x, dim, out=out) is out
            testing.assert_accurate(y, exact, baseline)
            assert y.stride() == baseline.stride()
            assert torch.equal(y, out)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("cols", [9001, 75001])
def test_outputs_larger_than_the_cache(dtype, cols):
    x = testing.randn((9 << 20) // dtype.itemsize // cols, cols, dtype=dtype, layout="offset")  # streamed from 8 MiB
    exact, baseline = torch.softmax(x.double(), 1), torch.softmax(x, 1)
    for isa in testing.isas():
        with kernels(isa), testing.poisoned():
            given = torch.empty_like(baseline)  # written past the caches; a fresh one is not
            testing.assert_accurate(mmkern.softmax(x, 1, out=given), exact, baseline)
            testing.assert_accurate(mmkern.log_softmax(x, 1, out=given), exact.log(), baseline.log())
            testing.assert_accurate(mmkern.masked_softmax(x), exact, baseline)


def terms(shape, dtype):
    """Masks and biases of every kind, shape and layout that broadcast to `shape`."""
    draw = torch.Generator().manual_seed(1)
    full, last = torch.rand(shape, generator=draw), torch.rand(shape[-1:], generator=draw)
    column = torch.rand((*shape[:-1], 1), generator=draw)
    strided = torch.stack([full, full], -1).flatten(-2)[..., ::2]
    masks = [None, full > 0.3, last > 0.3, column > 0.3, strided > 0.3, full, (last - 0.5).to(dtype)]
    masks.append(torch.where(full > 0.3, 0.0, -torch.inf))
    return [(mask, bias) for mask in masks for bias in (None, last, column.to(dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), [((3, 4, 49), -1), ((2, 33, 70), 1), ((5, 130), 0)])
def test_masked_matches_float64(dtype, shape, dim):
    x = testing.randn(*shape, dtype=dtype, layout="transposed", scale=2.0)
    for mask, bias in terms(shape, dtype):
        wide = [t if t is None or t.dtype == torch.bool else t.double() for t in (mask, bias)]
        with mmkern.backend("reference"):
            exact = mmkern.masked_softmax(x.double(), wide[0], scale=0.7, bias=wide[1], dim=dim)
            baseline = mmkern.masked_softmax(x, mask, scale=0.7, bias=bias, dim=dim)
        for isa in testing.isas():
            with kernels(isa), testing.poisoned():
                y = mmkern.masked_softmax(x, mask, scale=0.7, bias=bias, dim=dim)
            testing.assert_accurate(y, exact, baseline)


def test_masked_reference_is_softmax_of_filled_scores():
    x, keep, bias = testing.randn(4, 5, 9).double(), torch.rand(5, 9) > 0.4, torch.randn(9).double()
    keep[:, 0] = True
    y = mmkern.masked_softmax(x, keep, scale=0.3, bias=bias)
    torch.testing.assert_close(y, torch.softmax((x * 0.3 + bias).masked_fill(~keep, -math.inf), -1))


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dim", [0, 1])
def test_nan_and_infinity(isa, dim):
    x = testing.randn(40, 40, scale=2.0)
    x[3, 3], x[7, 9], x[:, 20], x[20, :] = torch.nan, torch.inf, -torch.inf, -torch.inf
    with kernels(isa):
        for ours, torchs in OPS.values():
            testing.assert_accurate(ours(x, dim), torchs(x.double(), dim), torchs(x, dim))
        keep = x.isfinite()
        exact = torch.softmax(x.double().masked_fill(~keep, -torch.inf), dim).nan_to_num(0.0)
        for mask in (keep, torch.where(keep, 0.0, -torch.inf)):  # nothing leaks from behind the mask
            y = mmkern.masked_softmax(x, mask, dim=dim)
            testing.assert_accurate(y, exact)
            assert not y[~keep].any()
        seen = mmkern.masked_softmax(x, torch.ones_like(keep), dim=dim).select(1 - dim, 3)
        assert seen.isnan().all()  # a visible NaN takes its row


@pytest.mark.parametrize("isa", testing.isas())
def test_huge_values_and_shift_invariance(isa):
    x = testing.randn(6, 1000, scale=1e4)
    with kernels(isa):
        for ours, torchs in OPS.values():
            testing.assert_accurate(ours(x, 1), torchs(x.double(), 1), torchs(x, 1))
        whole = testing.randn(6, 1000).mul(8).round()
        assert torch.equal(mmkern.softmax(whole, 1), mmkern.softmax(whole + 64.0, 1))
        torch.testing.assert_close(mmkern.softmax(x, 1).sum(1), torch.ones(6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_over_threads_and_batch_mates(dtype):
    x, keep = testing.randn(64, 20, 300, dtype=dtype), torch.rand(20, 300) > 0.2
    before = torch.get_num_threads()
    calls = [lambda t: mmkern.softmax(t, -1), lambda t: mmkern.softmax(t, 1), lambda t: mmkern.log_softmax(t, -1)]
    calls.append(lambda t: mmkern.masked_softmax(t, keep))
    try:
        for call in calls:
            torch.set_num_threads(1)
            expected, copy = call(x), x.clone()
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                assert torch.equal(call(x), expected)
                assert torch.equal(call(x[5:7]), expected[5:7])
            assert torch.equal(x, copy)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows_are_the_same_however_they_are_shared_out(dtype):
    x = testing.randn(6, 70001, dtype=dtype)
    before = torch.get_num_threads()
    try:
        for call in (mmkern.softmax, mmkern.log_softmax):
            torch.set_num_threads(1)
            expected = call(x, 1)
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                assert torch.equal(call(x, 1), expected)  # a row to each thread
                assert torch.equal(call(x[2:4], 1), expected[2:4])  # chunks of a row to each
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("shape", "dim"), [((2, 70001), 1), ((1100, 20), 0)])
def test_nan_and_infinity_in_long_rows(isa, op, shape, dim):
    ours, torchs = OPS[op]
    for places in (
        {5: torch.nan},
        {-1: torch.nan},
        {5: torch.inf},
        {1060: -torch.inf},
        {1060: torch.inf, 3: torch.nan},
    ):
        for rest in (None, -torch.inf):  # a row with nothing else in it, too
            x = testing.randn(*shape, scale=2.0)
            row = x.select(1 - dim, 1)
            if rest is not None:
                row.fill_(rest)
            for at, value in places.items():
                row[at] = value
            with kernels(isa):
                testing.assert_accurate(ours(x, dim), torchs(x.double(), dim), torchs(x, dim))


@pytest.mark.parametrize("call", [mmkern.softmax, mmkern.log_softmax])
def test_in_place_and_strided_outputs(call):
    x = testing.randn(33, 100)
    for dim in (0, 1):
        expected = call(x, dim)
        wide = torch.full((33, 200), 7.0)
        call(x, dim, out=wide[:, ::2])
        torch.testing.assert_close(wide[:, ::2], expected)
        assert (wide[:, 1::2] == 7.0).all()
        assert torch.equal(call(x, dim, out=torch.empty(0)), expected)
        assert torch.equal(call(copy := x.clone(), dim, out=copy), expected)


@pytest.mark.parametrize("dim", [0, 1])
def test_outputs_that_share_memory_with_the_input(dim):
    for step in (1, 40, -1, -40):  # the output begins that many elements after the input
        memory = testing.randn(1700)
        x, out = memory[50:1650].view(40, 40), memory[50 + step : 1650 + step].view(40, 40)
        expected = torch.softmax(x, dim)
        torch.testing.assert_close(mmkern.softmax(x, dim, out=out), expected)
    x = testing.randn(40, 40)
    expected = torch.log_softmax(x, dim)
    torch.testing.assert_close(mmkern.log_softmax(x, dim, out=x.t()), expected)


@pytest.mark.parametrize("mask_dim", [(7, 1, 5), (1, 5), (1, 1), (7, 6, 1), (5,), ()])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_gradient_of_broadcast_terms(mask_dim, dim):
    x, bias = testing.randn(7, 6, 5).double(), testing.randn(*mask_dim).double().requires_grad_()
    weight = testing.randn(7, 6, 5, seed=2).double()
    (actual,) = torch.autograd.grad((mmkern.masked_softmax(x, bias=bias, dim=dim) * weight).sum(), bias)
    (expected,) = torch.autograd.grad((torch.softmax(x + bias, dim) * weight).sum(), bias)
    torch.testing.assert_close(actual, expected)
    float_x, float_bias = x.float(), bias.detach().float()
    testing.assert_accurate(
        mmkern.masked_softmax(float_x, bias=float_bias, dim=dim), torch.softmax(float_x.double() + float_bias, dim)
    )


def test_dtype_is_converted_first():
    x = torch.arange(6).reshape(2, 3)
    assert torch.equal(mmkern.softmax(x, 1, torch.float32), mmkern.softmax(x.float(), 1))
    assert mmkern.log_softmax(x.half(), 1, dtype=torch.float64).dtype == torch.float64


def masked(x, dim):
    return mmkern.masked_softmax(x, torch.arange(x.shape[-1]) != 1, dim=dim)


@pytest.mark.parametrize("call", [mmkern.softmax, mmkern.log_softmax, masked])
def test_gradients_compile_and_vmap(call):
    x = testing.randn(3, 4, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: call(t, 1), (x,))
    assert torch.autograd.gradgradcheck(lambda t: call(t, 1), (x,))
    x = testing.randn(4, 7).requires_grad_()
    (expected,) = torch.autograd.grad(call(x, 1).square().sum(), x)
    compiled = torch.compile(lambda t: call(t * 1.0, 1), fullgraph=True)
    torch.testing.assert_close(compiled(x), call(x, 1))
    (actual,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.vmap(lambda t: call(t, 0))(x.detach()), call(x.detach(), 1))


def test_opcheck():
    x, keep = testing.randn(3, 4), torch.rand(3, 4) > 0.5
    for name in ("softmax_fwd", "log_softmax_fwd"):
        torch.library.opcheck(getattr(torch.ops.mmkern, name).default, (x, 1))
    for name in ("softmax_out", "log_softmax_out"):
        torch.library.opcheck(getattr(torch.ops.mmkern, name).default, (x, 1, torch.empty_like(x)))
    torch.library.opcheck(torch.ops.mmkern.masked_softmax_fwd.default, (x, keep, 1.0, None, 1, 0.0, None))


def test_masked_dropout_keeps_the_expectation_and_follows_the_seed():
    x = torch.zeros(64, 512)
    torch.manual_seed(3)
    y = mmkern.masked_softmax(x, dropout_p=0.25)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 512 / 0.75])
    assert abs((y > 0).float().mean().item() - 0.75) < 0.01  # 32768 draws: 4 standard deviations
    torch.manual_seed(3)
    assert torch.equal(mmkern.masked_softmax(x, dropout_p=0.25), y)
    assert not mmkern.masked_softmax(x, dropout_p=1.0).any()


X = torch.zeros(3, 4)
ERRORS = [
    (lambda: mmkern.softmax([1.0], 0), TypeError, "input"),
    (lambda: mmkern.softmax(X.int(), 0), TypeError, "input.*int32"),
    (lambda: mmkern.softmax(X, 2), IndexError, r"dim.*\[-2, 1\].*\(3, 4\)"),
    (lambda: mmkern.log_softmax(X, -3), IndexError, "dim"),
    (lambda: mmkern.softmax(X, None), TypeError, "dim"),
    (lambda: mmkern.softmax(X, True), TypeError, "dim"),
    (lambda: mmkern.softmax(X, 1, torch.int64), TypeError, "dtype.*int64"),
    (lambda: mmkern.softmax(X, 1, "float32"), TypeError, "dtype.*float32"),
    (lambda: mmkern.softmax(X, 1, out=[0.0]), TypeError, "out.*list"),
    (lambda: mmkern.softmax(X, 1, out=torch.zeros(4).expand(3, 4)), ValueError, r"out.*\(0, 1\).*twice"),
    (lambda: mmkern.softmax(X, 1, out=torch.zeros(3, 3)), ValueError, r"out.*\(3, 4\).*\(3, 3\)"),
    (lambda: mmkern.softmax(X, 1, out=X.double()), ValueError, "out.*float32.*float64"),
    (lambda: mmkern.softmax(X, 1, out=X.clone().requires_grad_()), ValueError, "out.*grad"),
    (lambda: mmkern.masked_softmax(X, torch.ones(5) > 0), ValueError, r"mask.*\(5,\).*\(3, 4\)"),
    (lambda: mmkern.masked_softmax(X, torch.ones(2, 3, 4) > 0), ValueError, "mask"),
    (lambda: mmkern.masked_softmax(X, torch.ones(4, dtype=torch.int64)), TypeError, "mask.*int64"),
    (lambda: mmkern.masked_softmax(X, bias=torch.ones(4) > 0), TypeError, "bias.*bool"),
    (lambda: mmkern.masked_softmax(X, bias=torch.ones(4, device="meta")), ValueError, "bias.*meta.*cpu"),
    (lambda: mmkern.masked_softmax(X, scale=math.nan), ValueError, "scale.*nan"),
    (lambda: mmkern.masked_softmax(X, scale="1"), TypeError, "scale"),
    (lambda: mmkern.masked_softmax(X, dropout_p=1.5), ValueError, "dropout_p.*1.5"),
    (lambda: mmkern.masked_softmax(X, dropout_p=math.nan), ValueError, "dropout_p.*nan"),
    (lambda: mmkern.masked_softmax(X, dim=2), IndexError, "dim"),
]


@pytest.mark.parametrize(("call", "error", "words"), ERRORS)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()

"""Arithmetic that the kernels share: exact dot products, tanh, and which elements dropout keeps."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
_INTERPRET = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 as dtype, rounded to nearest even. The interpreter would cut the bits that bfloat16 has not."""
    if _INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def wide(x):
    """As float32. The interpreter's own conversion of bfloat16 takes a hundred steps."""
    if _INTERPRET and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc in float32. The interpreter's own dot takes the integers it holds bfloat16 as for numbers."""
    if _INTERPRET:
        return acc + tl.dot(wide(a), wide(b), input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def add(total, rest, x):
    """total + x, and what to take off the next x for the rounding of all so far (Kahan): sums of any length."""
    x = x - rest
    found = total + x
    return found, tl.where(tl.abs(found) < float("inf"), (found - total) - x, 0.0)


@triton.jit
def tanh(x):
    """Of float32. By its series below 1/4, where 1 - 2 / (1 + exp(2 x)) would cancel; both within 3 ulp."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0.0, -far, far))


@triton.jit
def _philox_round(c0, c1, c2, c3, k0, k1):
    high0 = tl.umulhi(c0, tl.full([], 0xD2511F53, tl.uint32))
    high1 = tl.umulhi(c2, tl.full([], 0xCD9E8D57, tl.uint32))
    low0 = c0 * tl.full([], 0xD2511F53, tl.uint32)
    low1 = c2 * tl.full([], 0xCD9E8D57, tl.uint32)
    return high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Philox4x32-10: four words of 32 bits for each counter; seed is an int64, counters are uint32 of one shape."""
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0, k1)
        k0 = k0 + tl.full([], 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full([], 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def keep_tile(seed, threshold, batch, head, i, start_j, N: tl.constexpr):
    """Which of the elements (batch, head, i, j) dropout keeps: bool (M, N), True with chance 1 - dropout_p.

    seed: int64; threshold: int64, round(dropout_p * 2^32). batch, head, i: integers (M, 1). start_j: of the columns
    start_j .. start_j + N - 1, a multiple of 4, as is N. mmkern.reference.philox.keep_mask defines which.
    """
    block = (start_j // 4 + tl.arange(0, N // 4)).to(tl.uint32)[None, :]
    zero = (i * 0).to(tl.uint32)
    none = tl.zeros([1, N // 4], tl.uint32)
    w0, w1, w2, w3 = philox(
        seed, block + zero, i.to(tl.uint32) + none, head.to(tl.uint32) + zero + none, batch.to(tl.uint32) + zero + none
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., a, b] is word 2 a + b
    return tl.reshape(words, [i.shape[0], N]).to(tl.int64) >= threshold


@triton.jit
def keep_at(seed, threshold, batch, head, i, j):
    """`keep_tile` for single elements, integers of one shape: four times the work."""
    w0, w1, w2, w3 = philox(seed, (j // 4).to(tl.uint32), i.to(tl.uint32), head.to(tl.uint32), batch.to(tl.uint32))
    word = tl.where(j % 4 < 2, tl.where(j % 4 == 0, w0, w1), tl.where(j % 4 == 2, w2, w3))
    return word.to(tl.int64) >= threshold


@triton.jit
def sincos(turns, position):
    """Sine and cosine, within 1e-7, of position * turns / 2^64 whole turns; int64 that broadcast to one shape.

    The product wraps where the angle does, for any position. The nearest quarter turn comes off in integers, exactly;
    polynomials on [-pi/4, pi/4] do the rest.
    """
    top = ((turns * position) >> 32).to(tl.uint32, bitcast=False)
    quarter = (top + 0x20000000) >> 30
    rest = (top - (quarter << 30)).to(tl.int32, bitcast=True)
    r = rest.to(tl.float32) * 1.46291807926715968e-9  # pi/2 / 2^30
    z = r * r
    s = r + r * z * (-1.6666654611e-1 + z * (8.3321608736e-3 + z * -1.9515295891e-4))
    c = 1.0 + z * (-0.5 + z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5)))
    odd = (quarter & 1) == 1
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    sine = tl.where((quarter & 2) == 2, -sine, sine)
    return sine, tl.where(((quarter + 1) & 2) == 2, -cosine, cosine)

"""Arithmetic that the kernels share: exact dot products, tanh, and which elements dropout keeps."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
_INTERPRET = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc in float32. The interpreter holds bfloat16 as integers, which its own dot does not convert."""
    if _INTERPRET:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


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

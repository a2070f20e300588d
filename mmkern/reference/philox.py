"""Counter-based random numbers: the same element is dropped whatever the tiling, thread count or backend.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC 2011).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Four words of 32 random bits for each counter of four words and key of two, as int64 in [0, 2^32).

    Counters and keys are int64 tensors of values in [0, 2^32) that broadcast against each other.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return [c0, c1, c2, c3]


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product, in 16-bit halves of b so that int64 never overflows."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    total = high + (low >> 16)
    return total >> 16, (total & 0xFFFF) << 16 | (low & 0xFFFF)


def keep_mask(seed: Tensor, dropout_p: float, shape: Sequence[int], device: torch.device) -> Tensor:
    """Which elements of `shape` (batch..., heads, rows, columns) dropout keeps: bool, True with chance 1 - dropout_p.

    seed: int64 tensor: the 64-bit key, and if it has two elements, the number of the first batch entry. Element
    (b, h, i, j), b counting all leading dims, is word j % 4 of the block with counter (j // 4, i, h, b); it is kept
    where that word is at least dropout_p * 2^32.
    """
    *lead, heads, rows, columns = shape
    batch = 1
    for n in lead:
        batch *= n
    blocks = torch.arange((columns + 3) // 4, device=device)
    i = torch.arange(rows, device=device)[:, None]
    h = torch.arange(heads, device=device)[:, None, None]
    b = torch.arange(batch, device=device)[:, None, None, None]
    seed = seed.to(device)
    if seed.numel() > 1:
        seed, b = seed[:1], b + seed[1]
    words = philox((blocks, i, h, b), (seed & _LOW, (seed >> 32) & _LOW))
    bits = torch.stack([w.expand(batch, heads, rows, blocks.numel()) for w in words], -1).flatten(-2)
    return (bits[..., :columns] >= round(dropout_p * 2**32)).reshape(shape)

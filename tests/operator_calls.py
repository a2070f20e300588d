"""Calls of every operator in torch.ops.mmkern: right ones, and wrong ones drawn from these by a seed.

    python tests/operator_calls.py SEED FIRST LAST [--guard]

runs the calls FIRST to LAST - 1 of a seed and prints one line for each: what it is before it runs, then its outcome.
With --guard, the memory of tensors ends at a page that must not be touched. See tests/test_operator_fuzz.py.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkern.ops.dispatch import Op
from mmkern.reference.attention import DIFFERENTIABLE
from mmkern.reference.gradients import bits

BIG = [2**31, 2**62, 2**63 - 1, -(2**31), -(2**63)]
INTS = [-2, -1, 0, 1, 2, 3, 5, 7, 13, 127, 300, *BIG]
FLOATS = [float("nan"), float("inf"), float("-inf"), -1.0, 0.0, 0.5, 1.0, 2.0, 1e308, 5e-324]
WORDS = ["", "none", "sinusoidal", "scalar", "table", "sincos2d", "half", "interleaved", "quarter"]
LISTS = [None, [], [5], [0, 5], [5, 0], [1, 5], [2, 3], [1, 2, 3], [2**62, 4], [-1, -5], [2**63 - 1, 2**63 - 1]]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool]

OPS: dict[str, Op] = {}
for _name in ("attention", "softmax", "loss", "linear_loss", "position", "rotary"):
    OPS |= {op.name: op for op in vars(import_module(f"mmkern.ops.{_name}")).values() if isinstance(op, Op)}


class Draw:
    """Random numbers and tensors of one call."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def one(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype)

    def ints(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def maybe(self, t: Any) -> Any:
        return self.one(None, t)

    def dropout(self) -> tuple[float, Tensor | None]:
        return self.one((0.0, None), (0.25, self.ints(1 << 40, 1)))


def attention(d: Draw) -> list[Any]:
    batch, q_len, k_len, dim = d.one(1, 2), d.one(1, 5, 33), d.one(1, 12, 70), d.one(3, 16)
    heads, kv_heads = d.one((4, 2), (2, 2), (3, 1))
    query = d.floats(batch, heads, q_len, dim)
    key, value = d.floats(batch, kv_heads, k_len, dim), d.floats(batch, kv_heads, k_len, d.one(dim, 5))
    mask = d.floats(d.one(1, batch), d.one(1, heads), d.one(1, q_len), k_len)
    lengths = d.ints(k_len + 1, batch)
    p, seed = d.dropout()
    return [
        query, key, value, d.one(None, mask, mask > 0), p, d.one(True, False), 0.4, d.random.randrange(4),
        d.maybe(d.floats(heads)), d.one(-1, 0, 3), d.one(-1, 0, 3), d.one(0.0, 2.0), d.maybe(d.floats(batch, heads)),
        d.maybe(lengths), d.maybe(d.floats(heads)), d.one(True, False), seed,
    ]  # fmt: skip


def attention_bwd(d: Draw) -> list[Any]:
    args = OPS["attention_fwd"].record._make(attention(d))
    out, lse = torch.ops.mmkern.attention_fwd(*args)
    floats = [name for name in DIFFERENTIABLE if (t := getattr(args, name)) is not None and t.is_floating_point()]
    grad_out = d.floats(*out.shape)
    return [grad_out, d.maybe(d.floats(*lse.shape)), out, lse, *args, bits(DIFFERENTIABLE, floats)]


def scores(d: Draw) -> tuple[Tensor, int]:
    shape = d.one((6,), (3, 9), (2, 3, 17), (2, 2, 4, 5))
    return d.floats(*shape), d.random.randrange(len(shape))


def masked(d: Draw) -> list[Any]:
    x, dim = scores(d)
    term = d.floats(*(d.one(1, n) for n in x.shape))
    return [x, d.one(None, term > 0, term), 0.5, d.maybe(d.floats(x.shape[-1])), dim, *d.dropout()]


def masked_bwd(d: Draw) -> list[Any]:
    x, mask, scale, bias, dim, p, seed = masked(d)
    wanted = 1 + 2 * (mask is not None and mask.dtype != torch.bool) + 4 * (bias is not None)
    output = None if seed is not None else torch.ops.mmkern.masked_softmax_fwd(x, mask, scale, bias, dim, p, seed)
    given = None if seed is None else x
    return [d.floats(*x.shape), output, given, mask, scale, bias, dim, p, seed, wanted]


def losses(d: Draw) -> list[Any]:
    shape = d.one((7,), (5, 7), (2, 7, 3), (33, 70))
    x, classes = d.floats(*shape), shape[min(1, len(shape) - 1)]
    target = d.ints(classes, *(shape[2:] if len(shape) == 1 else (shape[0], *shape[2:])))
    soft = d.one(True, False)
    target = d.floats(*shape).abs() if soft else target
    return [
        x, target, d.maybe(d.floats(classes).abs()), d.one(-100, 2), d.random.randrange(3), d.one(0.0, 0.1), True,
        d.random.randrange(4 if soft else 2),
    ]  # fmt: skip


def scaled(d: Draw) -> list[Any]:
    shape = d.one((5, 7), (2, 7, 3))
    return [d.floats(*shape), d.one(d.floats(), d.floats(shape[0], *shape[2:])), d.maybe(torch.full((1,), 4.0))]


def linear(d: Draw) -> list[Any]:
    rows, dim, classes = d.one(1, 6), d.one(4, 9), 11
    hidden, weight, bias = d.floats(rows, dim), d.floats(classes, dim), d.maybe(d.floats(classes))
    return [hidden, weight, d.ints(classes, rows), bias, d.maybe(d.floats(classes).abs()), d.one(-100, 2)]


def encoded(d: Draw, batch: int, length: int, dim: int) -> list[Any]:
    """encoding, table, offset, offsets, scale of a call."""
    encoding = d.one("none", "sinusoidal", "scalar", "table")
    table = d.floats(20, dim) if encoding == "table" else None
    offset, offsets = d.one((0, None), (3, None), (0, d.ints(9, batch)))
    return [encoding, table, offset, offsets, 1.5]


def positions(d: Draw) -> list[Any]:
    x = d.floats(2, d.one(1, 3), d.one(1, 9), d.one(4, 20))
    if d.one(True, False, False):
        return [x, "sincos2d", None, 0, None, 1.5, *d.dropout()]
    return [x, *encoded(d, 2, *x.shape[-2:]), *d.dropout()]


def tokens(d: Draw) -> list[Any]:
    ids, weight = d.ints(10, 2, d.one(1, 9)).to(d.one(torch.int32, torch.int64)), d.floats(10, d.one(3, 20))
    dropout, seed = d.dropout()
    return [ids, weight, *encoded(d, 2, ids.shape[1], weight.shape[1]), dropout, d.one(None, 2), seed]


def tokens_bwd(d: Draw) -> list[Any]:
    ids, weight, *_, dropout, padding, seed = tokens(d)
    return [d.floats(*ids.shape, weight.shape[1]), ids, 10, 1.5, dropout, padding, seed]


def rotations(d: Draw, keys: bool) -> list[Any]:
    length, dim, rank = d.one(1, 6), d.one(8, 20), d.one(2, 3, 4)
    q = d.floats(*(2, 3)[4 - rank :], length, dim)
    where = d.ints(50, length) if rank == 2 else d.one(d.ints(50, length), d.ints(50, q.shape[0], length))
    grid = d.one(None, (1, length))
    rest = [d.maybe(where), 10000.0, d.one("half", "interleaved"), d.one(4, dim), grid, d.one(True, False)]
    k = d.floats(*q.shape[:1], 5, *q.shape[2:]) if rank == 4 else d.floats(*q.shape)
    return [q, k, *rest] if keys else [q, *rest]


def with_out(d: Draw) -> list[Any]:
    x, dim = scores(d)
    return [x, dim, d.one(torch.empty_like(x), x)]


CALLS: dict[str, Callable[[Draw], list[Any]]] = {
    "attention_fwd": attention,
    "attention_bwd": attention_bwd,
    "softmax_fwd": lambda d: list(scores(d)),
    "log_softmax_fwd": lambda d: list(scores(d)),
    "softmax_out": with_out,
    "log_softmax_out": with_out,
    "softmax_bwd": lambda d: [(x := scores(d))[0], d.floats(*x[0].shape).softmax(x[1]), x[1]],
    "log_softmax_bwd": lambda d: [(x := scores(d))[0], d.floats(*x[0].shape).log_softmax(x[1]), x[1]],
    "masked_softmax_fwd": masked,
    "masked_softmax_bwd": masked_bwd,
    "cross_entropy_fwd": losses,
    "cross_entropy_bwd": scaled,
    "cross_entropy_bwd_": scaled,
    "linear_cross_entropy_fwd": lambda d: [*linear(d), d.random.randrange(3), d.one(0.0, 0.1), d.one(0, 2), 3],
    "linear_cross_entropy_bwd": lambda d: [d.floats(len((x := linear(d))[0])), *x, d.one(0.0, 0.1), d.one(0, 2), 3],
    "add_positional_encoding_fwd": positions,
    "position_table_bwd": lambda d: [d.floats(2, d.one(1, 9), d.one(3, 20)), 20, d.one(0, 3), None, *d.dropout()],
    "embed_tokens_fwd": tokens,
    "embed_tokens_bwd": tokens_bwd,
    "rotary_fwd": lambda d: rotations(d, False),
    "rotary_qk_fwd": lambda d: rotations(d, True),
}


def wrong_tensor(d: Draw, t: Tensor | None) -> Any:
    """Something else in the place of a tensor, and often wrong there."""
    if t is None:
        return d.one(d.floats(2), d.ints(9, 2), d.floats(2, 3, 4, 5), d.ints(1 << 40, 1), d.floats())
    dims, last = t.dim(), max(t.dim() - 1, 0)
    dim = d.random.randrange(dims) if dims else 0
    kind = d.random.randrange(14)
    if kind == 0:
        return None
    if kind == 1:
        return t[None] if d.one(True, False) else t.flatten()
    if kind == 2:
        return t.narrow(dim, 0, t.shape[dim] - 1) if dims and t.shape[dim] else t[None]
    if kind == 3:
        return torch.cat([t, t], dim) if dims else t.expand(3)
    if kind == 4:
        return t.narrow(dim, 0, 0) if dims else t[None][:0]
    if kind == 5:
        return t.to(d.one(*DTYPES))
    if kind == 6:  # every other element
        return torch.stack([t, t], -1)[..., 0]
    if kind == 7:
        return t.narrow(dim, 0, 1).expand(t.shape) if dims and t.shape[dim] else t
    if kind == 8:
        return t.transpose(dim, last).contiguous().transpose(dim, last) if dims else t
    if kind == 9:  # freed, or half of it
        t = t.clone()
        t.untyped_storage().resize_(d.one(0, t.untyped_storage().nbytes() // 2))
        return t
    if kind == 10:
        return t.to("meta") if d.one(True, False) else t.to_sparse()
    if kind == 11:  # one dim more or less at the end
        return t[..., None] if d.one(True, False) or not dims else t.select(dim, 0) if t.shape[dim] else t
    t = t.clone()
    values = FLOATS if t.is_floating_point() else INTS if t.dtype == torch.int64 else [-1, 0, 13, 300, 2**31 - 1]
    if t.dtype != torch.bool and t.numel():
        t = t.contiguous()
        t.view(-1)[d.random.randrange(t.numel())] = torch.tensor(d.one(*values)).to(t.dtype)
    return t


def wrong(d: Draw, kind: str, value: Any) -> Any:
    if "Tensor" in kind:
        return wrong_tensor(d, value)
    if "[]" in kind or "List" in kind:
        return d.one(*LISTS)
    if kind == "bool":
        return not value
    choices: dict[str, list[Any]] = {"float": FLOATS, "str": WORDS}
    return d.one(*choices.get(kind, INTS))


def drawn(number: int) -> tuple[str, list[Any], list[int]]:
    """Call `number`: the operator, its arguments, and the places of the wrong ones."""
    d = Draw(number)
    name = list(CALLS)[number % len(CALLS)]
    args = CALLS[name](d)
    kinds = [str(a.type) for a in OPS[name]._dispatch._schema.arguments]
    places = d.random.sample(range(len(args)), min(len(args), d.one(0, 1, 1, 2, 3)))
    for i in places:
        args[i] = wrong(d, kinds[i], args[i])
    return name, args, places


def at_guard(t: Tensor) -> Tensor:
    """A copy of `t`, strides and all, whose last element is followed by memory that cannot be read."""
    if t.device.type != "cpu" or t.layout != torch.strided or not t.numel():
        return t
    steps = [step if n > 1 else 0 for n, step in zip(t.shape, t.stride(), strict=True)]
    count = 1 + sum((n - 1) * step for n, step in zip(t.shape, steps, strict=True))
    size = count * t.element_size()
    if t.untyped_storage().nbytes() < size + t.storage_offset() * t.element_size():
        return t
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + pages), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    room = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=pages - size)
    copy = room.view(t.dtype).as_strided(t.shape, t.stride())
    source = t.as_strided((count,), (1,), t.storage_offset())
    room.view(t.dtype).copy_(source)
    return copy


def differences(name: str, args: list[Any], found: Any, into: int | None = None) -> str:
    """How a result differs from the reference's, "" where it does not."""
    try:
        exact = OPS[name].reference(*args)
    except Exception as error:  # any error of torch's
        return f"the reference raises {type(error).__name__}: {str(error)[:150]}"
    if not comparable(name, args):
        return ""
    exact = exact if into is None else args[into]
    results = [[t] if isinstance(t, Tensor) else list(t) for t in (found, exact)]
    if name == "cross_entropy_fwd" and results[0][3].numel():  # float16 gradients are kept larger
        results[0][1:3] = [(t / results[0][3]).to(t.dtype) for t in results[0][1:3]]
        results = [each[:3] for each in results]
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        if a.shape != b.shape or (a.dtype != b.dtype and a.numel()):
            return f"output {i} is {a.shape} {a.dtype}, not {b.shape} {b.dtype}"
        near = 3e-2 if any(isinstance(t, Tensor) and t.dtype in DTYPES[2:4] for t in args) else 1e-3
        pair = [a.double(), b.double()]
        if not moderate(name, args):
            pair = [torch.where(a.isfinite() & b.isfinite(), t, 0.0) for t in pair]
        if a.numel() and not torch.allclose(*pair, near, near, equal_nan=True):
            apart, texts = (pair[0] - pair[1]).abs().max(), [str(t.flatten()[:6].tolist()) for t in pair]
            return f"output {i} differs by {apart:.3g}: {texts[0]} is not {texts[1]}"
    return ""


def moderate(name: str, args: list[Any]) -> bool:
    """Whether all numbers are finite and far from overflow, so that not even infinities may differ."""
    floats = [torch.tensor(a) if isinstance(a, float) else a for a in args]
    floats = [t.double() for t in floats if isinstance(t, Tensor) and t.is_floating_point()]
    return all(bool(t.isfinite().all()) and (t.numel() == 0 or t.abs().max() < 1e30) for t in floats)


def comparable(name: str, args: list[Any]) -> bool:
    """Sines of huge angles have no digits in the reference: no position beyond 2^28, no frequency above 1."""
    given = OPS[name].record._make(args)
    if "rotary" in name:
        return given.base >= 1.0 and (given.positions is None or bool((given.positions.abs() < 1 << 28).all()))
    if name in ("add_positional_encoding_fwd", "embed_tokens_fwd"):
        return abs(given.offset) < 1 << 28 and (given.offsets is None or bool((given.offsets.abs() < 1 << 28).all()))
    return True


def has_memory(t: Any) -> bool:
    """Whether torch itself may touch what the argument holds."""
    if not isinstance(t, Tensor) or t.numel() == 0:
        return True
    if t.device.type != "cpu" or t.layout != torch.strided:
        return False
    last = t.storage_offset() + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size() <= t.untyped_storage().nbytes()


def outcome(name: str, args: list[Any]) -> str:
    """What a call comes to: "ok", "refused ..." or "WRONG ..."."""
    operator = getattr(torch.ops.mmkern, name)
    readable = all(has_memory(a) for a in args)
    dense = all(a.device.type == "cpu" and a.layout == torch.strided for a in args if isinstance(a, Tensor))
    if not dense and any(isinstance(a, Tensor) and a.layout == torch.strided and not has_memory(a) for a in args):
        return "ok, left out: the reference would run, and torch's own ops read half a storage"
    kept = [a.clone() if isinstance(a, Tensor) else a for a in args] if readable else args
    try:
        found = operator(*args)
        if name == "attention_bwd":  # the formula reads neither output: give both the right ones
            args[2:4] = kept[2:4] = torch.ops.mmkern.attention_fwd(*args[4:-1])
            found = operator(*args)
        if name == "masked_softmax_bwd" and args[1] is not None:  # a mask or scale may be another than the output's
            args[1] = kept[1] = torch.ops.mmkern.masked_softmax_fwd(args[1], *args[3:9])
            found = operator(*args)
    except Exception as error:  # any error of ours or torch's
        return f"refused {type(error).__name__}: {str(error).splitlines()[0][:150]}"
    if not readable:
        return "WRONG it read memory that there is not" if dense else "ok"
    if found is None:  # written into an argument
        place = 2 if name.endswith("out") else 0
        wrong = differences(name, kept, args[place], place)
    else:
        wrong = differences(name, kept, found)
    return f"WRONG {wrong}" if wrong else "ok"


def shown(a: Any) -> str:
    if not isinstance(a, Tensor):
        return repr(a)
    return f"{str(a.dtype)[6:]}{list(a.shape)}" if a.layout == torch.strided else "sparse"


def main(seed: int, first: int, last: int, guard: bool) -> int:
    torch.set_num_threads(2)
    if "LD_PRELOAD" not in os.environ:  # a size of 2^31 is to be refused, not to fill the machine
        used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30),) * 2)
    wrong = 0
    for number in range(first, last):
        name, args, places = drawn(seed * 1_000_000 + number)
        print(f"{number} {name}({', '.join(shown(a) for a in args)}) wrong {places}", flush=True)
        if guard:
            args = [at_guard(a) if isinstance(a, Tensor) else a for a in args]
        signal.alarm(300)
        found = outcome(name, args)
        signal.alarm(0)
        print(f"  {found}", flush=True)
        wrong += found.startswith("WRONG")
    print(f"{last - first} calls, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*(int(a) for a in sys.argv[1:4]), "--guard" in sys.argv))

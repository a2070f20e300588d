"""Shapes of a user's own, from a TOML file.

[[shape]]
op = "attention-causal"        # any attention op; softmax, log_softmax, cross_entropy, rotary, add_positional_encoding
name = "my decoder"
batch = 2
heads = [32, 8]                # query and key heads; or one number
q_len = 300
k_len = 300
head_dim = 96
dtype = ["float32"]            # all three if left out

[[shape]]
op = "softmax"
name = "my classes"
size = [64, 5000]
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mmkern.benchmarks import bench_attention, bench_attention_training, bench_loss, bench_position, bench_softmax
from mmkern.benchmarks.records import DTYPES, Case

SIZES = ("batch", "q_len", "k_len", "head_dim")
PLAIN: dict[str, Callable[[str, tuple[int, ...]], tuple[Callable[..., Any], str, int, float]]] = {
    "softmax": lambda op, size: (partial(bench_softmax._plain, op, size, -1), "softmax", 0, 14.0),
    "log_softmax": lambda op, size: (partial(bench_softmax._plain, op, size, -1), "softmax", 0, 14.0),
    "cross_entropy": lambda op, size: (partial(bench_loss._cross_entropy, size, 0.0), "loss", 2, 16.0),
    "rotary": lambda op, size: (partial(bench_position._rotary, size, "half"), "position", 5, 3.0),
    "add_positional_encoding": lambda op, size: (partial(bench_position._add, size, "sinusoidal"), "position", 3, 2.0),
}


def read_shapes(path: Path) -> list[Case]:
    """The cases of a file, in its order.

    Raises:
        ValueError: what is wrong with the file, in one line.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    shapes = document.get("shape", [])
    if not isinstance(shapes, list) or not shapes:
        raise ValueError(f"{path}: no [[shape]] in it")
    cases: list[Case] = []
    for number, given in enumerate(shapes, 1):
        try:
            cases += _cases(dict(given))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: shape {number}: {error}") from None
    ids = [case.id for case in cases]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{path}: two shapes of one op have the same name")
    return cases


def _cases(given: dict[str, Any]) -> Iterator[Case]:
    op = given.pop("op", None)
    name = given.pop("name", f"{op}")
    dtypes = given.pop("dtype", list(DTYPES))
    attention = {s.op: (m, s) for m in (bench_attention_training, bench_attention) for s in m.SHAPES}
    if op not in attention and op not in PLAIN:
        raise ValueError(f"no such op: {op!r}; choose from {', '.join([*attention, *PLAIN])}")
    if not isinstance(dtypes, list) or not dtypes or (unknown := [d for d in dtypes if d not in DTYPES]):
        raise ValueError(f"dtype: expected a list of {', '.join(DTYPES)}, got {dtypes if not dtypes else unknown}")
    if op in PLAIN:
        yield from _plain(op, str(name), given, dtypes)
        return
    module, like = attention[op]
    heads = given.pop("heads", None)
    heads = [heads, heads] if isinstance(heads, int) else heads
    sizes = {key: given.pop(key, None) for key in SIZES}
    _positive("heads", heads, 2)
    for key, value in sizes.items():
        _positive(key, [value], 1)
    if heads[0] % heads[1]:
        raise ValueError(f"heads: {heads[0]} query heads are no multiple of {heads[1]} key heads")
    _empty(given)
    shape = replace(like, name=str(name), heads=tuple(heads), level="quick", dtypes=tuple(dtypes), **sizes)
    for case in module.cases([shape]):
        if case.dtype_name in dtypes:
            yield case


def _plain(op: str, name: str, given: dict[str, Any], dtypes: list[str]) -> Iterator[Case]:
    size = given.pop("size", None)
    _empty(given)
    build, family, dims, flops = PLAIN[op](op, tuple(size) if isinstance(size, list) else ())
    _positive("size", size, dims)
    for dtype in map(DTYPES.__getitem__, dtypes):
        elements = size[0] * (size[1] + size[2]) * size[3] * size[4] if op == "rotary" else math.prod(size)
        moved = 2.0 * elements * dtype.itemsize
        yield Case(family, op, name, "x".join(map(str, size)), dtype, build, flops * elements, moved, "copy", "quick")


def _positive(name: str, values: Any, count: int) -> None:
    right = isinstance(values, list) and values and all(type(v) is int and v > 0 for v in values)
    if not right or (count and len(values) != count):
        wanted = "a positive integer" if count == 1 else f"{count or 'some'} positive integers"
        raise ValueError(f"{name}: expected {wanted}, got {values[0] if right is False and count == 1 else values}")


def _empty(given: dict[str, Any]) -> None:
    if given:
        raise ValueError(f"no such key: {', '.join(given)}")

"""Which backend takes which op and dtype, and the reasons of the others, each told once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import mmkern
from mmkern.benchmarks.records import Case
from mmkern.benchmarks.tables import Table


def explain_tables(cases: Sequence[Case], dtypes: dict[str, torch.dtype]) -> tuple[Table, Table]:
    """Runs each op's smallest case once in every dtype."""
    smallest = {c.op: c for c in sorted(cases, key=lambda c: c.flops, reverse=True)}
    ops = list(dict.fromkeys(c.op for c in cases))
    rows, reasons = [], dict[tuple[str, str], list[tuple[str, str]]]()
    for op in ops:
        cells = []
        for name, dtype in dtypes.items():
            ran = mmkern.explain(smallest[op].build(dtype, "cpu").ours)
            cells.append(", ".join(dict.fromkeys(f"{c.backend} {c.detail}".strip() for c in ran)))
            for backend, why in dict.fromkeys(refusal for choice in ran for refusal in choice.refused.items()):
                reasons.setdefault((backend, why), []).append((op, name))
        rows.append((op, *cells))
    whys = [(backend, why, folded(calls, ops, list(dtypes))) for (backend, why), calls in reasons.items()]
    header, because = ("op", *dtypes), ("not on", "because", "calls")
    return Table("runs on", header, rows, header), Table("why not elsewhere", because, whys, because)


def folded(calls: Sequence[tuple[str, str]], ops: Sequence[str], dtypes: Sequence[str]) -> str:
    """ "all", "float64: all ops" or "attention, rotary: bfloat16, float16": ops with the same dtypes together."""
    if len(calls) == len(ops) * len(dtypes):
        return "all"
    of: dict[str, list[str]] = {}
    for op, dtype in calls:
        of.setdefault(op, []).append(dtype)
    groups: dict[tuple[str, ...], list[str]] = {}
    for op, names in of.items():
        groups.setdefault(tuple(names), []).append(op)
    return "; ".join(
        f"{'all dtypes' if len(names) == len(dtypes) else ', '.join(names)}: "
        f"{'all ops' if len(some) == len(ops) else ', '.join(some)}"
        for names, some in groups.items()
    )

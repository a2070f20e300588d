"""All cases, and which of them a run takes."""

from __future__ import annotations

from collections.abc import Sequence

from mmkern.benchmarks import bench_attention, bench_attention_training, bench_loss, bench_position, bench_softmax
from mmkern.benchmarks.records import DTYPES, LEVELS, Case

FAMILIES = {
    "attention": (bench_attention, bench_attention_training),
    "softmax": (bench_softmax,),
    "loss": (bench_loss,),
    "position": (bench_position,),
}


def select(
    ops: Sequence[str] = (), dtypes: Sequence[str] = (), level: str = "default", device: str = "cpu"
) -> list[Case]:
    """Cases of the named ops or families (all if none), dtypes (all) and levels up to `level`, table order.

    A GPU also gets those of level "gpu", which fill it.

    Raises:
        ValueError: a name that no case has, with those that exist.
    """
    every = [case for modules in FAMILIES.values() for module in modules for case in module.cases()]
    known = [*FAMILIES, *dict.fromkeys(case.op for case in every)]
    for given, names in ((ops, known), (dtypes, [*DTYPES]), ([level], LEVELS)):
        for name in given:
            if name not in names:
                raise ValueError(f"no such name: {name!r}; choose from {', '.join(dict.fromkeys(names))}")
    levels = (*LEVELS[: LEVELS.index(level) + 1], *(("gpu",) if device != "cpu" else ()))
    order = {op: i for i, op in enumerate(dict.fromkeys(case.op for case in every))}
    chosen = among([case for case in every if case.level in levels], ops, dtypes)
    return sorted(chosen, key=lambda case: (order[case.op], [*DTYPES.values()].index(case.dtype)))


def among(cases: Sequence[Case], ops: Sequence[str], dtypes: Sequence[str]) -> list[Case]:
    """Those of the named ops or families and dtypes."""
    return [
        case
        for case in cases
        if (not ops or case.op in ops or case.family in ops) and (not dtypes or case.dtype_name in dtypes)
    ]

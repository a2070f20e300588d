"""Measurements as tables of text, and how numbers are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmkern.benchmarks.records import ARITHMETIC, Pair, Result
from mmkern.benchmarks.statistics import geometric_mean, median

SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
MEMORY = "peak memory (torch)"
CEILING_NAMES = {"fma": "FMA", "bf16_dot": "bf16 dot", "copy": "copy", "read": "read"}
OVERHEAD = "smallest"  # the shape that measures a call's cost: no part of a mean


@dataclass(frozen=True)
class Table:
    """Cells as text; `words` names the columns that are not numbers, `spare` those a narrow screen drops first."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: tuple[str, ...] = ()
    spare: tuple[str, ...] = ()

    def fit(self, width: int) -> Table:
        """The table without as many of its spare columns as it takes to be at most `width` characters wide."""
        kept = list(range(len(self.header)))
        for name in (*self.spare, None):
            widths = [max(len(row[i]) for row in (self.header, *self.rows)) for i in kept]
            if name is None or sum(widths) + 3 * len(widths) <= width:
                break
            kept.remove(self.header.index(name))
        return self._pick(kept)

    def without(self, name: str) -> Table:
        return self._pick([i for i, column in enumerate(self.header) if column != name])

    def _pick(self, kept: Sequence[int]) -> Table:
        header = tuple(self.header[i] for i in kept)
        rows = [tuple(row[i] for i in kept) for row in self.rows]
        return replace(self, header=header, rows=rows, spare=tuple(name for name in self.spare if name in header))


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{three_digits(seconds / size)} {unit}"
    return f"{three_digits(seconds * 1e6)} µs"


def memory(count: int) -> str:
    """Bytes in KiB, MiB or GiB."""
    for unit, one in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= one:
            return f"{three_digits(count / one)} {unit}"
    return f"{three_digits(count / 1024)} KiB"


def three_digits(value: float) -> str:
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f}"


def speedup(pair: Pair) -> str:
    return f"{pair.speedup:.2f}x [{pair.low:.2f}, {pair.high:.2f}]"


def family_tables(results: Sequence[Result]) -> list[Table]:
    """One table per family, a row per case."""
    header = (
        "op", "shape", "size", "dtype", "mmkern", "torch", "speedup", "rate", "of peak", "max error (torch)",
    )  # fmt: skip
    tables = []
    for family in dict.fromkeys(r.family for r in results):
        rows = [_row(r) for r in results if r.family == family]
        words = (*header[:4], "torch's way")
        spare = ("torch's way", "size", "max error (torch)", "of peak", "rate", MEMORY)
        table = Table(family, (*header, MEMORY, "note", "torch's way"), rows, (*words, "note"), spare)
        for name, column in ((MEMORY, -3), ("note", -2)):
            table = table if any(row[column] for row in rows) else table.without(name)
        tables.append(table)
    return tables


def _row(r: Result) -> tuple[str, ...]:
    head = (r.op, r.shape, r.dims, SHORT.get(r.dtype, r.dtype))
    errors = "" if r.max_error is None else f"{r.max_error:.1e} ({r.torch_error:.1e})"
    if r.pair is None:
        return (*head, "" if r.status == "ok" else r.status.upper(), "", "", "", "", errors, "", "", "")
    unit = "GFLOP/s" if r.bound in ARITHMETIC else "GB/s"
    rate = "" if r.rate is None else f"{three_digits(r.rate)} {unit}"
    share = "" if r.of_ceiling is None else f"{r.of_ceiling:.0%} {CEILING_NAMES[r.bound]}"
    times = duration(median(r.pair.ours)), duration(median(r.pair.theirs))
    held = ""
    if r.peak_bytes is not None and r.torch_peak_bytes is not None:
        held = f"{memory(r.peak_bytes)} ({memory(r.torch_peak_bytes)})"
    return (
        *head,
        *times,
        speedup(r.pair),
        rate,
        share,
        errors,
        held,
        "; ".join(note.split(":")[0] for note in r.notes),
        r.against,
    )


def summary(results: Sequence[Result]) -> Table:
    """Geometric mean and worst speedup of each op and dtype, over the cases that count."""
    header = ("op", "dtype", "cases", "geometric mean", "worst", "worst case", "backend")
    groups: dict[tuple[str, str], list[Result]] = {}
    for r in results:
        op = f"{r.op}, {r.shape}" if r.shape == OVERHEAD else r.op
        groups.setdefault((op, SHORT.get(r.dtype, r.dtype)), []).append(r)
    rows = []
    for (op, dtype), group in groups.items():
        timed = [(r.pair.speedup, r.shape) for r in group if r.pair and r.judged]
        ran = ", ".join(dict.fromkeys(line.split(": ", 1)[1] for r in group for line in r.ran))
        if timed:
            worst, shape = min(timed)
            mean = geometric_mean(ratio for ratio, _ in timed)
            rows.append((op, dtype, f"{len(timed)}/{len(group)}", f"{mean:.2f}x", f"{worst:.2f}x", shape, ran))
        else:
            rows.append((op, dtype, f"0/{len(group)}", "", "", "", ran))
    return Table("summary", header, rows, ("op", "dtype", "worst case", "backend"), ("backend",))


def why_slower(r: Result) -> str:
    """What the numbers of a lost case say about the reason."""
    assert r.pair is not None
    if any("reference" in line for line in r.ran):
        return "no kernel took this call: the reference formula ran"
    if r.one_thread and r.one_thread.speedup > 1:
        return f"threads: on one thread it is {r.one_thread.speedup:.2f}x"
    if r.cold and r.cold[1] > r.cold[0]:
        return f"only while the data are in a cache: with cold caches it is {r.cold[1] / r.cold[0]:.2f}x"
    if median(r.pair.ours) < 2e-5:
        return "the cost of a call, not of its work"
    if r.of_ceiling is not None:
        what = CEILING_NAMES.get(r.bound, r.bound)
        return f"ours reaches {r.of_ceiling:.0%} of {what}, torch's {r.of_ceiling / r.pair.speedup:.0%}"
    return ""


def lost(results: Sequence[Result]) -> Table:
    """Cases that count and where torch is faster, the worst first; "within noise" where the interval reaches 1."""
    header = ("op", "shape", "dtype", "mmkern", "torch", "speedup", "why", "torch's way")
    losing = [(r.pair, r) for r in results if r.pair and r.judged and r.pair.speedup < 1]
    rows = []
    for pair, r in sorted(losing, key=lambda both: both[0].speedup):
        why = "within noise" if pair.high >= 1 else why_slower(r)
        times = duration(median(pair.ours)), duration(median(pair.theirs))
        rows.append((r.op, r.shape, SHORT.get(r.dtype, r.dtype), *times, speedup(pair), why, r.against))
    return Table("slower than torch", header, rows, ("op", "shape", "dtype", "torch's way", "why"), ("torch's way",))


def overhead(results: Sequence[Result]) -> Table:
    """What a call costs that has next to nothing to compute."""
    header = ("op", "dtype", "mmkern", "torch", "speedup", "on one thread")
    rows = []
    for r in results:
        if r.shape == OVERHEAD and r.pair:
            times = duration(median(r.pair.ours)), duration(median(r.pair.theirs))
            alone = speedup(r.one_thread) if r.one_thread else ""
            rows.append((r.op, SHORT.get(r.dtype, r.dtype), *times, speedup(r.pair), alone))
    return Table("call overhead", header, rows, ("op", "dtype"))


def failures(results: Sequence[Result]) -> Table:
    """Cases that are not right, or broke, or whose time is not believed."""
    bad = [r for r in results if r.status not in ("ok", "over budget")]
    rows = [(r.op, r.shape, SHORT.get(r.dtype, r.dtype), r.status, r.error) for r in bad]
    header = ("op", "shape", "dtype", "status", "why")
    return Table("failed", header, rows, header)


def not_timed(results: Sequence[Result]) -> Table:
    """Cases that took too long; those that no time was left for together, an op a row."""
    late = [r for r in results if r.status == "over budget"]
    rows = [(r.op, r.shape, SHORT.get(r.dtype, r.dtype), r.error) for r in late if r.seconds_spent]
    rest: dict[str, list[Result]] = {}
    for r in late:
        if not r.seconds_spent:
            rest.setdefault(r.op, []).append(r)
    rows += [(op, f"{len(some)} cases", "", some[0].error) for op, some in rest.items()]
    header = ("op", "shape", "dtype", "why")
    return Table("not timed", header, rows, header)


def verify_table(results: Sequence[Result], by_shape: bool = False) -> Table:
    """How many cases of each op and dtype are right, or each shape with its errors."""
    if by_shape:
        header = ("op", "shape", "size", "dtype", "", "max error", "torch's", "backend")
        rows = [
            (
                *(r.op, r.shape, r.dims, SHORT.get(r.dtype, r.dtype), "right" if r.status == "ok" else r.status),
                *("" if e is None else f"{e:.1e}" for e in (r.max_error, r.torch_error)),
                ", ".join(line.split(": ", 1)[1] for line in r.ran),
            )
            for r in results
        ]
        return Table("verify", header, rows, ("op", "shape", "size", "dtype", "", "backend"), ("backend", "size"))
    header = ("op", "dtype", "cases", "right", "largest error / torch's", "backend")
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.op, SHORT.get(result.dtype, result.dtype)), []).append(result)
    rows = []
    for key, group in groups.items():
        ratios = [r.max_error / r.torch_error for r in group if r.max_error is not None and r.torch_error]
        ran = dict.fromkeys(line.split(": ", 1)[1] for r in group for line in r.ran)
        right = str(sum(r.status == "ok" for r in group))
        rows.append((*key, str(len(group)), right, f"{max(ratios):.2f}" if ratios else "", ", ".join(ran)))
    return Table("verify", header, rows, ("op", "dtype", "backend"))


def model_table(model: Sequence[dict[str, Any]]) -> Table:
    header = ("texts", "tokens each", "mmkern", "sdpa", "eager", "speedup over sdpa", "max difference", "least cosine")
    rows = [
        (
            m["texts"],
            f"{m['mean_tokens']:.0f}",
            f"{m['mmkern_per_second']:.1f}/s",
            f"{m['sdpa_per_second']:.1f}/s",
            f"{m['eager_per_second']:.1f}/s",
            speedup(Pair(**m["pair"])),
            f"{m['max_difference']:.1e}",
            f"{m['least_cosine']:.7f}",
        )
        for m in model
    ]
    return Table("MiniLM-L6 (pretrained, transformers)", header, rows, ("texts",), ("eager", "least cosine"))

"""A run's numbers as a verdict and in Markdown, for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmkern.benchmarks.guards import IDLE
from mmkern.benchmarks.noise import UNSTABLE
from mmkern.benchmarks.records import Result
from mmkern.benchmarks.statistics import geometric_mean, mean_interval
from mmkern.benchmarks.tables import (
    CEILING_NAMES,
    OVERHEAD,
    Table,
    failures,
    family_tables,
    lost,
    model_table,
    not_timed,
    overhead,
    summary,
)
from mmkern.benchmarks.trace import Report

LOADED = 0.5  # one-minute load average above which a quiet machine is not assumed
SAME = 0.02  # two times that differ by less are called equal however narrow the interval
HOW = (
    "Each case is first held against torch in float64, and so is the output of its last timed call; one that fails "
    "shows no time. Times are medians. A speedup is the median over rounds of torch's time / mmkern's time, both "
    "sides timed right after one another in alternating order, the inputs changed between rounds, against the "
    "fastest of the ways to compute the same thing that is right (the last column); in brackets its 95% bootstrap "
    "interval. A case with a note (too few rounds, a wide interval, a machine that ran something else) keeps its "
    "numbers and counts in no verdict. Of peak is the share of what this machine reached in the same run: multiply-"
    "adds or bf16 dot products for attention, copy bandwidth (for decode: read bandwidth) at the case's own size "
    "for the rest. Max error is the largest difference from float64, torch's own behind it. Peak memory, measured "
    "where gradients are computed, is the most tensor memory that a call holds at once beyond what it was given."
)


@dataclass(frozen=True)
class Verdict:
    """What a run says in one line; without a mean where it says nothing, `unstable` telling why."""

    mean: float | None
    low: float
    high: float
    faster: int
    equal: int
    slower: int
    timed: int
    right: int
    checked: int
    unstable: str = ""


def sides(r: Result, floor: float) -> str:
    """ "faster", "equal" or "slower": equal where the interval reaches what the run's own noise explains."""
    assert r.pair is not None
    margin = 1 + max(SAME, floor)
    return "faster" if r.pair.low > margin else "slower" if r.pair.high < 1 / margin else "equal"


def instability(report: Report) -> str:
    """Why a run as a whole cannot be believed; empty if it can."""
    if report.noise_floor > UNSTABLE:
        return f"a call timed against itself differs by {report.noise_floor:.0%}"
    busy = [n["busy"] for n in report.noise if n["busy"]]
    if busy and min(busy) < IDLE:
        return f"its threads ran {min(busy):.0%} of their time: the machine does something else"
    return ""


def verdict(report: Report) -> Verdict:
    judged = [r for r in report.results if r.judged and r.shape != OVERHEAD]
    found = [sides(r, report.noise_floor) for r in judged]
    counts = [found.count(name) for name in ("faster", "equal", "slower")]
    checked = [r for r in report.results if r.max_error is not None or r.status in ("wrong", "refused", "error")]
    right = sum(r.status in ("ok", "over budget") for r in checked)
    timed = sum(r.pair is not None for r in report.results)
    unstable = instability(report)
    if unstable or not judged:
        return Verdict(
            None, 0.0, 0.0, *counts, timed, right, len(checked), unstable or "no case gave a time that counts"
        )
    ratios = [r.pair.speedup for r in judged if r.pair]
    return Verdict(geometric_mean(ratios), *mean_interval(ratios), *counts, timed, right, len(checked))


def sentence(v: Verdict) -> str:
    right = (
        f"all {v.checked} cases right"
        if v.right == v.checked
        else f"{v.checked - v.right} OF {v.checked} CASES NOT RIGHT"
    )
    if v.mean is None:
        return f"No verdict on speed: {v.unstable}. {right[0].upper()}{right[1:]}."
    judged = v.faster + v.equal + v.slower
    rest = f", {v.timed - judged} without a verdict" if v.timed > judged else ""
    return (
        f"{v.mean:.2f}x as fast as the fastest of torch's ways [{v.low:.2f}, {v.high:.2f}], mean of {judged} cases: "
        f"{v.faster} faster, {v.equal} equal, {v.slower} slower{rest}; {right}."
    )


def machine_lines(report: Report) -> list[str]:
    m = report.machine
    build = f"mmkern {m['mmkern']}" + (f" ({m['commit']})" if m["commit"] else "")
    isa = f"instruction set {m['isa']}" if m["isa"] else "no compiled kernels: the reference formulas ran"
    load = m["load"]
    busy = [f"Load {load:.1f} before the run: something else was busy, times may be off."] if load > LOADED else []
    if report.noise:
        busy.append(f"Noise: a call timed against itself differs by up to {report.noise_floor:.1%}.")
    if report.ceilings_moved > UNSTABLE:
        busy.append(
            f"The machine's ceilings differed by {report.ceilings_moved:.0%} between the beginning and the end."
        )
    if report.left or not report.complete:
        done = len(report.planned) - len(report.left)
        busy.append(f"Partial: {done} of {len(report.planned)} cases; `mmkern bench --resume` goes on.")
    speed = "; ".join(f"{n} {m[k]}" for n, k in (("clock", "clock"), ("power cap", "power_cap")) if m.get(k))
    math = ", ".join(f"{n} {m[k]}" for n, k in (("MKL", "mkl"), ("oneDNN", "onednn")) if m[k])
    gpu = []
    if m.get("gpu"):
        gpu = [
            f"{m['gpu']} ({m['gpu_memory_gib']} GiB, compute capability {m['gpu_capability']}), CUDA {m['cuda']}, "
            f"cuDNN {m['cudnn']}, Triton {m['triton']}: all times are of this GPU"
        ]
    return [
        *gpu,
        f"{m['processor']}, {m['cores']} cores, {m['threads']} threads, {m['system']}",
        f"{build}, {isa}; torch {m['torch']}" + (f" with {math}" if math else "") + f"; Python {m['python']}",
        *([speed] if speed else []),
        *busy,
    ]


def peaks(report: Report) -> str:
    """The ceilings that stand for the machine: arithmetic, and memory at the largest size measured."""
    found = []
    for bound, unit in (("fma", "GFLOP/s"), ("bf16_dot", "GFLOP/s"), ("copy", "GB/s"), ("read", "GB/s")):
        sizes = [(int(n.split()[1]) if " " in n else 0, v) for n, v in report.ceilings.items() if n.split()[0] == bound]
        if sizes:
            size, value = max(sizes)
            at = f" ({size >> 10} MiB)" if size >= 1024 else ""
            found.append(f"{CEILING_NAMES[bound]} {value:.0f} {unit}{at}")
    return ", ".join(found)


def to_markdown(report: Report) -> str:
    lines = ["# mmkern benchmark", "", sentence(verdict(report)), "", f"{report.started}, {report.seconds:.0f} s.", ""]
    lines += [f"- {line}" for line in machine_lines(report)]
    if report.ceilings:
        lines.append(f"- Ceilings measured in this run: {peaks(report)}")
    lines += ["", HOW, ""]
    bad, slow = failures(report.results), lost(report.results)
    for table in (bad, summary(report.results), slow):
        if table.rows:
            lines += _markdown(table)
    late = not_timed(report.results)
    if late.rows:
        lines += _markdown(late)
    if not slow.rows and any(r.pair for r in report.results):
        lines += ["No case is slower than torch.", ""]
    if (small := overhead(report.results)).rows:
        lines += _markdown(small)
    if report.model:
        lines += _markdown(model_table(report.model))
    elif report.model_missing:
        lines += [f"Real model not run: {report.model_missing}", ""]
    for table in family_tables(report.results):
        lines += _markdown(table)
    return "\n".join(lines).rstrip()


def _markdown(table: Table) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = ["---" if name in table.words else "---:" for name in table.header]
    title = table.title[0].upper() + table.title[1:]
    return [f"## {title}", "", line(table.header), line(rule), *map(line, table.rows), ""]

"""A run's numbers as tables and sentences, for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmkern.benchmarks.guards import IDLE
from mmkern.benchmarks.noise import UNSTABLE
from mmkern.benchmarks.records import ARITHMETIC, Pair, Result
from mmkern.benchmarks.statistics import geometric_mean, mean_interval, median
from mmkern.benchmarks.trace import Report

SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
LOADED = 0.5  # one-minute load average above which a quiet machine is not assumed
MEMORY = "peak memory (torch)"
CEILING_NAMES = {"fma": "FMA", "bf16_dot": "bf16 dot", "copy": "copy", "read": "read"}
SAME = 0.02  # two times that differ by less are called equal however narrow the interval
OVERHEAD = "smallest"  # the shape that measures a call's cost: no part of a mean
HOW = (
    "Each case is first held against torch in float64, and so is the output of its last timed call; one that fails "
    "shows no time. Times are medians. A speedup is the median over rounds of torch's time / mmkern's time, both "
    "sides timed right after one another in alternating order, the inputs changed between rounds, against the "
    "fastest of the ways to compute the same thing that is right (the last column); in brackets its 95% bootstrap "
    "interval. A case with a note (too few rounds, a wide interval, a machine that ran something else) keeps its "
    "numbers and counts in no verdict. Of peak is the share of what this machine reached in the same run: multiply- "
    "adds or bf16 dot products for attention, copy bandwidth (for decode: read bandwidth) at the case's own size "
    "for the rest. Max error is the largest difference from float64, torch's own behind it. Peak memory, measured "
    "where gradients are computed, is the most tensor memory that a call holds at once beyond what it was given."
)


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

"""One run's report: kept as JSON with every sample, read as tables on a terminal or in Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mmkern.benchmarks.measure import Pair, Result, geometric_mean, median

SCHEMA = "mmkern.bench/1"
SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
LOADED = 0.5  # one-minute load average above which a quiet machine is not assumed
MEMORY = "peak memory (torch)"
CEILING_NAMES = {"fma": "FMA", "bf16_dot": "bf16 dot", "copy": "copy", "read": "read"}
HOW = (
    "Each case is first held against torch in float64; one that fails shows no time. Times are medians. A speedup "
    "is the median over rounds of torch's time / mmkern's time, both sides timed right after one another in "
    "alternating order, against the fastest of torch's ways to compute the same thing (the last column); in "
    "brackets its 95% bootstrap interval. Of peak is the share of what this machine reached in the same run: "
    "multiply-adds or bf16 dot products for attention, copy bandwidth (for decode: read bandwidth) at the case's own "
    "size for the rest. Max error is the largest difference from float64, torch's own behind it. Peak memory, measured "
    "where gradients are computed, is the most tensor memory that a call holds at once beyond what it was given."
)


@dataclass
class Report:
    """Everything one run found; plain values only, so it survives JSON unchanged."""

    started: str
    options: dict[str, Any]
    machine: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)
    model: list[dict[str, Any]] = field(default_factory=list)
    model_missing: str = ""
    seconds: float = 0.0
    schema: str = SCHEMA

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Raises ValueError for a report of another schema."""
        data = json.loads(text)
        if data.get("schema") != SCHEMA:
            raise ValueError(f"report: expected schema {SCHEMA!r}, got {data.get('schema')!r}")
        results = [Result(**{**r, "pair": Pair(**r["pair"]) if r["pair"] else None}) for r in data.pop("results")]
        return cls(**data, results=results)

    def write(self, folder: Path) -> tuple[Path, Path]:
        folder.mkdir(parents=True, exist_ok=True)
        paths = folder / "report.json", folder / "report.md"
        for path, text in zip(paths, (self.to_json(), to_markdown(self)), strict=True):
            path.write_text(text + "\n", encoding="utf-8")
        return paths


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
            return f"{_three_digits(seconds / size)} {unit}"
    return f"{_three_digits(seconds * 1e6)} µs"


def memory(count: int) -> str:
    """Bytes in KiB, MiB or GiB."""
    for unit, one in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= one:
            return f"{_three_digits(count / one)} {unit}"
    return f"{_three_digits(count / 1024)} KiB"


def _three_digits(value: float) -> str:
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f}"


def speedup(pair: Pair) -> str:
    return f"{pair.speedup:.2f}x [{pair.low:.2f}, {pair.high:.2f}]"


def family_tables(results: Sequence[Result]) -> list[Table]:
    """One table per family, a row per case."""
    header = ("op", "shape", "size", "dtype", "mmkern", "torch", "speedup", "rate", "of peak", "max error (torch)")
    tables = []
    for family in dict.fromkeys(r.family for r in results):
        rows = [_row(r) for r in results if r.family == family]
        words = (*header[:4], "torch's way")
        spare = ("torch's way", "size", "max error (torch)", "of peak", "rate", MEMORY)
        table = Table(family, (*header, MEMORY, "torch's way"), rows, words, spare)
        tables.append(table if any(row[-2] for row in rows) else table.without(MEMORY))
    return tables


def _row(r: Result) -> tuple[str, ...]:
    head = (r.op, r.shape, r.dims, SHORT.get(r.dtype, r.dtype))
    errors = "" if r.max_error is None else f"{r.max_error:.1e} ({r.torch_error:.1e})"
    if r.pair is None:
        return (*head, "" if r.status == "ok" else r.status.upper(), "", "", "", "", errors, "", "")
    unit = "GFLOP/s" if r.bound in ("fma", "bf16_dot") else "GB/s"
    rate = "" if r.rate is None else f"{_three_digits(r.rate)} {unit}"
    share = "" if r.of_ceiling is None else f"{r.of_ceiling:.0%} {CEILING_NAMES[r.bound]}"
    times = duration(median(r.pair.ours)), duration(median(r.pair.theirs))
    held = ""
    if r.peak_bytes is not None and r.torch_peak_bytes is not None:
        held = f"{memory(r.peak_bytes)} ({memory(r.torch_peak_bytes)})"
    return (*head, *times, speedup(r.pair), rate, share, errors, held, r.against)


def summary(results: Sequence[Result]) -> Table:
    """Geometric mean and worst speedup of each op and dtype."""
    header = ("op", "dtype", "cases", "geometric mean", "worst", "worst case", "backend")
    groups: dict[tuple[str, str], list[Result]] = {}
    for r in results:
        op = f"{r.op}, {r.shape}" if r.shape == "smallest" else r.op  # call overhead: no part of a mean
        groups.setdefault((op, SHORT.get(r.dtype, r.dtype)), []).append(r)
    rows = []
    for (op, dtype), group in groups.items():
        timed = [(r.pair.speedup, r.shape) for r in group if r.pair]
        ran = ", ".join(dict.fromkeys(line.split(": ", 1)[1] for r in group for line in r.ran))
        if timed:
            worst, shape = min(timed)
            mean = geometric_mean(ratio for ratio, _ in timed)
            rows.append((op, dtype, f"{len(timed)}/{len(group)}", f"{mean:.2f}x", f"{worst:.2f}x", shape, ran))
        else:
            rows.append((op, dtype, f"0/{len(group)}", "", "", "", ran))
    return Table("summary", header, rows, ("op", "dtype", "worst case", "backend"), ("backend",))


def lost(results: Sequence[Result]) -> Table:
    """Cases where torch is faster, the worst first; "within noise" where the interval reaches 1."""
    header = ("op", "shape", "dtype", "mmkern", "torch", "speedup", "torch's way", "note")
    losing = [(r.pair, r) for r in results if r.pair and r.pair.speedup < 1]
    rows = []
    for pair, r in sorted(losing, key=lambda both: both[0].speedup):
        noise = "within noise" if pair.high >= 1 else ""
        times = duration(median(pair.ours)), duration(median(pair.theirs))
        rows.append((r.op, r.shape, SHORT.get(r.dtype, r.dtype), *times, speedup(pair), r.against, noise))
    return Table("slower than torch", header, rows, ("op", "shape", "dtype", "torch's way", "note"), ("torch's way",))


def failures(results: Sequence[Result]) -> Table:
    rows = [(r.op, r.shape, SHORT.get(r.dtype, r.dtype), r.status, r.error) for r in results if r.status != "ok"]
    header = ("op", "shape", "dtype", "status", "why")
    return Table("failed", header, rows, header)


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
    lines = ["# mmkern benchmark", "", f"{report.started}, {report.seconds:.0f} s.", ""]
    lines += [f"- {line}" for line in machine_lines(report)]
    if report.ceilings:
        lines.append(f"- Ceilings measured in this run: {peaks(report)}")
    lines += ["", HOW, ""]
    bad, slow = failures(report.results), lost(report.results)
    for table in (bad, summary(report.results), slow):
        if table.rows:
            lines += _markdown(table)
    if not slow.rows and any(r.pair for r in report.results):
        lines += ["No case is slower than torch.", ""]
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

"""A run as Markdown and as one HTML file that needs nothing from elsewhere."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from mmkern.benchmarks import plots, report, tables, trace
from mmkern.benchmarks.records import ARITHMETIC, Result
from mmkern.benchmarks.trace import Report

TEMPLATE = Path(__file__).with_name("page.html")
STRONGEST = math.log(4.0)  # a ratio from which on a cell has its full colour
RUNS_SHOWN = 12


def write_pages(folder: Path, found: Report) -> list[Path]:
    """Writes report.md and report.html; returns their paths."""
    paths = [folder / "report.md", folder / "report.html"]
    paths[0].write_text(report.to_markdown(found) + "\n", encoding="utf-8")
    paths[1].write_text(to_html(found, trace.earlier(folder / trace.NAME)), encoding="utf-8")
    return paths


def to_html(found: Report, earlier: Sequence[Report] = ()) -> str:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    verdict = report.verdict(found)
    heat = _heat(found)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title="mmkern benchmark",
        started=f"{datetime.fromisoformat(found.started):%d %B %Y, %H:%M} UTC"
        if "T" in found.started
        else found.started,
        seconds=round(found.seconds),
        verdict=verdict,
        sentence=report.sentence(verdict),
        notices=_notices(found, verdict),
        counts=_counts(found, verdict),
        heat=heat,
        dtypes=[short for name, short in tables.SHORT.items() if any(r.dtype == name for r in found.results)],
        families=list(dict.fromkeys(r.family for r in found.results)),
        lost=tables.lost(found.results),
        bad=tables.failures(found.results),
        late=tables.not_timed(found.results),
        summary=tables.summary(found.results),
        overhead=tables.overhead(found.results),
        model=tables.model_table(found.model) if found.model else None,
        model_missing=found.model_missing,
        plots=_plots(found.results),
        accuracy=Markup(plots.accuracy_plot(found.results)),
        rows=[_row(r, found) for r in found.results],
        history=_history([*earlier, found]),
        environment=_environment(found),
        how=report.HOW,
    )


def _notices(found: Report, verdict: report.Verdict) -> list[str]:
    lines = []
    if found.left or not found.complete:
        done = len(found.planned) - len(found.left)
        lines.append(f"Partial: {done} of {len(found.planned)} cases were measured.")
    if verdict.unstable:
        lines.append(f"The machine was not quiet: {verdict.unstable}. Ratios below are shown and count in no verdict.")
    if not found.machine.get("isa"):
        lines.append("The compiled kernels are missing: the reference formulas ran.")
    return lines


def _counts(found: Report, verdict: report.Verdict) -> list[tuple[str, int, str]]:
    judged = verdict.faster + verdict.equal + verdict.slower
    wrong = sum(r.status in ("wrong", "refused", "error") for r in found.results)
    shown = [
        ("faster", verdict.faster, "faster"),
        ("equal", verdict.equal, "equal"),
        ("slower", verdict.slower, "slower"),
        ("without a verdict", verdict.timed - judged, "unsure"),
        ("not timed", sum(r.status == "over budget" for r in found.results), "unsure"),
        ("not right", wrong, "wrong"),
    ]
    return [one for one in shown if one[1] or one[0] in ("faster", "slower")]


def _cell(r: Result, found: Report, unstable: bool) -> dict[str, Any]:
    """A ratio, what it means, and how strongly to colour it (percent)."""
    if r.pair is None:
        text = "once" if r.status == "ok" else {"over budget": "no time"}.get(r.status, r.status)
        kind = "unsure" if r.status in ("ok", "over budget") else "wrong"
        return {"text": text, "kind": kind, "strength": 0, "title": r.error, "ratio": ""}
    known = r.judged and not unstable
    kind = report.sides(r, found.noise_floor) if known else "unsure"
    strength = min(1.0, abs(math.log(r.pair.speedup)) / STRONGEST)
    return {
        "text": f"{r.pair.speedup:.2f}x" if r.pair.speedup < 99.5 else f"{r.pair.speedup:.0f}x",
        "kind": kind,
        "strength": round(15 + 60 * strength) if kind in ("faster", "slower") else 0,
        "title": "; ".join([tables.speedup(r.pair), *r.notes]),
        "ratio": f"{r.pair.speedup:.4f}",
    }


def _heat(found: Report) -> list[dict[str, Any]]:
    """A line per op and shape, a cell per dtype."""
    unstable = bool(report.instability(found))
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for r in found.results:
        line = lines.setdefault(
            (r.op, r.shape), {"family": r.family, "op": r.op, "shape": r.shape, "dims": r.dims, "cells": {}}
        )
        line["cells"][tables.SHORT.get(r.dtype, r.dtype)] = _cell(r, found, unstable)
    ordered = sorted(
        lines.values(), key=lambda line: list(dict.fromkeys(r.op for r in found.results)).index(line["op"])
    )
    for before, line in zip([None, *ordered], ordered, strict=False):
        line["first"] = before is None or before["op"] != line["op"]
        line["kinds"] = " ".join({cell["kind"] for cell in line["cells"].values()})
    return ordered


def command(r: Result, found: Report) -> str:
    """What measures this case alone."""
    words = ["mmkern", "bench", "--ops", r.op, "--dtype", tables.SHORT.get(r.dtype, r.dtype), "--shape", r.shape]
    if found.options.get("shapes"):
        words += ["--shapes", str(found.options["shapes"])]
    elif found.options.get("level") != "quick":
        words.append("--full")
    if found.options.get("device", "cpu") != "cpu":
        words += ["--device", str(found.options["device"])]
    return shlex.join(words)


def _row(r: Result, found: Report) -> dict[str, Any]:
    known = {
        "family": r.family,
        "op": r.op,
        "shape": r.shape,
        "dims": r.dims,
        "dtype": tables.SHORT.get(r.dtype, r.dtype),
    }
    unit = "GFLOP/s" if r.bound in ARITHMETIC else "GB/s"
    ratio = r.max_error / r.torch_error if r.max_error is not None and r.torch_error else None
    return known | {
        "status": r.status,
        "error": r.error,
        "ours": tables.duration(r.seconds) if r.seconds else "",
        "theirs": tables.duration(r.torch_seconds) if r.torch_seconds else "",
        "cell": _cell(r, found, False),
        "interval": f"{r.pair.low:.2f} to {r.pair.high:.2f}" if r.pair and len(r.pair.ours) > 1 else "",
        "rate": f"{tables.three_digits(r.rate)} {unit}" if r.rate else "",
        "peak": f"{r.of_ceiling:.0%} {tables.CEILING_NAMES.get(r.bound, r.bound)}" if r.of_ceiling else "",
        "max_error": "" if r.max_error is None else f"{r.max_error:.1e}",
        "error_ratio": "" if ratio is None else f"{ratio:.2f}x torch's",
        "cold": f"{tables.duration(r.cold[0])} / {tables.duration(r.cold[1])}" if r.cold else "",
        "one_thread": f"{r.one_thread.speedup:.2f}x" if r.one_thread else "",
        "memory": tables.memory(r.peak_bytes) if r.peak_bytes is not None else "",
        "torch_memory": tables.memory(r.torch_peak_bytes) if r.torch_peak_bytes is not None else "",
        "notes": r.notes,
        "ran": ", ".join(r.ran),
        "against": r.against,
        "screened": {n: tables.duration(s) if not isinstance(s, str) else s for n, s in r.screened.items()},
        "command": command(r, found),
    }


def _plots(results: Sequence[Result]) -> list[dict[str, Any]]:
    shown = []
    for op in dict.fromkeys(r.op for r in results):
        drawn = []
        for dtype in tables.SHORT:
            of = [r for r in results if r.op == op and r.dtype == dtype and r.shape != tables.OVERHEAD]
            if svg := plots.op_plot(op, dtype, of):
                drawn.append({"dtype": tables.SHORT[dtype], "svg": Markup(svg)})
        if drawn:
            shown.append({"op": op, "family": next(r.family for r in results if r.op == op), "drawn": drawn})
    return shown


def _history(reports: Sequence[Report]) -> dict[str, Any]:
    rows, points = [], []
    for one in reports[-RUNS_SHOWN:]:
        v = report.verdict(one)
        when = one.started[:16].replace("T", " ")
        mean = f"{v.mean:.2f}x [{v.low:.2f}, {v.high:.2f}]" if v.mean else f"none: {v.unstable}"
        build = one.machine.get("commit") or one.machine.get("mmkern", "")
        rows.append((when, build, one.machine.get("processor", ""), mean, f"{v.faster} / {v.equal} / {v.slower}"))
        if v.mean:
            points.append((when[5:], v.mean, v.low, v.high))
    return {"rows": rows, "plot": Markup(plots.history_plot(points))} if len(reports) > 1 else {}


def _environment(found: Report) -> list[tuple[str, str]]:
    m = found.machine
    names = {
        "processor": "Processor", "cores": "Cores", "threads": "Threads", "clock": "Clock", "power_cap": "Power cap",
        "governor": "Governor", "load": "Load before", "gpu": "GPU", "cuda": "CUDA", "isa": "Instruction set",
        "mmkern": "mmkern", "commit": "Commit", "compiler": "Compiler", "torch": "torch", "mkl": "MKL",
        "onednn": "oneDNN", "triton": "Triton", "python": "Python", "system": "System",
    }  # fmt: skip
    rows = [
        (title, f"{m[name]:.1f}" if name == "load" else str(m[name])) for name, title in names.items() if m.get(name)
    ]
    if found.noise:
        rows.append(("Noise: a call against itself", f"up to {found.noise_floor:.1%}"))
    if found.ceilings:
        rows.append(("Ceilings, best of several stretches", report.peaks(found)))
        rows.append(("Ceilings at the end", f"within {found.ceilings_moved:.0%} of the beginning"))
    for name, state in (m.get("rivals") or {}).items():
        rows.append((name, state))
    return rows

"""Plots of a report as SVG that takes the colours of the page it stands in."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from mmkern.benchmarks.records import ARITHMETIC, Result
from mmkern.benchmarks.statistics import interval
from mmkern.benchmarks.tables import CEILING_NAMES, SHORT

# Colours that stand for one of the page's own: no other element of a plot has them.
PAGE_COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--quiet)",
    "#030303": "var(--rule)",
    "#040404": "var(--ours)",
    "#050505": "var(--theirs)",
    "#060606": "var(--other)",
}
INK, QUIET, RULE, OURS, THEIRS, OTHER = PAGE_COLOURS
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "mmkern", "font.family": "sans-serif", "font.size": 9,
    "text.color": INK, "axes.edgecolor": RULE, "axes.labelcolor": QUIET, "axes.linewidth": 0.8, "grid.color": RULE,
    "grid.linewidth": 0.5, "xtick.color": QUIET, "ytick.color": QUIET, "axes.spines.top": False,
    "axes.spines.right": False, "figure.facecolor": "none", "axes.facecolor": "none", "legend.frameon": False,
    "axes.titlesize": 9.5, "axes.titlelocation": "left",
}  # fmt: skip


def op_plot(op: str, dtype: str, results: Sequence[Result]) -> str:
    """Time and throughput over the work of a case, every provider, with the machine's ceiling; "" for a single case."""
    timed = sorted((r for r in results if r.pair), key=lambda r: r.work)
    if len({r.work for r in timed}) < 2:
        return ""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.7))
        figure.subplots_adjust(left=0.075, right=0.985, top=0.9, bottom=0.17, wspace=0.16)
        left, right = figure.subplots(1, 2)
        arithmetic = timed[0].bound in ARITHMETIC
        unit, scale = ("GFLOP", 1e9) if arithmetic else ("MB", 1e6)
        work = [r.work / scale for r in timed]
        for name, colour, side in (("mmkern", OURS, 0), ("fastest other", THEIRS, 1)):
            _band(left, right, timed, work, name, colour, side)
        others: dict[str, list[tuple[Result, float]]] = {}
        for r in timed:
            for name, seconds in r.screened.items():
                if not isinstance(seconds, str) and name != r.against:
                    others.setdefault(name, []).append((r, seconds))
        for (name, found), marker in zip(others.items(), "xs^vd", strict=False):
            x = [r.work / scale for r, _ in found]
            look: dict[str, Any] = {"marker": marker, "linestyle": "none", "color": OTHER, "markersize": 3.5}
            left.plot(x, [1e3 * s for _, s in found], label=name, **look)
            right.plot(x, [r.work / s / 1e9 for r, s in found], **look)
        ceilings = [(w, r.ceiling) for w, r in zip(work, timed, strict=True) if r.ceiling]
        if ceilings:
            x, y = zip(*ceilings, strict=True)
            look = {"color": QUIET, "linewidth": 0.9, "linestyle": "--"}
            left.plot(x, [1e3 * w * scale / c / 1e9 for w, c in ceilings], label="ceiling", **look)
            if arithmetic:
                right.axhline(max(y), **look)
            else:
                right.plot(x, y, **look)
            name = CEILING_NAMES.get(timed[0].bound, timed[0].bound)
            right.annotate(
                name, (1, y[-1]), (0, 3), ("axes fraction", "data"), "offset points", ha="right", color=QUIET
            )
        left.set(xscale="log", yscale="log", xlabel=f"work, {unit}", title="ms a call")
        right.set(xscale="log", xlabel=f"work, {unit}", title=f"{'GFLOP/s' if arithmetic else 'GB/s'}", ylim=(0, None))
        for axes in (left, right):
            axes.grid(alpha=0.6)
            axes.minorticks_off()
        left.legend(fontsize=7.5, loc="upper left", labelcolor=INK)
        return _svg(figure, f"{op}, {SHORT.get(dtype, dtype)}: time and throughput")


def _band(
    left: Any, right: Any, timed: Sequence[Result], work: Sequence[float], name: str, colour: str, side: int
) -> None:
    """One provider's line with its 95% intervals."""
    middle, low, high = [], [], []
    for r in timed:
        assert r.pair is not None
        samples = r.pair.theirs if side else r.pair.ours
        middle.append((r.torch_seconds if side else r.seconds) or 0.0)
        bounds = interval(samples)
        low.append(bounds[0])
        high.append(bounds[1])
    left.fill_between(work, [1e3 * t for t in low], [1e3 * t for t in high], color=colour, alpha=0.2, linewidth=0)
    left.plot(work, [1e3 * t for t in middle], ".-", color=colour, linewidth=1.2, label=name)
    rates = [[r.work / t / 1e9 for r, t in zip(timed, times, strict=True)] for times in (middle, high, low)]
    right.fill_between(work, rates[1], rates[2], color=colour, alpha=0.2, linewidth=0)
    right.plot(work, rates[0], ".-", color=colour, linewidth=1.2)


def accuracy_plot(results: Sequence[Result]) -> str:
    """How much faster, over how much further from float64: what is right and fast is at the upper left."""
    shown = [r for r in results if r.pair and r.judged and r.max_error and r.torch_error]
    if not shown:
        return ""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.9), layout="constrained")
        axes = figure.subplots()
        for dtype, colour in zip(SHORT, (OURS, THEIRS, OTHER), strict=True):
            of = [r for r in shown if r.dtype == dtype]
            x = [(r.max_error or 0.0) / (r.torch_error or 1.0) for r in of]
            axes.scatter(x, [r.pair.speedup for r in of if r.pair], s=14, color=colour, alpha=0.75, label=SHORT[dtype])
        axes.axhline(1, color=QUIET, linewidth=0.8)
        axes.axvline(1, color=QUIET, linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="largest error / torch's largest error", title="speedup")
        _plain_ticks(axes)
        axes.grid(alpha=0.6)
        axes.legend(fontsize=8, loc="lower right", labelcolor=INK)
        return _svg(figure, "speedup over error")


def history_plot(points: Sequence[tuple[str, float, float, float]]) -> str:
    """The mean speedup of reports, with its interval: (name, mean, low, high), oldest first."""
    if len(points) < 2:
        return ""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.2), layout="constrained")
        axes = figure.subplots()
        x = list(range(len(points)))
        axes.fill_between(x, [p[2] for p in points], [p[3] for p in points], color=OURS, alpha=0.2, linewidth=0)
        axes.plot(x, [p[1] for p in points], ".-", color=OURS)
        axes.set_xticks(x, [p[0] for p in points], fontsize=8)
        axes.axhline(1, color=QUIET, linewidth=0.8)
        axes.set(title="mean speedup", ylim=(0, None))
        axes.grid(alpha=0.6, axis="y")
        return _svg(figure, "mean speedup of earlier reports")


def _plain_ticks(axes: Any) -> None:
    """1, 2, 5 instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _svg(figure: Any, label: str) -> str:
    """The figure as an element of a page: its own ids where it refers to them, the page's colours, its width."""
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.S)
    used = set(re.findall(r"(?:#|href=\"#)([A-Za-z][\w-]*)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", svg)
    for colour, name in PAGE_COLOURS.items():
        svg = svg.replace(colour, name)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()  # type: ignore[union-attr]
    head = f'<svg role="img" aria-label="{label}" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg"'
    return head + ' xmlns:xlink="http://www.w3.org/1999/xlink">' + svg[svg.index(">") + 1 :]

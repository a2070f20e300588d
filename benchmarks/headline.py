"""The README's table, made from a report: `python -m mmkern.benchmarks.headline REPORT README.md FOLDER`.

The report is kept in FOLDER as well, as JSON lines and Markdown, so that a reader finds what the table says.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mmkern.benchmarks import report, tables, trace
from mmkern.benchmarks.records import Pair, Result
from mmkern.benchmarks.statistics import geometric_mean
from mmkern.benchmarks.trace import Report

BEGIN, END = "<!-- headline: made by `make headline` -->", "<!-- end of headline -->"
QUANTILES = 9  # of each case's rounds, in the report that is kept: odd, so that the median is one


def headline(found: Report, link: str) -> str:
    """A verdict, a row an op with its mean in each dtype, its best and worst case, and what is slower.

    Raises:
        ValueError: a report that says nothing: partial, unstable or not right.
    """
    verdict = report.verdict(found)
    if found.left or not found.complete:
        raise ValueError("the report is partial")
    if verdict.mean is None:
        raise ValueError(f"the report gives no verdict: {verdict.unstable}")
    if verdict.right < verdict.checked:
        raise ValueError("the report has cases that are not right")
    judged = [r for r in found.results if r.judged and r.shape != tables.OVERHEAD and r.pair]
    dtypes = [(name, short) for name, short in tables.SHORT.items() if any(r.dtype == name for r in judged)]
    lines = [
        f"{found.machine['processor']}, {found.machine['threads']} threads, torch {found.machine['torch']}: "
        f"**{report.sentence(verdict)}**",
        "",
        "| op | " + " | ".join(short for _, short in dtypes) + " | best case | worst case | slower |",
        "|---|" + "---:|" * len(dtypes) + "---|---|---:|",
    ]
    for op in dict.fromkeys(r.op for r in judged):
        of = sorted((r for r in judged if r.op == op), key=_ratio)
        means = [_mean([r for r in of if r.dtype == name]) for name, _ in dtypes]
        slower = sum(report.sides(r, found.noise_floor) == "slower" for r in of)
        cells = [op, *means, _named(of[-1]), _named(of[0]), f"{slower} of {len(of)}"]
        lines.append("| " + " | ".join(cells) + " |")
    when = found.started[:10]
    lines += ["", f"Geometric means over the fastest of torch's ways, measured {when}. [The whole report]({link})."]
    return "\n".join(lines)


def _ratio(r: Result) -> float:
    assert r.pair is not None
    return r.pair.speedup


def _mean(results: Sequence[Result]) -> str:
    return f"{geometric_mean(map(_ratio, results)):.2f}x" if results else ""


def _named(r: Result) -> str:
    return f"{_ratio(r):.2f}x {r.shape}, {tables.SHORT.get(r.dtype, r.dtype)}"


def inserted(text: str, table: str) -> str:
    """`text` with what stands between the two marks replaced.

    Raises:
        ValueError: a text without them.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"no place for the table: {BEGIN} and {END}")
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def thinned(found: Report) -> Report:
    """A report with a few quantiles of each side's rounds, the median among them; speedups stay those of all rounds."""

    def few(pair: Pair | None) -> Pair | None:
        if pair is None or len(pair.ours) <= QUANTILES:
            return pair
        at = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
        ours, theirs = (torch.tensor(s, dtype=torch.float64).quantile(at).tolist() for s in (pair.ours, pair.theirs))
        return replace(pair, ours=ours, theirs=theirs)

    results = [replace(r, pair=few(r.pair), one_thread=few(r.one_thread)) for r in found.results]
    return replace(found, results=results)


def main(source: str, readme: str, folder: str) -> None:
    try:
        found = trace.read(Path(source))
        name = re.sub(r"[^a-z0-9]+", "-", f"{found.machine['processor']} {found.started[:10]}".lower()).strip("-")
        kept = Path(folder) / f"{name}.md"
        text = inserted(Path(readme).read_text(encoding="utf-8"), headline(found, kept.as_posix()))
    except ValueError as error:
        sys.exit(f"headline: {error}")
    trace.save(kept.with_suffix(".jsonl"), thinned(found))
    kept.write_text(report.to_markdown(found) + "\n", encoding="utf-8")
    Path(readme).write_text(text, encoding="utf-8")
    print(f"written: {readme}, {kept}, {kept.with_suffix('.jsonl')}")


if __name__ == "__main__":
    main(*sys.argv[1:])

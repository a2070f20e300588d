"""A run as Markdown and as one HTML file."""

from __future__ import annotations

from pathlib import Path

from mmkern.benchmarks.report import to_markdown
from mmkern.benchmarks.trace import Report


def write_pages(folder: Path, report: Report) -> list[Path]:
    """Writes report.md; returns the paths of what was written."""
    path = folder / "report.md"
    path.write_text(to_markdown(report) + "\n", encoding="utf-8")
    return [path]

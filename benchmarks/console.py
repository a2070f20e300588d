"""What the commands show: tables as wide as the screen, a bar on a terminal, a line per case elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from mmkern.benchmarks import report, tables
from mmkern.benchmarks.records import Result
from mmkern.benchmarks.trace import Report
from mmkern.console import plain
from mmkern.console import progress as bar

PIPE_WIDTH = 170  # no terminal: wide enough for every column
BAD = ("WRONG", "ERROR", "REFUSED", "wrong", "error", "refused")


def console() -> Console:
    found = plain()
    return found if found.is_terminal else plain(width=PIPE_WIDTH)


@contextmanager
def progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[Result], None]]]:
    """Two functions to call, before each step with its name and after each case with its result. On a terminal they
    move a bar; elsewhere each result is a line on stderr, so that a log shows where it is."""
    with bar(total) as step:
        yield lambda text: step(0, text), lambda result: step(1, None, line(result))


def line(r: Result) -> str:
    """One result in one line."""
    head = f"{r.op} {r.shape} {tables.SHORT.get(r.dtype, r.dtype)}"
    if r.status != "ok":
        return f"{head}: {r.status}: {r.error}"
    if r.pair is None or r.seconds is None or r.torch_seconds is None:
        return f"{head}: right"
    times = f"{tables.duration(r.seconds)}, torch {tables.duration(r.torch_seconds)}, {tables.speedup(r.pair)}"
    return f"{head}: {times}{'; ' if r.notes else ''}{'; '.join(r.notes)}"


def show(out: Console, table: tables.Table) -> None:
    """One table, as wide as the screen allows; a gap between the rows of different ops. Nothing without rows."""
    if not table.rows:
        return
    table = table.fit(out.width)
    shown = RichTable(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in table.header:
        words = name in table.words
        shown.add_column(name, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    grouped = len({row[0] for row in table.rows}) < len(table.rows)
    for row, after in zip(table.rows, [*table.rows[1:], None], strict=True):
        style = "red" if any(cell in BAD for cell in row) else None
        shown.add_row(*row, style=style, end_section=grouped and after is not None and after[0] != row[0])
    out.print(shown)


def show_report(out: Console, found: Report) -> None:
    """Details first, what matters last, next to the prompt."""
    for table in tables.family_tables(found.results):
        show(out, table)
    if found.model:
        show(out, tables.model_table(found.model))
    elif found.model_missing:
        out.print(f"Real model not run: {found.model_missing}\n")
    for table in (
        tables.summary(found.results),
        tables.lost(found.results),
        tables.not_timed(found.results),
        tables.failures(found.results),
    ):
        if table.rows:
            show(out, table)
    for text in report.machine_lines(found):
        out.print(text)
    if found.ceilings:
        out.print(f"ceilings measured in this run: {report.peaks(found)}")
    out.print(report.sentence(report.verdict(found)), style="bold")

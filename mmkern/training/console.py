"""What the training commands show: the log, tables of metrics, and one line for what the user can mend."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich import box
from rich.logging import RichHandler
from rich.table import Table

from mmkern.console import keep_caches, plain

if TYPE_CHECKING:
    from mmkern.training.evaluation import Row


@contextmanager
def one_line() -> Iterator[None]:
    """What the user can mend is one line and status 2, never a traceback."""
    keep_caches()
    try:
        importlib.import_module("mmkern.training.runs")  # and with it all that the extra brings
        from mmkern.training.files import Refused
    except ImportError as missing:
        raise typer.BadParameter(f"needs {missing.name}, which is not installed: pip install 'mmkern[train]'") from None
    try:
        yield
    except (Refused, ImportError) as error:  # of a process that loads ahead, it is the last line of a traceback
        line = str(error).strip().splitlines()[-1]
        raise typer.BadParameter(line.rpartition(f"{type(error).__name__}: ")[2]) from None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
        raise typer.BadParameter(f"the memory is too small for these sizes: {str(error).splitlines()[0]}") from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise typer.BadParameter(f"{where}{error.strerror or error}") from None


@contextmanager
def logged(quiet: bool) -> Iterator[None]:
    """What training has to say goes to stderr, with the time; quiet: nowhere."""
    console, log = plain(stderr=True), logging.getLogger("mmkern.training")
    handler: logging.Handler = RichHandler(console=console, show_path=False, show_level=False, markup=False)
    if not console.is_terminal:  # a log, which is not broken into lines of 80 columns
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers, log.propagate = [logging.NullHandler() if quiet else handler], False
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.handlers, log.propagate = [], True


def table(title: str, rows: Sequence[Row]) -> Table:
    """Metrics of each group as a row; those of baselines stand indented below their group's."""
    from mmkern.training.evaluation import metric_names

    names = metric_names(rows)
    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)  # 80 columns
    drawn.add_column("task", no_wrap=True)
    for name in names:
        drawn.add_column(name, justify="right", no_wrap=True)
    for group, baseline, values in rows:
        cells = [values.get(name, "") for name in names]
        shown = [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells]
        drawn.add_row(f"  {baseline}" if baseline else group, *shown)
    return drawn

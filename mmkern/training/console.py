"""What the commands show: a bar while they work, tables of metrics, and one line for what the user can mend."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


@contextmanager
def one_line() -> Iterator[None]:
    """What the user can mend is one line and status 2, never a traceback."""
    try:
        from mmkern.training.checkpoints import CheckpointError
        from mmkern.training.config import ConfigError
        from mmkern.training.loop import TrainingError
        from mmkern.training.problem import DataError
    except ImportError as missing:
        raise typer.BadParameter(f"needs {missing.name}, which is not installed: pip install 'mmkern[train]'") from None
    try:
        yield
    except (CheckpointError, ConfigError, ImportError, TrainingError) as error:
        raise typer.BadParameter(str(error)) from None
    except DataError as error:  # in a process that loads ahead, its line is the last of a traceback's
        line = str(error).strip().splitlines()[-1]
        raise typer.BadParameter(line.rpartition("DataError: ")[2]) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise typer.BadParameter(f"{where}{error.strerror or error}") from None


@contextmanager
def progress(total: int, text: str, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """A bar on stderr; call what it yields with how many steps were made, and the text beside the bar."""
    columns = TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn()
    console = Console(stderr=True)
    bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True, disable=quiet)
    handler = RichHandler(console=console, show_path=False, show_level=False, log_time_format="%H:%M:%S", markup=False)
    log = logging.getLogger("mmkern.training")
    log.handlers, log.propagate = ([] if quiet else [handler]), False
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    with bar:
        task = bar.add_task(text, total=total)

        def step(done: int, said: str = "") -> None:
            bar.update(task, advance=done, description=said or text)

        yield step


def table(title: str, found: dict[str, dict[str, Any]]) -> Table:
    """Metrics of each group as a row; "group: baseline" stands indented below its group."""
    names = [n for n in dict.fromkeys(n for v in found.values() for n in v) if n != "confusion"]
    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)  # 80 columns
    drawn.add_column("task", no_wrap=True)
    for name in names:
        drawn.add_column(name, justify="right", no_wrap=True)
    for group, values in found.items():
        cells = [values.get(name, "") for name in names]
        shown = [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells]
        _, of_group, baseline = group.partition(": ")
        drawn.add_row(f"  {baseline}" if of_group else group, *shown)
    return drawn

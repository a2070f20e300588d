"""What the commands show: a bar while they work, tables of metrics, and one line for what the user can mend."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from mmkern.training.evaluation import Row


def plain(**options: Any) -> Console:
    """A console that shows text as it is: names of classes, groups and folders may look like markup or :emoji:."""
    return Console(markup=False, emoji=False, highlight=False, **options)


def keep_caches() -> None:
    """Points torch and matplotlib, before they are imported, to the user's cache folder.

    By themselves they write into /tmp and ~/.config as well. Whoever has set another place keeps it.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "torchinductor"), ("MPLCONFIGDIR", "matplotlib")):
        try:
            (home / name).mkdir(parents=True, exist_ok=True)
        except OSError:  # no home, or a read-only one: they choose a temporary folder
            return
        os.environ.setdefault(variable, str(home / name))


@contextmanager
def one_line() -> Iterator[None]:
    """What the user can mend is one line and status 2, never a traceback."""
    keep_caches()
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
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
        raise typer.BadParameter(f"the memory is too small for these sizes: {str(error).splitlines()[0]}") from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise typer.BadParameter(f"{where}{error.strerror or error}") from None


@contextmanager
def progress(total: int, text: str, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """A bar on stderr; call what it yields with how many steps were made, and the text beside the bar."""
    columns = TextColumn("{task.description:<36}", markup=False), BarColumn(), MofNCompleteColumn()
    console = plain(stderr=True)
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

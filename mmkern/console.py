"""What all commands show: text as it is, a bar on a terminal and lines elsewhere; and where libraries keep caches."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


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
def progress(total: int, text: str = "", *, every: int = 1, done: int = 0) -> Iterator[Callable[..., None]]:
    """Yields step(count, shown, line): `count` more of `total` are done.

    On stderr, a terminal has a bar with the text `shown` beside it. Elsewhere, such as in a log, each time that
    another `every` are done, and at the end, there is a line: how many are done, and `line`.
    """
    console = plain(stderr=True)
    if console.is_terminal:
        columns = TextColumn("{task.description:<52}", markup=False), BarColumn(), MofNCompleteColumn()
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task(text, total=total, completed=done)
            yield lambda count, shown=None, line="": bar.update(task, advance=count, description=shown)
        return
    head = f"{text} " if text else ""

    def step(count: int, shown: str | None = None, line: str = "") -> None:
        nonlocal done
        before, done = done, done + count
        if done // every > before // every or before < done == total:
            print(f"{head}{done}/{total} {line}".rstrip(), file=sys.stderr, flush=True)

    yield step

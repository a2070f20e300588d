"""The command line: those of mmkern.benchmarks.commands and of mmkern.training.commands."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from typing import Any

try:
    import typer

    from mmkern.benchmarks import commands as benchmarks
except ImportError as missing:
    sys.exit(f"mmkern: the command line needs {missing.name}, which is not installed: pip install 'mmkern[bench]'")

from mmkern.training import commands

app = typer.Typer(
    help="Fused attention, softmax and positional encoding: what runs here, whether it is right, how fast it is.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
benchmarks.register(app)
commands.register(app)


def main(arguments: Iterable[str] | None = None) -> None:
    """Entry point: a wrong option is one line on stderr and status 2, never a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a name may have letters that this one lacks
    try:
        status: Any = app(
            args=None if arguments is None else list(arguments), prog_name="mmkern", standalone_mode=False
        )
    except Exception as error:
        # typer carries its own copy of click in newer versions: the class has no stable import path
        if not hasattr(error, "format_message"):
            raise
        print(f"mmkern: {' '.join(error.format_message().split()).removeprefix('Invalid value: ')}", file=sys.stderr)
        sys.exit(2)
    sys.exit(status or 0)


if __name__ == "__main__":
    main()

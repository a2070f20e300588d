"""The command line: `mmkern info | explain | verify | bench`, and those of mmkern.training.commands."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table as RichTable
except ImportError as missing:
    sys.exit(f"mmkern: the command line needs {missing.name}, which is not installed: pip install 'mmkern[bench]'")

import torch

import mmkern
from mmkern.benchmarks import machine, model, report, suite
from mmkern.benchmarks.measure import DTYPES, Case, Result, measure
from mmkern.training import commands
from mmkern.training.console import plain

BUDGET = {"quick": 0.15, "default": 0.15, "full": 2.0}  # seconds of timing per case
MODEL_BUDGET = {"quick": 8.0, "default": 16.0, "full": 60.0}
PIPE_WIDTH = 170  # no terminal: wide enough for every column

app = typer.Typer(
    help="Fused attention, softmax and positional encoding: what runs here, whether it is right, how fast it is.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
commands.register(app)
Ops = Annotated[str, typer.Option(help="Ops or families, comma-separated: attention, softmax, rotary, ... [all]")]
Dtypes = Annotated[str, typer.Option("--dtype", help="Data types, comma-separated: f32, bf16, f16 [all]")]
Quick = Annotated[bool, typer.Option("--quick", help="The smaller cases, timed briefly.")]
Device = Annotated[str, typer.Option(help="Where to run: cpu or cuda.")]
Full = Annotated[bool, typer.Option("--full", help="All cases, the longest sequences too, timed longer.")]


def _console() -> Console:
    console = plain()
    return console if console.is_terminal else plain(width=PIPE_WIDTH)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _select(ops: str, dtypes: str, quick: bool, full: bool, device: str = "cpu") -> tuple[list[Case], str]:
    if device != "cpu" and not re.fullmatch(r"cuda(:\d+)?", device):
        raise typer.BadParameter(f"--device: expected cpu or cuda, got {device!r}")
    if device != "cpu" and not torch.cuda.is_available():
        raise typer.BadParameter(f"--device {device}: torch {torch.__version__} finds no GPU here")
    if quick and full:
        raise typer.BadParameter("--quick and --full exclude each other")
    level = "quick" if quick else "full" if full else "default"
    short = {s: name for name, s in report.SHORT.items()}
    try:
        cases = suite.select(_names(ops), [short.get(d, d) for d in _names(dtypes)], level, device)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not cases:
        raise typer.BadParameter(f"no {level} case has --ops {ops} and --dtype {dtypes}; try --full")
    return cases, level


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; call what it yields before each step."""
    columns = TextColumn("{task.description:<52}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=plain(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        done = -1

        def step(text: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, description=text, completed=done)

        yield step


def _print(console: Console, table: report.Table) -> None:
    """One table, as wide as the screen allows; a gap between the rows of different ops."""
    table = table.fit(console.width)
    shown = RichTable(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in table.header:
        words = name in table.words
        shown.add_column(name, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    grouped = len({row[0] for row in table.rows}) < len(table.rows)
    for row, after in zip(table.rows, [*table.rows[1:], None], strict=True):
        style = "red" if any(cell in ("WRONG", "ERROR", "wrong", "error") for cell in row) else None
        shown.add_row(*row, style=style, end_section=grouped and after is not None and after[0] != row[0])
    console.print(shown)


@app.command()
def bench(
    ops: Ops = "",
    dtype: Dtypes = "",
    quick: Quick = False,
    full: Full = False,
    device: Device = "cpu",
    output: Annotated[Path, typer.Option(help="Folder for report.json and report.md.")] = Path(),
    no_model: Annotated[bool, typer.Option("--no-model", help="Leave out the pretrained MiniLM.")] = False,
) -> None:
    """Check and time every op against torch's best on this machine; print tables, write report.json and report.md."""
    cases, level = _select(ops, dtype, quick, full, device)
    if output.exists() and not output.is_dir():
        raise typer.BadParameter(f"--output {output} is a file, not a folder")
    console, start = _console(), time.perf_counter()
    found = report.Report(
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        options={"ops": ops, "dtype": dtype, "level": level, "device": device, "model": not no_model},
        machine=machine.facts(device),
    )
    ceilings = machine.Ceilings(device=device)
    with_model = not no_model and not ops and not dtype and device == "cpu"
    found.model_missing = model.missing() if with_model else "left out"
    with _progress(len(cases) + 2 * (not found.model_missing)) as step:
        for case in cases:
            step(f"{case.op} {case.shape} {case.dtype_name}")
            found.results.append(measure(case, BUDGET[level], device, ceilings))
        if not found.model_missing:
            found.model = model.measure_model(MODEL_BUDGET[level], step)
    found.ceilings = ceilings.measured
    found.seconds = time.perf_counter() - start
    paths = found.write(output)
    _show(console, found)
    console.print(f"{found.seconds:.0f} s; written: {paths[0]}, {paths[1]}")
    if report.failures(found.results).rows:
        raise typer.Exit(1)


def _show(console: Console, found: report.Report) -> None:
    """Details first, what matters last, next to the prompt."""
    for table in report.family_tables(found.results):
        _print(console, table)
    if found.model:
        _print(console, report.model_table(found.model))
    elif found.options["model"] and found.model_missing != "left out":
        console.print(f"Real model not run: {found.model_missing}\n")
    for table in (report.summary(found.results), report.lost(found.results), report.failures(found.results)):
        if table.rows:
            _print(console, table)
    for line in report.machine_lines(found):
        console.print(line)
    if found.ceilings:
        console.print(f"ceilings measured in this run: {report.peaks(found)}")


@app.command()
def verify(ops: Ops = "", dtype: Dtypes = "", quick: Quick = False, full: Full = False, device: Device = "cpu") -> None:
    """Hold every case against float64, without timing; exit status 1 if one is wrong."""
    cases, _ = _select(ops, dtype, quick, full, device)
    console, results = _console(), list[Result]()
    with _progress(len(cases)) as step:
        for case in cases:
            step(f"{case.op} {case.shape} {case.dtype_name}")
            results.append(measure(case, device=device, timed=False))
    bad = report.failures(results)
    header = ("op", "dtype", "cases", "right", "largest error / torch's", "backend")
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.op, report.SHORT[result.dtype]), []).append(result)
    rows = [(*key, str(len(group)), *_verdict(group)) for key, group in groups.items()]
    _print(console, report.Table("verify", header, rows, ("op", "dtype", "backend")))
    if bad.rows:
        _print(console, bad)
        raise typer.Exit(1)
    console.print(f"all {len(results)} cases are right")


def _verdict(group: Sequence[Result]) -> tuple[str, str, str]:
    right = sum(r.status == "ok" for r in group)
    ratios = [r.max_error / r.torch_error for r in group if r.max_error is not None and r.torch_error]
    ran = dict.fromkeys(line.split(": ", 1)[1] for r in group for line in r.ran)
    return str(right), f"{max(ratios):.2f}" if ratios else "", ", ".join(ran)


@app.command()
def info() -> None:
    """Versions, processor, instruction sets, build, and the machine's measured ceilings."""
    console, facts, ceilings = _console(), machine.facts(), machine.Ceilings(seconds=0.5)
    peaks = {
        "multiply-add": (ceilings.of("fma"), "GFLOP/s"),
        "bf16 dot product": (ceilings.of("bf16_dot"), "GFLOP/s"),
        "copy, 64 MiB": (ceilings.of("copy", 1 << 26), "GB/s"),
        "read, 64 MiB": (ceilings.of("read", 1 << 26), "GB/s"),
    }
    facts["load"] = f"{facts['load']:.1f}"
    facts["isas"] = " ".join(facts["isas"])
    facts["commit"] = facts["commit"] or "not a checkout"
    facts["isa"] = facts["isa"] or "none: mmkern._C is not built, the reference formulas run"
    rows = [(name, str(value)) for name, value in facts.items() if value]
    rows += [(name, f"{value:.0f} {unit}") for name, (value, unit) in peaks.items() if value]
    _print(console, report.Table(f"mmkern {mmkern.__version__}", ("", "value"), rows, ("", "value")))


@app.command()
def explain(
    ops: Annotated[str, typer.Argument(help="Ops or families, comma-separated [all].")] = "",
    dtype: Annotated[str, typer.Option(help="Data types, comma-separated; float64 too [all].")] = "",
) -> None:
    """Which backend runs each op for each dtype on this machine, and why no other does."""
    wanted = [{**{s: n for n, s in report.SHORT.items()}, "f64": "float64"}.get(d, d) for d in _names(dtype)]
    every = {**DTYPES, "float64": torch.float64}
    if unknown := [d for d in wanted if d not in every]:
        raise typer.BadParameter(f"no such dtype: {unknown[0]!r}; choose from {', '.join(every)}")
    cases, _ = _select(ops, "", quick=False, full=False)
    smallest = {c.op: c for c in sorted(cases, key=lambda c: c.flops, reverse=True)}
    rows, reasons = [], dict[tuple[str, str], list[str]]()
    for op in dict.fromkeys(c.op for c in cases):
        cells = []
        for name in wanted or every:
            ran = mmkern.explain(smallest[op].build(every[name], "cpu").ours)
            cells.append(", ".join(f"{c.backend} {c.detail}".strip() for c in ran))
            for backend, why in (refusal for choice in ran for refusal in choice.refused.items()):
                reasons.setdefault((backend, why), []).append(f"{op} {name}")
        rows.append((op, *cells))
    console, header = _console(), ("op", *(wanted or every))
    _print(console, report.Table("runs on", header, rows, header))
    whys = [
        (backend, why, "all of them" if len(calls) == len(rows) * (len(header) - 1) else ", ".join(calls))
        for (backend, why), calls in reasons.items()
    ]
    header = ("not on", "because", "calls")
    _print(console, report.Table("why not elsewhere", header, whys, header))


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

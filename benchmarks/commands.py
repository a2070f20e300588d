"""The commands `mmkern info | explain | verify | bench | report | compare`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import mmkern
from mmkern.benchmarks import console, machine, model, suite, tables, trace
from mmkern.benchmarks.comparing import Change, changes_table, compare_reports
from mmkern.benchmarks.explaining import explain_tables
from mmkern.benchmarks.page import write_pages
from mmkern.benchmarks.records import DTYPES, Case, Result
from mmkern.benchmarks.rivals import chosen, states
from mmkern.benchmarks.run import PLANS, Run, estimate
from mmkern.benchmarks.shapes import read_shapes
from mmkern.benchmarks.trace import Report, Writer
from mmkern.benchmarks.worker import Here, Worker
from mmkern.console import keep_caches

FOLDER = Path("mmkern-report")
Ops = Annotated[str, typer.Option(help="Ops or families, comma-separated: attention, softmax, rotary, ... [all]")]
Dtypes = Annotated[str, typer.Option("--dtype", help="Data types, comma-separated: f32, bf16, f16 [all]")]
Quick = Annotated[bool, typer.Option("--quick", help="The smaller cases, timed briefly: less than a minute.")]
Device = Annotated[str, typer.Option(help="Where to run: cpu or cuda.")]
Full = Annotated[bool, typer.Option("--full", help="All cases, the longest sequences too, timed longer.")]
Shapes = Annotated[Path | None, typer.Option(help="TOML file with shapes of your own, instead of the named ones.")]

Shape = Annotated[str, typer.Option(help="Only shapes whose name has this in it.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    for command in (info, explain, verify, bench, page, compare):
        app.command("report" if command is page else None)(command)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _select(
    ops: str,
    dtypes: str,
    quick: bool,
    full: bool,
    device: str = "cpu",
    shapes: Path | None = None,
    shape: str = "",
) -> tuple[list[Case], str]:
    if device != "cpu" and not re.fullmatch(r"cuda(:\d+)?", device):
        raise typer.BadParameter(f"--device: expected cpu or cuda, got {device!r}")
    if device != "cpu" and not torch.cuda.is_available():
        raise typer.BadParameter(f"--device {device}: torch {torch.__version__} finds no GPU here")
    if quick and full:
        raise typer.BadParameter("--quick and --full exclude each other")
    level = "quick" if quick else "full" if full else "default"
    short = {s: name for name, s in tables.SHORT.items()}
    wanted = [short.get(d, d) for d in _names(dtypes)]
    try:
        cases = read_shapes(shapes) if shapes else suite.select(_names(ops), wanted, level, device)
        if shapes:
            cases = suite.among(cases, _names(ops), wanted)
        _fits(cases, device)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    cases = [case for case in cases if shape.lower() in case.shape.lower()]
    if not cases:
        given = {"--ops": ops, "--dtype": dtypes, "--shape": shape}
        wanted = " and ".join(f"{name} {value!r}" for name, value in given.items() if value)
        raise typer.BadParameter(f"no {level} case has {wanted}; try --full")
    return cases, level


def _fits(cases: Sequence[Case], device: str) -> None:
    """Raises ValueError for a case whose inputs and outputs, a float64 sample and a copy do not fit in memory."""
    free = machine.available_bytes()
    for case in cases if free and device == "cpu" else ():
        if 3 * case.bytes > free:
            raise ValueError(
                f"{case.op} {case.shape} {case.dtype_name} needs {tables.memory(3 * int(case.bytes))}; "
                f"{tables.memory(free)} of memory are free"
            )


def bench(
    ops: Ops = "",
    dtype: Dtypes = "",
    quick: Quick = False,
    full: Full = False,
    device: Device = "cpu",
    shapes: Shapes = None,
    shape: Shape = "",
    output: Annotated[Path, typer.Option(help="Folder for report.jsonl, report.md and report.html.")] = FOLDER,
    no_model: Annotated[bool, typer.Option("--no-model", help="Leave out the pretrained MiniLM.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the folder's partial run.")] = False,
    against: Annotated[Path | None, typer.Option("--compare", help="An earlier report.jsonl to compare with.")] = None,
    fail: Annotated[bool, typer.Option("--fail", help="With --compare: exit status 1 if something is slower.")] = False,
    rivals: Annotated[str, typer.Option(help="Further rivals, comma-separated: torch.compile, onnxruntime, ...")] = "",
    processes: Annotated[int, typer.Option(min=1, help="Measure each case in so many fresh processes.")] = 1,
    in_process: Annotated[bool, typer.Option("--in-process", help="For profilers: measure in this process.")] = False,
) -> None:
    """Check and time every op against torch's best on this machine; print tables and write a page."""
    keep_caches()
    cases, level = _select(ops, dtype, quick, full, device, shapes, shape)
    if output.exists() and not output.is_dir():
        raise typer.BadParameter(f"--output {output} is a file, not a folder")
    if fail and not against:
        raise typer.BadParameter("--fail needs --compare")
    try:
        more = chosen(_names(rivals), device)
        earlier = trace.read(against) if against else None
        if earlier and (other := trace.different_machine(earlier, Report("", {}, machine.facts(device)))):
            raise ValueError(f"--compare: reports of different machines cannot be compared: {other}")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with_model = not (no_model or ops or dtype or shapes or shape or quick) and device == "cpu"
    options = {"ops": ops, "dtype": dtype, "level": level, "device": device, "model": with_model}
    options |= {"shapes": str(shapes) if shapes else "", "shape": shape, "rivals": list(more), "processes": processes}
    writer, cases = _writer(output / trace.NAME, options, cases, device, resume)
    out, plan = console.console(), PLANS[level]
    if more:  # they compile for seconds a case
        plan = replace(plan, case=max(plan.case, 60.0), total=3600.0)
    if level == "full":
        reach = machine.Ceilings(seconds=0.05, device=device).of("fma") or 10.0
        seconds = estimate(cases, plan, reach)
        out.print(f"{len(cases)} cases: about {seconds / 60:.0f} min, {(plan.total + plan.model) / 60:.0f} at most")
    worker = Here(device, more) if in_process else Worker(device, more)
    missing = model.missing() if with_model else ""
    with console.progress(len(cases)) as (step, say):
        run = Run(writer, worker, plan, say, step)
        found = run.cases(cases, processes, with_model and not missing, missing)
    paths = write_pages(output, found)
    console.show_report(out, found)
    if earlier:
        changed = _changes(earlier, found)
        _show_changes(out, changed)
    if run.interrupted:
        out.print(f"interrupted after {len(found.results)} of {len(found.planned)} cases: `--resume` goes on")
    out.print(f"{found.seconds:.0f} s; written: {', '.join(map(str, (output / trace.NAME, *paths)))}")
    if run.interrupted:
        raise typer.Exit(130)
    if tables.failures(found.results).rows or (earlier and fail and any(c.slower for c in changed)):
        raise typer.Exit(1)


def _writer(
    path: Path, options: dict[str, Any], cases: list[Case], device: str, resume: bool
) -> tuple[Writer, list[Case]]:
    """Where results go, and the cases that are still to be measured. An earlier run is kept in the folder's history."""
    facts = machine.facts(device) | {"rivals": states(options["rivals"])}
    ids = [case.id for case in cases]
    if resume:
        try:
            before = trace.read(path)
        except ValueError as error:
            raise typer.BadParameter(f"--resume: {error}") from None
        if before.options != options or before.planned != ids:
            raise typer.BadParameter(f"--resume: {path} was begun with other options: {before.options}")
        here = Report("", {}, facts)
        if other := trace.different_machine(before, here) or trace.different_build(before, here):
            raise typer.BadParameter(f"--resume: {path} is of another machine or build: {other}")
        left = set(before.left)
        if not left:
            raise typer.BadParameter(f"--resume: {path} is complete")
        return Writer(path, before, resumed=True), [case for case in cases if case.id in left]
    trace.archive(path)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return Writer(path, Report(started, options, facts, ids)), cases


def _show_changes(out: Console, changed: Sequence[Change]) -> None:
    console.show(out, changes_table(changed))
    slower, faster = sum(c.slower for c in changed), sum(c.faster for c in changed)
    out.print(f"{len(changed)} cases compared: {slower} slower, {faster} faster")


def _changes(earlier: Report, found: Report) -> list[Change]:
    try:
        return compare_reports(earlier, found)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def page(
    folder: Annotated[Path, typer.Argument(help="Folder with a report.jsonl.")] = FOLDER,
) -> None:
    """Write report.md and report.html again from a folder's report.jsonl."""
    keep_caches()
    try:
        paths = write_pages(folder, trace.read(folder))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    console.console().print(f"written: {', '.join(map(str, paths))}")


def compare(
    old: Annotated[Path, typer.Argument(help="The earlier report.jsonl or its folder.")],
    new: Annotated[Path, typer.Argument(help="The later one.")] = FOLDER,
    fail: Annotated[bool, typer.Option("--fail", help="Exit status 1 if something is significantly slower.")] = False,
) -> None:
    """Which cases changed between two reports of one machine."""
    try:
        reports = trace.read(old), trace.read(new)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    changed = _changes(*reports)
    _show_changes(console.console(), changed)
    if fail and any(c.slower for c in changed):
        raise typer.Exit(1)


def verify(
    ops: Ops = "",
    dtype: Dtypes = "",
    quick: Quick = False,
    full: Full = False,
    device: Device = "cpu",
    shapes: Shapes = None,
    shape: Shape = "",
) -> None:
    """Hold every case against float64, without timing; exit status 1 if one is wrong."""
    cases, _ = _select(ops, dtype, quick, full, device, shapes, shape)
    out, results, here = console.console(), list[Result](), Here(device)
    with console.progress(len(cases)) as (step, say):
        for case in cases:
            step(f"{case.op} {case.shape} {case.dtype_name}")
            results.append(here.ask("check", case, seconds=0.0))
            say(results[-1])
    bad = tables.failures(results)
    console.show(out, tables.verify_table(results, by_shape=shapes is not None))
    if bad.rows:
        console.show(out, bad)
        raise typer.Exit(1)
    out.print(f"all {len(results)} cases are right")


def info() -> None:
    """Versions, processor, instruction sets, build, and the machine's measured ceilings."""
    out, facts, ceilings = console.console(), machine.facts(), machine.Ceilings(seconds=0.5)
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
    console.show(out, tables.Table(f"mmkern {mmkern.__version__}", ("", "value"), rows, ("", "value")))


def explain(
    ops: Annotated[str, typer.Argument(help="Ops or families, comma-separated [all].")] = "",
    dtype: Annotated[str, typer.Option(help="Data types, comma-separated; float64 too [all].")] = "",
    shapes: Shapes = None,
) -> None:
    """Which backend runs each op for each dtype on this machine, and why no other does."""
    wanted = [{**{s: n for n, s in tables.SHORT.items()}, "f64": "float64"}.get(d, d) for d in _names(dtype)]
    every = {**DTYPES, "float64": torch.float64}
    if unknown := [d for d in wanted if d not in every]:
        raise typer.BadParameter(f"no such dtype: {unknown[0]!r}; choose from {', '.join(every)}")
    cases, _ = _select(ops, "", quick=False, full=False, shapes=shapes)
    out = console.console()
    for table in explain_tables(cases, {name: every[name] for name in wanted or every}):
        console.show(out, table)

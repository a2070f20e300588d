"""A run as it is kept, in JSON lines: the run, each machine it ran on, each measurement, the end.

Lines are written as soon as they are known. A run that was killed has no last line, perhaps half of one, and all
that it measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mmkern.benchmarks.records import Pair, Result

SCHEMA = "mmkern.bench/2"
NAME = "report.jsonl"
HISTORY = "history"
# facts that have to agree for two runs to be of one machine and one build of torch
SAME_MACHINE = ("processor", "cores", "threads", "gpu")
DIGITS = 5  # of a sample: a clock read is not better


@dataclass
class Report:
    """Everything one run found."""

    started: str
    options: dict[str, Any]
    machine: dict[str, Any]
    planned: list[str] = field(default_factory=list)  # ids of the cases that the run was to measure
    results: list[Result] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)
    ceilings_moved: float = 0.0  # by which share the worst ceiling differed at the end
    noise: list[dict[str, Any]] = field(default_factory=list)  # before the cases and after them
    model: list[dict[str, Any]] = field(default_factory=list)
    model_missing: str = ""
    seconds: float = 0.0
    complete: bool = False

    @property
    def left(self) -> list[str]:
        done = {r.id for r in self.results}
        return [case for case in self.planned if case not in done]

    def sort(self) -> None:
        """Puts the results, which are measured the most telling ones first, into the order of the plan."""
        place = {case: i for i, case in enumerate(self.planned)}
        self.results.sort(key=lambda r: place.get(r.id, len(place)))

    @property
    def noise_floor(self) -> float:
        return max((n["floor"] for n in self.noise), default=0.0)


class Writer:
    """Appends to a run's file; `report` is what was written so far."""

    def __init__(self, path: Path, report: Report, resumed: bool = False) -> None:
        self.path, self.report = path, report
        path.parent.mkdir(parents=True, exist_ok=True)
        if resumed:
            _drop_half_a_line(path)
        else:
            path.write_text("", encoding="utf-8")
            self._line("run", started=report.started, options=report.options, cases=report.planned)
        self.environment = hashlib.sha256(json.dumps(report.machine, sort_keys=True).encode()).hexdigest()[:8]
        self._line("environment", id=self.environment, machine=report.machine)

    def measurement(self, result: Result) -> None:
        self.report.results.append(result)
        self._line("measurement", environment=self.environment, **_rounded(asdict(result)))

    def noise(self, found: dict[str, Any]) -> None:
        self.report.noise.append(found)
        self._line("noise", environment=self.environment, **found)

    def model(self, found: list[dict[str, Any]], missing: str) -> None:
        self.report.model, self.report.model_missing = found, missing
        self._line("model", environment=self.environment, found=found, missing=missing)

    def end(self, seconds: float, complete: bool, ceilings: dict[str, float], moved: float = 0.0) -> None:
        report = self.report
        report.seconds += seconds
        report.complete, report.ceilings, report.ceilings_moved = complete, ceilings, moved
        self._line("end", seconds=report.seconds, complete=complete, ceilings=ceilings, ceilings_moved=moved)

    def _line(self, kind: str, **values: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"schema": SCHEMA, "kind": kind, **values}) + "\n")


def save(path: Path, report: Report) -> None:
    """Writes a whole report at once."""
    empty = replace(report, results=[], noise=[], model=[], seconds=0.0)
    writer = Writer(path, empty)
    for found in report.noise:
        writer.noise(found)
    for result in report.results:
        writer.measurement(result)
    writer.model(report.model, report.model_missing)
    writer.end(report.seconds, report.complete, report.ceilings, report.ceilings_moved)


def read(path: Path) -> Report:
    """The run kept in a file, or in a folder's report.jsonl.

    Raises:
        ValueError: not such a file, or of another version: what it is, in one line.
    """
    path = path / NAME if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or 'not text'}") from None
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            parsed.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines) or number == 1:
                whole = _schema_of("\n".join(lines))
                problem = f"schema {whole!r}, this version reads {SCHEMA!r}" if whole else f"line {number} is not JSON"
                raise ValueError(f"{path}: {problem}") from None
    if not parsed:
        raise ValueError(f"{path}: empty")
    for number, line in enumerate(parsed, 1):
        schema = line.get("schema") if isinstance(line, dict) else None
        if schema != SCHEMA:
            raise ValueError(f"{path}: line {number}: schema {schema!r}, this version reads {SCHEMA!r}")
    try:
        return _assembled(parsed)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a report: {type(error).__name__}: {error}") from None


def _schema_of(text: str) -> str | None:
    """What the first version wrote: one JSON document over many lines."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError:
        return None
    return document.get("schema") if isinstance(document, dict) else None


def _assembled(lines: Sequence[dict[str, Any]]) -> Report:
    first = lines[0]
    if first["kind"] != "run":
        raise ValueError(f"begins with a line of kind {first['kind']!r}")
    report = Report(first["started"], first["options"], {}, first["cases"])
    for line in lines[1:]:
        values = {k: v for k, v in line.items() if k not in ("schema", "kind", "environment")}
        match line["kind"]:
            case "environment":
                report.machine = report.machine or values["machine"]
            case "measurement":
                report.results.append(_result(values))
            case "noise":
                report.noise.append(values)
            case "model":
                report.model, report.model_missing = values["found"], values["missing"]
            case "end":
                report.seconds, report.complete = values["seconds"], values["complete"]
                report.ceilings, report.ceilings_moved = values["ceilings"], values["ceilings_moved"]
    if not report.machine:
        raise ValueError("no environment")
    report.sort()
    return report


def _result(values: dict[str, Any]) -> Result:
    for name in ("pair", "one_thread"):
        if values[name]:
            values[name] = Pair(**{**values[name], "busy": tuple(values[name]["busy"])})
    return Result(**{**values, "cold": tuple(values["cold"]) if values["cold"] else None})


def _rounded(values: Any) -> Any:
    if isinstance(values, float):
        return float(f"{values:.{DIGITS}g}")
    if isinstance(values, dict):
        return {k: _rounded(v) for k, v in values.items()}
    return [_rounded(v) for v in values] if isinstance(values, (list, tuple)) else values


def _drop_half_a_line(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")


def different_machine(a: Report, b: Report) -> str:
    """Why two reports' times cannot be compared; empty if they can."""
    for name in SAME_MACHINE:
        if a.machine.get(name) != b.machine.get(name):
            return f"{name} {a.machine.get(name)} and {b.machine.get(name)}"
    return ""


def different_build(a: Report, b: Report) -> str:
    """Why a run cannot go on where another stopped; empty if it can."""
    for name in ("mmkern", "commit", "isa", "torch", "python"):
        if a.machine.get(name) != b.machine.get(name):
            return f"{name} {a.machine.get(name)} and {b.machine.get(name)}"
    return ""


def archive(path: Path) -> None:
    """Moves an earlier run's file into the history beside it, named after its start."""
    if path.exists():
        history = path.parent / HISTORY
        history.mkdir(exist_ok=True)
        try:
            name = read(path).started.replace(":", "").replace("+0000", "Z")
        except ValueError:
            name = f"unreadable-{int(path.stat().st_mtime)}"
        path.rename(history / f"{name}.jsonl")


def earlier(path: Path) -> list[Report]:
    """The runs in the history beside a report, oldest first; those that cannot be read are left out."""
    found = []
    for file in sorted((path.parent / HISTORY).glob("*.jsonl")):
        try:
            found.append(read(file))
        except ValueError:
            continue
    return found

"""One run: which case gets how much time, and what is kept when one does not end or somebody presses Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmkern.benchmarks import model
from mmkern.benchmarks.measure import compare
from mmkern.benchmarks.records import Case, Result
from mmkern.benchmarks.trace import Report, Writer
from mmkern.benchmarks.worker import Died, Here, Late, Worker

MODEL = 40.0  # seconds that the pretrained model may take, its loading included
NOISE = 8.0
PATIENCE, GRACE = 4.0, 2.0
LEAST = 0.2  # seconds left below which no further case is begun


@dataclass(frozen=True)
class Plan:
    """Seconds of timing a case, the most that a case may take in all, and the most that all cases together may."""

    timing: float
    case: float
    total: float
    model: float = 0.0

    def allowance(self, left: float, cases: int) -> float:
        """A share of what is left, up to three times the even one: most cases need less."""
        return min(self.case, min(3.0, (cases + 1) / 2) * left / cases)


# A default run ends within 4 minutes and a quick one within one: start, noise, model and pages take the rest.
PLANS = {
    "quick": Plan(0.12, 3.0, 42.0),
    "default": Plan(0.25, 6.0, 165.0, model=12.0),
    "full": Plan(2.0, 60.0, 3600.0, model=60.0),
}


def estimate(cases: Sequence[Case], plan: Plan, reach: float) -> float:
    """Seconds that a run takes if torch reaches a tenth of `reach` GFLOP/s and 1 GB/s, 20 calls a case."""
    calls = sum(max(case.flops / (reach * 1e8), case.bytes / 1e9) for case in cases)
    return min(plan.total, sum(plan.timing + 0.5 for _ in cases) + 20 * calls) + plan.model


class Run:
    """Measures cases one by one and writes each down; `interrupted` after Ctrl-C."""

    def __init__(
        self,
        writer: Writer,
        worker: Worker | Here,
        plan: Plan,
        say: Callable[[Result], None] = lambda result: None,
        step: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.writer, self.worker, self.plan, self.say, self.step = writer, worker, plan, say, step
        self.interrupted = False

    def cases(
        self, cases: Sequence[Case], processes: int = 1, with_model: bool = False, model_missing: str = ""
    ) -> Report:
        start = time.perf_counter()
        ceilings: dict[str, float] = {}
        moved = 0.0
        try:
            self._noise()
            began = time.perf_counter()
            # Where time runs out, every op has had its most telling cases.
            for i, case in enumerate(sorted(cases, key=lambda case: case.level != "quick")):
                left = began + self.plan.total - time.perf_counter()
                self.step(f"{case.op} {case.shape} {case.dtype_name}")
                result = self.one(case, left, len(cases) - i, processes)
                self.writer.measurement(result)
                self.say(result)
            if with_model:
                found, model_missing = self._model()
            else:
                found = []
            self.writer.model(found, model_missing)
            self._noise()
            moved, ceilings = self.worker.ask("end", seconds=NOISE)
        except KeyboardInterrupt:
            self.interrupted = True
        except (Late, Died, RuntimeError) as error:  # of what is measured beside the cases
            self.writer.report.model_missing = self.writer.report.model_missing or str(error)
        finally:
            self.worker.close()
        self.writer.report.sort()
        self.writer.end(time.perf_counter() - start, not self.interrupted, ceilings, moved)
        return self.writer.report

    def one(self, case: Case, left: float, cases: int, processes: int = 1) -> Result:
        """One case, in as many processes of its own as asked for."""
        if left < LEAST:
            return replace(
                Result.of(case), status="over budget", error="no time was left for it: --full or fewer --ops"
            )
        allowance = self.plan.allowance(left, cases)
        results = [self._once(case, allowance / processes, left)]
        for _ in range(processes - 1):
            self.worker.close()
            results.append(self._once(case, allowance / processes, left))
        return merged(results)

    def _once(self, case: Case, allowance: float, left: float) -> Result:
        known = Result.of(case)

        def tell(result: Result) -> None:
            nonlocal known
            known = result

        try:
            # A call that began in time may end, where there is time: stopping it costs the start of another process.
            seconds = min(max(3 * allowance, allowance + PATIENCE), left + GRACE)
            return self.worker.ask("case", case, self.plan.timing, allowance, seconds=seconds, tell=tell)
        except Late as late:
            once = f"one call of ours takes {known.pair.ours[0]:.2g} s, torch's" if known.pair else "its first calls"
            return replace(
                known, pair=None, status="over budget", error=f"{once} {late}; try --full", seconds_spent=seconds
            )
        except (Died, RuntimeError) as error:
            return replace(known, pair=None, status="error", error=str(error))

    def _noise(self) -> None:
        self.step("noise: calls against themselves")
        self.writer.noise(self.worker.ask("noise", seconds=NOISE))

    def _model(self) -> tuple[list[dict[str, Any]], str]:
        if missing := model.missing():
            return [], missing
        try:
            return self.worker.ask(
                "model", self.plan.model, seconds=max(MODEL, 3 * self.plan.model), tell=self.step
            ), ""
        except (Late, Died, RuntimeError) as error:
            return [], f"MiniLM: {error}"


def merged(results: Sequence[Result]) -> Result:
    """The same case from several processes: all their rounds; the first one that failed if one did."""
    if len(results) == 1:
        return results[0]
    failed = [r for r in results if r.pair is None]
    if failed:
        return failed[0]
    pairs = [r.pair for r in results if r.pair]
    shares = [sum(p.busy[side] for p in pairs) / len(pairs) for side in (0, 1)]
    pair = compare([t for p in pairs for t in p.ours], [t for p in pairs for t in p.theirs], (shares[0], shares[1]))
    notes = list(dict.fromkeys(note for r in results for note in r.notes))
    against = {r.against for r in results}
    if len(against) > 1:
        notes.append(f"the fastest of torch's ways differs between processes: {', '.join(sorted(against))}")
    return replace(results[0], pair=pair, notes=notes, seconds_spent=sum(r.seconds_spent for r in results))

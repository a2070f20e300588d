"""A run: what it allows each case, what it keeps of one that does not end or breaks, and how it goes on."""

from dataclasses import replace
from functools import partial

import pytest
from benchmark_cases import broken, softmax_case

from mmkern.benchmarks import run, trace
from mmkern.benchmarks.records import Result
from mmkern.benchmarks.run import PLANS, Plan, Run
from mmkern.benchmarks.worker import Here, Late, Worker


class Answers:
    """A worker that answers at once: each case with the next of `given`, an exception by raising it."""

    def __init__(self, given):
        self.given, self.asked, self.closed = iter(given), [], 0

    def ask(self, what, *arguments, seconds, tell=lambda said: None):
        self.asked.append((what, seconds))
        if what != "case":
            return {"noise": {"floor": 0.01, "busy": 1.0}, "end": (0.0, {"fma": 1.0}), "model": []}[what]
        found = next(self.given)
        if isinstance(found, BaseException):
            tell(replace(Result.of(arguments[0]), max_error=1e-7))
            raise found
        return replace(Result.of(arguments[0]), max_error=1e-7)

    def close(self):
        self.closed += 1


def a_run(tmp_path, given, cases, plan=PLANS["quick"]):
    report = trace.Report("now", {}, {"processor": "one"}, [c.id for c in cases])
    said = []
    answers = Answers(given)
    one = Run(trace.Writer(tmp_path / trace.NAME, report), answers, plan, said.append)
    return one, answers, said


CASES = [softmax_case(shape=name) for name in ("one", "two", "three")]


def test_all_cases_together_keep_the_budget_however_long_each_takes():
    """Each case takes all it may, and yet the last one gets a share."""
    for plan, cases in ((PLANS["default"], 202), (PLANS["quick"], 93), (Plan(0.1, 60.0, 30.0), 7)):
        left = plan.total
        for todo in range(cases, 0, -1):
            allowance = plan.allowance(left, todo)
            assert 0 < allowance <= min(plan.case, left)
            left -= allowance
        assert left >= 0
    # noise twice, the model, the last look at the ceilings, and 15 s to start and to write the pages
    for level, limit in (("default", 240), ("quick", 60)):
        rest = 2 * 3 + (run.MODEL if PLANS[level].model else 0) + 12
        assert PLANS[level].total + rest <= limit, level


def test_a_case_that_does_not_end_is_stopped_and_the_others_are_measured(tmp_path):
    one, _answers, said = a_run(tmp_path, [None, Late("had not ended after 2.0 s"), None], CASES)
    found = one.cases(CASES)
    assert [r.status for r in found.results] == ["ok", "over budget", "ok"]
    assert found.results[1].max_error == 1e-7, "what was known before it was stopped"
    assert "had not ended after 2.0 s; try --full" in found.results[1].error
    assert [r.shape for r in said] == ["one", "two", "three"]
    assert found.complete
    assert trace.read(tmp_path) == found


def test_no_time_left_is_said_and_not_waited_for(tmp_path):
    one, answers, _ = a_run(tmp_path, [None] * 3, CASES, Plan(0.1, 1.0, 0.0))
    found = one.cases(CASES)
    assert {r.status for r in found.results} == {"over budget"}
    assert [what for what, _ in answers.asked] == ["noise", "noise", "end"]


def test_an_interrupted_run_keeps_what_it_measured_and_says_so(tmp_path):
    one, answers, _ = a_run(tmp_path, [None, KeyboardInterrupt()], CASES)
    found = one.cases(CASES)
    assert one.interrupted
    assert answers.closed == 1
    kept = trace.read(tmp_path)
    assert kept == found
    assert [r.shape for r in kept.results] == ["one"]
    assert kept.left == [c.id for c in CASES[1:]]
    assert not kept.complete


def test_processes_add_their_rounds(tmp_path):
    one, _, _ = a_run(tmp_path, [], CASES, Plan(0.01, 600.0, 6000.0))
    one.worker = Here()
    single, result = (one.one(CASES[0], left=600.0, cases=1, processes=count) for count in (1, 3))
    assert (single.status, result.status) == ("ok", "ok"), result.error
    assert len(single.pair.ours) >= 5
    assert len(result.pair.ours) >= 3 * 5
    assert run.merged([result, replace(single, pair=None, status="wrong")]).status == "wrong"


@pytest.mark.parametrize(
    ("kind", "status", "why"),
    [
        ("sleeps", "over budget", "one call of ours takes"),
        ("dies", "error", "ended with SIGABRT"),
        ("raises", "error", "ValueError: no"),
    ],
)
def test_a_process_of_its_own_is_stopped_or_replaced(tmp_path, monkeypatch, kind, status, why):
    monkeypatch.setattr(run, "PATIENCE", 1.0)
    one, _, _ = a_run(tmp_path, [], CASES)
    one.worker = Worker()
    try:
        result = one.one(softmax_case(build=partial(broken, kind)), left=3.0, cases=1)
        assert (result.status, result.pair) == (status, None)
        assert why in result.error
        assert one.worker.ask("end", seconds=20.0) == (0.0, {}), "another process answers"
    finally:
        one.worker.close()

"""The measuring core tells the truth about time and about the machine."""

import itertools
import time
from contextlib import contextmanager

import pytest
import torch
from benchmark_cases import softmax_case

import mmkern
from mmkern.benchmarks import guards, machine, measure, statistics, suite, tables, timing
from mmkern.benchmarks.records import Baseline, Problem


def test_speedup_is_the_median_of_paired_ratios_and_drift_cancels():
    drift = [1.0 + 0.1 * i for i in range(21)]
    pair = measure.compare([2.0 * d for d in drift], [3.0 * d for d in drift])
    assert pair.speedup == pytest.approx(1.5)
    assert pair.low == pytest.approx(1.5)
    assert pair.high == pytest.approx(1.5)
    noisy = measure.compare([1.0] * 9, [1.8, 1.9, 2.0, 2.0, 2.0, 2.1, 2.2, 50.0, 0.1])
    assert noisy.speedup == 2.0, "one outlier on each side does not move a median"


def test_interval_covers_the_true_median_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(1)
    hits = 0
    for _ in range(200):
        low, high = statistics.interval(torch.randn(25, generator=generator, dtype=torch.float64).tolist())
        hits += low <= 0.0 <= high
    assert 180 <= hits <= 200
    values = [1.0, 2.0, 3.0, 4.0]
    assert statistics.interval(values) == statistics.interval(values)
    assert statistics.geometric_mean([0.5, 2.0, 4.0]) == pytest.approx(4 ** (1 / 3))


def test_sides_alternate_within_and_across_rounds(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 0.0)
    entered = []

    @contextmanager
    def context():
        entered.append(True)
        yield
        entered.pop()

    def theirs():
        assert entered, "a baseline runs inside its context"
        calls.append("b")

    pair, _ = measure.time_pair(lambda: calls.append("a"), Baseline("b", theirs, context), budget=0.0)
    assert len(pair.ours) == len(pair.theirs) == guards.MIN_ROUNDS
    rounds = "".join(calls)[-2 * guards.MIN_ROUNDS :]
    assert rounds == "".join(itertools.islice(itertools.cycle(["ab", "ba"]), guards.MIN_ROUNDS))


def test_a_known_ratio_is_measured():
    pair, _ = measure.time_pair(lambda: time.sleep(2e-3), Baseline("slow", lambda: time.sleep(6e-3)), budget=0.3)
    assert 2.0 < pair.speedup < 4.0
    assert pair.low <= pair.speedup <= pair.high


def test_short_calls_are_looped_until_a_sample_is_long_enough():
    loops = timing.loops_for(lambda: None)
    assert loops * timing.seconds_per_call(lambda: None, loops) > timing.SAMPLE_SECONDS / 20
    assert timing.loops_for(lambda: time.sleep(3e-3)) == 1


def test_screen_keeps_the_reason_of_a_baseline_that_cannot_run():
    def refuse():
        raise RuntimeError("No available kernel.\nAborting")

    x = torch.randn(8, 8)
    problem = Problem(x.sin, [Baseline("a", refuse), Baseline("b", x.sin)], lambda: x.double().sin())
    found = measure.screen(problem)
    assert found["a"] == "No available kernel."
    assert 0 < found["b"] < 0.1


@pytest.mark.parametrize(
    ("ours", "status"),
    [
        (lambda x: torch.softmax(x, 1) * 1.001, "wrong"),
        (lambda x: torch.softmax(x, 1).where(x < 3, torch.nan), "wrong"),
        (lambda x: torch.softmax(x, 1)[:1], "error"),
        (lambda x: 1 / 0, "error"),
    ],
)
def test_a_failing_case_shows_no_time(ours, status):
    result = measure.measure(softmax_case(ours), budget=0.0)
    assert result.status == status
    assert result.error
    assert result.pair is None
    assert result.seconds is None
    assert result.rate is None
    (table,) = tables.family_tables([result])
    assert status.upper() in table.rows[0]
    assert not any("x [" in cell for cell in table.rows[0])
    assert tables.summary([result]).rows[0][2] == "0/1"
    assert tables.failures([result]).rows[0][4] == result.error


def test_a_case_that_costs_more_than_it_may_is_measured_once_and_gives_no_verdict():
    slow = Baseline("slow", lambda: (time.sleep(0.05), torch.softmax(x, 1))[1])
    x = torch.randn(64, 256)
    result = measure.measure(softmax_case(baselines=[slow], x=x), budget=5.0, allowance=0.0)
    assert (result.status, result.notes, result.judged) == ("ok", ["measured once"], False)
    assert len(result.pair.ours) == 1
    assert result.seconds_spent < 2


def test_a_failure_while_timing_leaves_no_half_measured_result():
    counter = itertools.count()

    def breaks_later(x):
        if next(counter) > 5:
            raise RuntimeError("out of memory")
        return torch.softmax(x, 1)

    result = measure.measure(softmax_case(breaks_later), budget=0.0)
    assert (result.status, result.pair, result.error) == ("error", None, "RuntimeError: out of memory")


def test_a_right_case_is_timed_against_the_fastest_baseline():
    x = torch.randn(64, 256)
    baselines = [
        Baseline("slow", lambda: (time.sleep(5e-3), torch.softmax(x, 1))[1]),
        Baseline("fast", lambda: torch.softmax(x, 1)),
    ]
    ceilings = machine.Ceilings()
    ceilings.measured = {"copy 128 KiB": 40e3}
    result = measure.measure(softmax_case(baselines=baselines, x=x), budget=0.05, ceilings=ceilings)
    assert result.status == "ok", result.error
    assert result.against == "fast"
    assert set(result.screened) == {"slow", "fast"}
    assert result.ran == [f"softmax_fwd: cpu ({mmkern.ops.dispatch._C.isa()})"]
    assert result.rate == pytest.approx(result.bytes / result.seconds / 1e9)
    assert result.of_ceiling == pytest.approx(result.rate / 40e3)


def test_what_ran_is_recorded_when_the_reference_runs():
    result = measure.measure(softmax_case(dtype=torch.float64), timed=False)
    assert result.status == "ok", result.error
    assert result.ran == ["softmax_fwd: reference"]


def test_a_gpu_is_held_against_its_own_units(monkeypatch):
    ceilings, asked = machine.Ceilings(device="cuda"), []
    monkeypatch.setattr(ceilings, "_measure_gpu", lambda bound, moved: asked.append(bound) or 7.0)
    for case in suite.select(["attention"], device="cuda"):
        assert ceilings(case)[1] == 7.0
    half = next(case for case in suite.select(["attention"], ["float16"]) if case.bound == "fma")
    ceilings.measured.clear()
    asked.clear()
    assert ceilings(half) == ("bf16_dot", 7.0)
    assert asked == ["bf16_dot"] * machine.STRETCHES


def test_a_ceiling_is_the_best_of_its_stretches_and_is_looked_at_again(monkeypatch):
    """A neighbour that takes the machine for a moment must not make a kernel reach 700% of it."""
    ceilings, found = machine.Ceilings(), iter([28.0, 207.0, 100.0, 150.0, 228.0, 90.0, 50.0, 114.0, 50.0])
    monkeypatch.setattr(ceilings, "_measure", lambda bound, moved: None if bound == "bf16_dot" else next(found))
    half = next(case for case in suite.select(["attention"], ["bfloat16"]) if case.bound == "bf16_dot")
    assert ceilings(half) == ("fma", 207.0), "no line for an instruction that the processor does not have"
    assert ceilings.of("bf16_dot") is None
    assert ceilings.again(half) == 228.0
    assert ceilings.check_again() == 0.5
    assert ceilings.of("fma") == 228.0


def test_ceilings_are_measured_once_per_size(monkeypatch):
    ceilings, asked = machine.Ceilings(), []
    monkeypatch.setattr(ceilings, "_measure", lambda bound, moved: asked.append((bound, moved)) or 5.0)
    for size in (3000, 100_000, 130_000, 1 << 20):
        assert ceilings.of("copy", size) == 5.0
    assert ceilings.of("fma") == ceilings.of("fma", 123) == 5.0
    once = [("copy", machine.SMALLEST_COPY), ("copy", 1 << 17), ("copy", 1 << 20), ("fma", 0)]
    assert asked == [one for one in once for _ in range(machine.STRETCHES)]


def test_real_ceilings_are_plausible():
    ceilings = machine.Ceilings(seconds=0.02)
    assert 1 < ceilings.of("fma") < 1e5
    assert 0.5 < ceilings.of("copy", 1 << 24) < 1e4
    assert 0.5 < ceilings.of("read", 1 << 24) < 1e4

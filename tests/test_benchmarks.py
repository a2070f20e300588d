"""The measuring core tells the truth: about time, about correctness, and in its reports."""

import itertools
import math
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import mmkern
from mmkern.benchmarks import machine, measure, model, report, suite
from mmkern.benchmarks.measure import Baseline, Case, Pair, Problem, Result


def softmax_case(ours=None, baselines=None, **changes) -> Case:
    """Softmax of 64x256 in float32, with `ours` or the baselines replaced."""

    def build(dtype, device):
        x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
        return Problem(
            (lambda: ours(x)) if ours else lambda: mmkern.softmax(x, 1),
            baselines or [Baseline("eager", lambda: torch.softmax(x, 1))],
            lambda: torch.softmax(x.double(), 1),
        )

    case = Case("softmax", "softmax", "test", "64x256", torch.float32, build, 1e6, 2 * 64 * 256 * 4, "copy")
    return replace(case, **changes)


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
        low, high = measure.interval(torch.randn(25, generator=generator, dtype=torch.float64).tolist())
        hits += low <= 0.0 <= high
    assert 180 <= hits <= 200
    values = [1.0, 2.0, 3.0, 4.0]
    assert measure.interval(values) == measure.interval(values)
    assert measure.geometric_mean([0.5, 2.0, 4.0]) == pytest.approx(4 ** (1 / 3))


def test_sides_alternate_within_and_across_rounds(monkeypatch):
    calls = []
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 0.0)
    entered = []

    @contextmanager
    def context():
        entered.append(True)
        yield
        entered.pop()

    def theirs():
        assert entered, "a baseline runs inside its context"
        calls.append("b")

    pair = measure.time_pair(lambda: calls.append("a"), Baseline("b", theirs, context), budget=0.0)
    assert len(pair.ours) == len(pair.theirs) == measure.MIN_ROUNDS
    rounds = "".join(calls)[-2 * measure.MIN_ROUNDS :]
    assert rounds == "".join(itertools.islice(itertools.cycle(["ab", "ba"]), measure.MIN_ROUNDS))


def test_a_known_ratio_is_measured():
    pair = measure.time_pair(lambda: time.sleep(2e-3), Baseline("slow", lambda: time.sleep(6e-3)), budget=0.3)
    assert 2.0 < pair.speedup < 4.0
    assert pair.low <= pair.speedup <= pair.high


def test_short_calls_are_looped_until_a_sample_is_long_enough():
    loops = measure.loops_for(lambda: None)
    assert loops * measure.seconds_per_call(lambda: None, loops) > measure.SAMPLE_SECONDS / 20
    assert measure.loops_for(lambda: time.sleep(3e-3)) == 1


def test_screen_keeps_the_reason_of_a_baseline_that_cannot_run():
    def refuse():
        raise RuntimeError("No available kernel.\nAborting")

    found = measure.screen([Baseline("a", refuse), Baseline("b", lambda: time.sleep(1e-3))])
    assert found["a"] == "No available kernel."
    assert 1e-3 <= found["b"] < 0.1


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
    (table,) = report.family_tables([result])
    assert status.upper() in table.rows[0]
    assert not any("x [" in cell for cell in table.rows[0])
    assert report.summary([result]).rows[0][2] == "0/1"
    assert report.failures([result]).rows[0][4] == result.error


def test_a_failure_while_timing_leaves_no_half_measured_result():
    counter = itertools.count()

    def breaks_later(x):
        if next(counter) > 5:
            raise RuntimeError("out of memory")
        return torch.softmax(x, 1)

    result = measure.measure(softmax_case(breaks_later), budget=0.0)
    assert (result.status, result.pair, result.error) == ("error", None, "RuntimeError: out of memory")


def test_a_right_case_is_timed_against_the_fastest_baseline():
    x = torch.zeros(64, 256)
    baselines = [
        Baseline("slow", lambda: (time.sleep(5e-3), torch.softmax(x, 1))[1]),
        Baseline("fast", lambda: torch.softmax(x, 1)),
    ]
    result = measure.measure(softmax_case(baselines=baselines), budget=0.05, ceiling=lambda case: 40.0)
    assert result.status == "ok", result.error
    assert result.against == "fast"
    assert set(result.screened) == {"slow", "fast"}
    assert result.ran == [f"softmax_fwd: cpu ({mmkern.ops.dispatch._C.isa()})"]
    assert result.rate == pytest.approx(result.bytes / result.seconds / 1e9)
    assert result.of_ceiling == pytest.approx(result.rate / 40.0)


def test_what_ran_is_recorded_when_the_reference_runs():
    result = measure.measure(softmax_case(dtype=torch.float64), timed=False)
    assert result.status == "ok", result.error
    assert result.ran == ["softmax_fwd: reference"]


def a_result(op: str, shape: str, dtype: str, ratio: float, spread: float = 0.1) -> Result:
    pair = Pair([1e-3] * 3, [ratio * 1e-3] * 3, ratio, ratio - spread, ratio + spread)
    return Result(
        "softmax", op, shape, "8x8", dtype, 1e6, 4e7, "copy", ran=["softmax_fwd: cpu (avx2)"], max_error=1e-7,
        torch_error=2e-7, relative_l2=1e-8, against="eager", screened={"eager": 2e-3, "other": "no"}, pair=pair,
        ceiling=50.0,
    )  # fmt: skip


def a_report() -> report.Report:
    results = [
        a_result("softmax", "big", "float32", 2.0),
        a_result("softmax", "small", "float32", 0.5),
        a_result("softmax", "close", "bfloat16", 0.95),
        a_result("softmax", "smallest", "bfloat16", 4.0),
        Result("softmax", "softmax", "bad | one", "1", "float16", 1, 1, "copy", status="wrong", error="max error 1"),
    ]
    ceilings = {"fma": 230.0, "copy 64 KiB": 90.0, "copy 65536 KiB": 45.0}
    return report.Report(
        "2026-01-01T00:00:00+00:00",
        {"level": "quick", "model": True},
        machine.facts() | {"load": 2.0},
        results,
        ceilings,
    )


def test_report_survives_json():
    before = a_report()
    after = report.Report.from_json(before.to_json())
    assert after == before
    assert after.results[0].pair.ours == [1e-3] * 3
    with pytest.raises(ValueError, match=r"mmkern\.bench/1.*mmkern\.bench/0"):
        report.Report.from_json(before.to_json().replace(report.SCHEMA, "mmkern.bench/0"))


def test_markdown_says_what_was_measured_what_was_lost_and_what_failed(tmp_path):
    json_path, markdown_path = a_report().write(tmp_path / "new" / "folder")
    assert report.Report.from_json(json_path.read_text()) == a_report()
    text = markdown_path.read_text()
    assert "| softmax | f32 | 2/2 | 1.00x | 0.50x | small | cpu (avx2) |" in text
    assert "| softmax | bf16 | 1/1 | 0.95x |" in text, "the smallest shape is call overhead, not part of a mean"
    assert "| softmax, smallest | bf16 | 1/1 | 4.00x |" in text
    lost = text.split("## Slower than torch")[1].split("##")[0]
    assert [line.split(" | ")[1] for line in lost.splitlines() if line.startswith("| softmax")] == ["small", "close"]
    assert "within noise" in lost.splitlines()[-2]
    assert "| softmax | bad \\| one | f16 | wrong | max error 1 |" in text
    assert "| softmax | big | 8x8 | f32 | 1.00 ms | 2.00 ms | 2.00x [1.90, 2.10] | 40.0 GB/s | 80% copy |" in text
    assert "FMA 230 GFLOP/s, copy 45 GB/s (64 MiB)" in text
    assert torch.__version__ in text
    assert "something else was busy" in text
    every_row = [line.replace("\\|", "").count("|") for line in lost.splitlines() if line.startswith("|")]
    assert len(set(every_row)) == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.50 s"), (0.0123, "12.3 ms"), (1.5e-6, "1.50 µs"), (2.34e-4, "234 µs"), (9.996e-4, "1000 µs")],
)
def test_durations_read_well(seconds, text):
    assert report.duration(seconds) == text


def test_a_narrow_screen_drops_spare_columns_only():
    (table,) = report.family_tables(a_report().results)
    assert table.fit(1000).header == table.header
    narrow = table.fit(100)
    assert {"op", "shape", "dtype", "mmkern", "torch", "speedup"} <= set(narrow.header)
    assert "torch's way" not in narrow.header
    assert all(len(row) == len(narrow.header) for row in narrow.rows)


def test_selection_by_op_family_dtype_and_level():
    every = suite.select(level="full")
    assert len({case.id for case in every}) == len(every)
    assert {case.op for case in suite.select(["position"])} == {
        name + part for name in ("rotary", "add_positional_encoding", "embed_tokens") for part in ("", "-training")
    }
    assert {case.op for case in suite.select(["log_softmax"], ["bfloat16"])} == {"log_softmax"}
    quick, default = ({case.id for case in suite.select(level=level)} for level in ("quick", "default"))
    assert quick < default < {case.id for case in every}
    assert {case.op for case in suite.select(level="quick")} == {case.op for case in every} - {
        "attention-lengths",
        "linear_cross_entropy",
    }
    for wrong in ({"ops": ["nope"]}, {"dtypes": ["int8"]}, {"level": "later"}):
        with pytest.raises(ValueError, match="choose from"):
            suite.select(**wrong)


def test_a_gpu_gets_cases_that_fill_it():
    cpu, gpu = suite.select(), suite.select(device="cuda")
    known = {case.id for case in cpu}
    more = [case for case in gpu if case.id not in known]
    assert {case.level for case in more} == {"gpu"}
    assert not {case.level for case in cpu} & {"gpu", "full"}
    assert {"attention", "attention-causal", "attention-decode", "attention-backward"} <= {case.op for case in more}
    assert min(case.flops for case in more if case.op == "attention") > 1e11


def test_a_gpu_is_held_against_its_own_units(monkeypatch):
    ceilings, asked = machine.Ceilings(device="cuda"), []
    monkeypatch.setattr(ceilings, "_measure_gpu", lambda bound, moved: asked.append(bound) or 7.0)
    for case in suite.select(["attention"], device="cuda"):
        assert ceilings(case) == 7.0
    half = next(case for case in suite.select(["attention"], ["float16"]) if case.bound == "fma")
    ceilings.measured.clear()
    asked.clear()
    assert ceilings(half) == 7.0
    assert asked == ["bf16_dot"]


def test_work_is_counted_by_what_is_visible():
    found = {case.op: case for case in suite.select(["attention"], ["float32"], "quick")}
    causal = found["attention-causal"]
    assert causal.dims == "1x32/8x512x128"
    assert causal.flops == 4 * 32 * 128 * 512 * 513 / 2
    window = found["attention-window"]
    assert window.flops == 4 * 8 * 64 * sum(min(i + 1, 128) for i in range(1024))
    decode = found["attention-decode"]
    assert decode.bytes == 4 * 2 * 8 * 12 * 64 * (1 + 1024)


# one small case of each op: the whole suite is `mmkern verify`
SMALL = {case.op: case for case in sorted(suite.select(level="quick"), key=lambda case: -case.flops)}


@pytest.mark.parametrize("op", SMALL)
def test_every_op_has_a_case_that_is_right(op):
    result = measure.measure(SMALL[op], timed=False)
    assert result.status == "ok", result.error
    assert result.ran
    assert all(": cpu (" in line for line in result.ran), result.ran


def test_every_baseline_computes_what_ours_does():
    for case in SMALL.values():
        problem = case.build(torch.float32, "cpu")
        exact = problem.exact()
        # a baseline that draws its own random numbers computes something else
        baselines = [Baseline("yardstick", problem.yardstick)] if problem.yardstick else problem.baselines
        for baseline in baselines:
            with baseline.context():
                found = baseline.call()
            for a, e in zip(*((t if isinstance(t, tuple) else (t,)) for t in (found, exact)), strict=True):
                assert torch.allclose(a.double(), e, rtol=1e-4, atol=1e-4), (case.id, baseline.name)


def test_ceilings_are_measured_once_per_size(monkeypatch):
    ceilings, asked = machine.Ceilings(), []
    monkeypatch.setattr(ceilings, "_measure", lambda bound, moved: asked.append((bound, moved)) or 5.0)
    for size in (3000, 100_000, 130_000, 1 << 20):
        assert ceilings.of("copy", size) == 5.0
    assert ceilings.of("fma") == ceilings.of("fma", 123) == 5.0
    assert asked == [("copy", machine.SMALLEST_COPY), ("copy", 1 << 17), ("copy", 1 << 20), ("fma", 0)]


def test_real_ceilings_are_plausible():
    ceilings = machine.Ceilings(seconds=0.02)
    assert 1 < ceilings.of("fma") < 1e5
    assert 0.5 < ceilings.of("copy", 1 << 24) < 1e4
    assert 0.5 < ceilings.of("read", 1 << 24) < 1e4


def test_the_model_reads_real_text_of_mixed_lengths():
    sentences, passages = model.sentences(), model.passages()
    assert len(sentences) == len(set(sentences)) == 256
    lengths = sorted(map(len, sentences))
    assert lengths[0] >= 20
    assert lengths[-1] > 3 * lengths[len(lengths) // 4]
    assert len(passages) == 16
    assert len({len(p) for p in passages}) == 16
    assert math.isclose(sum(p.count("e") for p in passages) / sum(map(len, passages)), 0.1, abs_tol=0.04), "English"


def test_benchmarks_need_torch_alone():
    code = (
        "import sys; import mmkern.benchmarks.suite, mmkern.benchmarks.report, mmkern.benchmarks.model;"
        "assert not {'typer', 'rich', 'transformers', 'pytest'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""Reports: what is kept, what is said, what two of them tell."""

import json

import pytest
import torch
from benchmark_cases import a_report, a_result

from mmkern.benchmarks import report, tables, trace


def test_a_report_survives_its_file(tmp_path):
    before = a_report()
    trace.save(tmp_path / "report.jsonl", before)
    assert trace.read(tmp_path) == before
    lines = (tmp_path / "report.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds == ["run", "environment", "noise", *["measurement"] * 5, "model", "end"]
    measured = json.loads(lines[3])
    assert measured["pair"]["ours"] == [1e-3] * 5
    assert measured["max_error"] == 1e-7
    assert measured["environment"] == json.loads(lines[1])["id"]


def test_a_run_that_was_killed_keeps_what_it_measured(tmp_path):
    path = tmp_path / "report.jsonl"
    trace.save(path, a_report())
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:5]) + "\n" + lines[5][:40])
    found = trace.read(path)
    assert [r.shape for r in found.results] == ["big", "small"]
    assert len(found.left) == 3
    assert not found.complete
    assert "Partial: 2 of 5 cases" in report.to_markdown(found)
    resumed = trace.Writer(path, found, resumed=True)
    resumed.measurement(a_result("softmax", "close", "bfloat16", 1.0))
    assert [r.shape for r in trace.read(path).results] == ["big", "small", "close"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "No such file"),
        ("", "empty"),
        ("rubbish", "line 1 is not JSON"),
        ('{"schema": "mmkern.bench/1"}', r"line 1: schema 'mmkern\.bench/1', this version reads 'mmkern\.bench/2'"),
        ('{\n "schema": "mmkern.bench/1"\n}', r"schema 'mmkern\.bench/1', this version reads"),
        ("[1]", "line 1: schema None"),
        ('{"schema": "mmkern.bench/2", "kind": "end"}', "begins with a line of kind 'end'"),
        ('{"schema": "mmkern.bench/2", "kind": "run"}', "not a report: KeyError: 'started'"),
    ],
)
def test_what_is_no_report_is_told_in_one_line(tmp_path, text, why):
    path = tmp_path / "report.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=why) as error:
        trace.read(path)
    assert "\n" not in str(error.value)


def test_markdown_says_what_was_measured_what_was_lost_and_what_failed():
    text = report.to_markdown(a_report())
    assert "1 faster, 1 equal, 1 slower" in text
    assert "1 OF 5 CASES NOT RIGHT" in text
    assert "| softmax | f32 | 2/2 | 1.00x | 0.50x | small | cpu (avx2) |" in text
    assert "| softmax | bf16 | 1/1 | 0.95x |" in text, "the smallest shape is call overhead, not part of a mean"
    assert "| softmax, smallest | bf16 | 1/1 | 4.00x |" in text
    lost = text.split("## Slower than torch")[1].split("##")[0]
    assert [line.split(" | ")[1] for line in lost.splitlines() if line.startswith("| softmax")] == ["small", "close"]
    assert "within noise" in lost.splitlines()[-2]
    assert "ours reaches 80% of copy, torch's 160%" in lost
    assert "| softmax | bad \\| one | f16 | wrong | max error 1 |" in text
    assert "| softmax | big | 8x8 | f32 | 1.00 ms | 2.00 ms | 2.00x [1.90, 2.10] | 40.0 GB/s | 80% copy |" in text
    assert "FMA 230 GFLOP/s, copy 45 GB/s (64 MiB)" in text
    assert torch.__version__ in text
    assert "something else was busy" in text
    every_row = [line.replace("\\|", "").count("|") for line in lost.splitlines() if line.startswith("|")]
    assert len(set(every_row)) == 1


def test_a_noisy_run_gives_no_verdict():
    found = a_report()
    good = report.verdict(found)
    assert good.mean == pytest.approx((2.0 * 0.5 * 0.95) ** (1 / 3))
    assert (good.faster, good.equal, good.slower, good.timed, good.right, good.checked) == (1, 1, 1, 4, 4, 5)
    found.results[0].notes = ["unstable: 1.0 to 3.0"]
    assert report.verdict(found).mean == pytest.approx((0.5 * 0.95) ** 0.5), "what is unstable is no part of a mean"
    assert tables.summary(found.results).rows[0][2:5] == ("1/2", "0.50x", "0.50x")
    found.noise[0]["floor"] = 0.4
    bad = report.verdict(found)
    assert bad.mean is None
    assert report.sentence(bad).startswith("No verdict on speed: a call timed against itself differs by 40%.")
    found.noise[0] |= {"floor": 0.01, "busy": 0.6}
    assert "its threads ran 60% of their time" in report.sentence(report.verdict(found))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.50 s"), (0.0123, "12.3 ms"), (1.5e-6, "1.50 µs"), (2.34e-4, "234 µs"), (9.996e-4, "1000 µs")],
)
def test_durations_read_well(seconds, text):
    assert tables.duration(seconds) == text


def test_a_narrow_screen_drops_spare_columns_only():
    (table,) = tables.family_tables(a_report().results)
    assert table.fit(1000).header == table.header
    narrow = table.fit(100)
    assert {"op", "shape", "dtype", "mmkern", "torch", "speedup"} <= set(narrow.header)
    assert "torch's way" not in narrow.header
    assert all(len(row) == len(narrow.header) for row in narrow.rows)

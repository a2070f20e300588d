"""The README's table is made from a report."""

from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_cases import a_report, a_result

from mmkern.benchmarks import headline, report, tables, trace
from mmkern.benchmarks.measure import compare

README = Path(__file__).parents[1] / "README.md"


def good_report():
    found = a_report()
    found.results = [*found.results[:4], a_result("rotary", "Llama", "float32", 3.0)]
    found.planned = [r.id for r in found.results]
    return found


def test_the_table_says_what_the_report_does_and_where_it_lost(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(README.read_text())
    trace.save(tmp_path / trace.NAME, good_report())
    for _ in range(2):
        headline.main(str(tmp_path), str(readme), str(tmp_path / "reports"))
        text = readme.read_text()
        assert text.count("| op | f32 | bf16 | best case | worst case | slower |") == 1
        assert "| softmax | 1.00x | 0.95x | 2.00x big, f32 | 0.50x small, f32 | 1 of 3 |" in text
        assert "| rotary | 3.00x |  | 3.00x Llama, f32 | 3.00x Llama, f32 | 0 of 1 |" in text
        assert report.sentence(report.verdict(good_report())) in text
    head, tail = README.read_text().split(headline.BEGIN)[0], README.read_text().split(headline.END)[1]
    assert text.startswith(head)
    assert text.endswith(tail)
    (kept,) = (tmp_path / "reports").glob("*.jsonl")
    assert trace.read(kept) == good_report()
    assert kept.with_suffix(".md").exists()
    assert kept.with_suffix(".md").as_posix() in text


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda r: r.planned.append("another"), "partial"),
        (lambda r: r.noise[0].update(floor=0.5), "no verdict"),
        (lambda r: r.results.__setitem__(0, replace(r.results[0], status="wrong", pair=None)), "not right"),
    ],
)
def test_a_report_that_says_nothing_makes_no_table(tmp_path, change, why):
    found = good_report()
    change(found)
    trace.save(tmp_path / trace.NAME, found)
    readme = tmp_path / "README.md"
    readme.write_text(README.read_text())
    with pytest.raises(SystemExit, match=why):
        headline.main(str(tmp_path), str(readme), str(tmp_path / "reports"))
    assert readme.read_text() == README.read_text()


def test_a_thinned_report_says_the_same():
    found = good_report()
    ours = [1e-3 + 1e-6 * (i * 37 % 101) for i in range(101)]
    found.results[0] = replace(found.results[0], pair=compare(ours, [2 * t + 1e-6 for t in ours[::-1]]))
    thin = headline.thinned(found)
    assert len(thin.results[0].pair.ours) == headline.QUANTILES
    assert tables.summary(thin.results) == tables.summary(found.results)
    assert thin.results[0].pair.speedup == found.results[0].pair.speedup
    assert thin.results[0].seconds == pytest.approx(found.results[0].seconds)

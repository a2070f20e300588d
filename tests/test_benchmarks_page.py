"""The report page: one file that needs nothing from elsewhere, right about what is wrong, on any report."""

import html.parser
import re
from dataclasses import replace

import pytest
from benchmark_cases import a_report, a_result

from mmkern.benchmarks import page, plots, trace
from mmkern.benchmarks.measure import compare

VOID = {"meta", "link", "input", "br", "img"}


class Page(html.parser.HTMLParser):
    """The elements of a page, each with its attributes; fails on one that is not closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data.strip())


def test_the_page_is_whole_and_asks_nobody_for_anything():
    text = page.to_html(a_report())
    found = Page(text)
    assert {name for name, _ in found.elements} >= {"svg", "table", "details", "script", "style"}
    for name, attributes in found.elements:
        for key in ("src", "href", "xlink:href", "action", "srcset"):
            value = attributes.get(key)
            assert value is None or value.startswith(("#", "data:,")), (name, key, value)
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest", text)
    assert set(re.findall(r"https?://[^\"' )]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert len(text) < 1_000_000
    ids = [a["id"] for _, a in found.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert 'name="viewport"' in text
    assert not any(colour in text for colour in plots.PAGE_COLOURS), "every colour of a plot is one of the page's"


def cells(text):
    """Of each op and shape in the heat table: what its cells say, and their class."""
    rows = re.findall(r'data-text="([^"]+)">\s*<td class="shape">.*?</tr>', text, re.S)
    bodies = re.findall(r'data-text="[^"]+">\s*<td class="shape">(.*?)</tr>', text, re.S)
    return {row: re.findall(r'<td class="c (\w+)"[^>]*>([^<]*)', body) for row, body in zip(rows, bodies, strict=True)}


def test_cells_are_coloured_by_significance_and_a_wrong_one_has_no_time():
    found = a_report()
    found.results[0].notes = ["unstable: 1.0 to 3.0"]
    heat = cells(page.to_html(found))
    assert heat["softmax big"] == [("unsure", "2.00x")]
    assert heat["softmax small"] == [("slower", "0.50x")]
    assert heat["softmax close"] == [("equal", "0.95x")]
    assert heat["softmax bad | one"] == [("wrong", "wrong")]
    found.noise[0]["floor"] = 0.5
    assert {kind for line in cells(page.to_html(found)).values() for kind, _ in line} == {"unsure", "wrong"}
    assert "No verdict" in page.to_html(found)
    assert "differs by 50%" in page.to_html(found)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.results.clear(),
        lambda r: r.results.__delitem__(slice(1, None)),
        lambda r: r.results.__setitem__(0, replace(r.results[0], pair=compare([1e-3], [2e-3]), notes=["once"])),
        lambda r: r.machine.update(isa=None),
        lambda r: r.machine.update(gpu="H100", gpu_memory_gib=80, gpu_capability="9.0", cuda="13", cudnn=9, triton="3"),
        lambda r: setattr(r, "complete", False) or r.planned.append("another"),
        lambda r: setattr(r, "started", "now"),
        lambda r: r.results.__setitem__(0, replace(r.results[0], shape="<script>alert(1)</script>")),
    ],
    ids=["nothing", "one op", "measured once", "no kernels", "gpu", "partial", "no date", "markup"],
)
def test_any_report_makes_a_page(change):
    found = a_report()
    change(found)
    text = page.to_html(found)
    Page(text)
    assert text.count("<script") == 1
    assert ("Partial" in text) == bool(found.left or not found.complete)


def test_what_is_slower_stands_with_its_reason_and_each_case_with_its_command():
    text = page.to_html(a_report())
    lost = text.split('id="lost"')[1].split("<h2")[0]
    assert "ours reaches 80% of copy, torch&#39;s 160%" in lost
    assert lost.index("small") < lost.index("close")
    found = a_report()
    r = a_result("attention-causal", "GPT-2 1024", "bfloat16", 2.0)
    expected = "mmkern bench --ops attention-causal --dtype bf16 --shape 'GPT-2 1024'"
    assert page.command(r, found) == expected, "a quick case needs no --full"
    found.options["level"] = "default"
    assert page.command(r, found) == f"{expected} --full"
    assert page.command(r, trace.Report("", {"shapes": "my.toml"}, {})) == f"{expected} --shapes my.toml"


def test_plots_show_every_provider_and_the_ceiling():
    results = [replace(a_result("softmax", f"s{i}", "float32", 2.0), bytes=4e6 * 4**i) for i in range(3)]
    for r in results:
        r.screened = {"eager": 2e-3, "compiled": 1.5e-3, "broken": "no"}
    svg = plots.op_plot("softmax", "float32", results)
    for name in ("mmkern", "fastest other", "compiled", "ceiling", "GB/s", "copy"):
        assert f">{name}</text>" in svg, name
    assert "broken" not in svg
    assert plots.op_plot("softmax", "float32", results[:1]) == "", "a single case has no curve"
    assert plots.history_plot([("a", 1.0, 0.9, 1.1)]) == ""


def test_earlier_reports_are_kept_and_shown(tmp_path):
    path = tmp_path / trace.NAME
    first = a_report()
    trace.save(path, first)
    trace.archive(path)
    assert not path.exists()
    second = replace(a_report(), started="2026-02-01T00:00:00+00:00")
    trace.save(path, second)
    (tmp_path / trace.HISTORY / "broken.jsonl").write_text("rubbish")
    assert trace.earlier(path) == [first]
    written = page.write_pages(tmp_path, second)
    assert [p.name for p in written] == ["report.md", "report.html"]
    history = written[1].read_text().split('id="history"')[1]
    assert "2026-01-01 00:00" in history
    assert "2026-02-01 00:00" in history
    assert 'id="history"' not in page.to_html(second)

"""A run as one HTML file: curves, metrics, and predictions with their pictures; nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from mmkern.training import files, pictures, records
from mmkern.training.evaluation import Prediction, Row, metric_names

PAGE = "page.html"
CURVES = "curves.svg"
CLASSES_SHOWN = 16  # a larger table of mistakes is no longer read
_TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<style>
 body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
 table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .2rem .8rem; text-align: left }
 th { border-bottom: 1px solid #999 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
 .grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: .8rem }
 figure { display: flex; gap: .8rem; margin: 0; padding: .6rem; border: 1px solid #ddd; border-radius: .4rem }
 img { width: 72px; height: 72px; object-fit: contain } figcaption { font-size: .9em }
 .right { color: #17692b } .wrong { color: #a11 } .quiet { color: #666 } svg { max-width: 100%; height: auto }
</style>
<h1>{{ title }}</h1>
<table>{% for name, value in facts.items() %}<tr><td class="quiet">{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}
</table>
<h2>Held-out test data</h2>
<table><tr><th>task</th>{% for name in names %}<th class="n">{{ name }}</th>{% endfor %}</tr>
{% for group, baseline, values in rows %}<tr><td>{{ group }}{{ ": " + baseline if baseline }}</td>
{% for name in names %}<td class="n">{{ shown(values.get(name)) }}</td>{% endfor %}</tr>{% endfor %}</table>
{% for group, counts in confusions.items() %}<h2>Which classes are mistaken: {{ group }}</h2>
<table><tr><th>expected, said</th>{% for name in classes %}<th class="n">{{ name }}</th>{% endfor %}</tr>
{% for row in counts %}<tr><td>{{ classes[loop.index0] }}</td>{% set i = loop.index0 %}
{% for count in row %}<td class="n {{ "right" if loop.index0 == i else "wrong" }}">{{ count or "" }}</td>
{% endfor %}</tr>{% endfor %}</table>{% endfor %}
<h2>Curves</h2>
{{ curves }}
<h2>Predictions on test data</h2>
<div class="grid">{% for p in predictions %}<figure>{% if p.picture %}<img src="{{ p.picture }}" alt="">{% endif %}
<figcaption><span class="quiet">{{ p.prompt }}</span><br>
<b class="{{ 'right' if p.right else 'wrong' }}">{{ p.said }}</b>
{% if not p.right %}<br>expected: {{ p.expected }}{% endif %}</figcaption></figure>{% endfor %}</div>
</html>
"""


def curves(found: Sequence[dict[str, Any]]) -> str:
    """The loss and the scores of a run's records over its steps, as SVG."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}):  # a group may be called $x$
        return _drawn(found)


def _drawn(found: Sequence[dict[str, Any]]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    train = [r for r in found if r["split"] == "train"]
    steps = [r["step"] for r in train]
    left.plot(steps, [r["loss"] for r in train], color="0.8", linewidth=0.7)
    left.plot(steps, smoothed([r["loss"] for r in train]), label="training, smoothed")
    validation = [r for r in found if r["split"] == "validation"]
    at = [r["step"] for r in validation]
    for name in sorted({n for r in validation for n in r if n.startswith("loss_")}):
        left.plot(at, [r.get(name) for r in validation], ".--", label=f"validation, {name.removeprefix('loss_')}")
    for name in sorted({n for r in validation for n in r if n.endswith(("/accuracy", "/macro_f1", "_f1", "_match"))}):
        group, _, metric = name.rpartition("/")  # the metric first: a label that begins with "_" is left out
        right.plot(at, [r.get(name) for r in validation], ".-", label=f"{metric} of {group}")
    left.set(xlabel="step", ylabel="loss", ylim=(0, None))
    right.set(xlabel="step", ylabel="validation", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()


def smoothed(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """A running mean that forgets: each value weighs `keep` times the one after it."""
    found, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        found.append(total / weight)
    return found


def write(
    folder: Path,
    facts: dict[str, str],
    rows: Sequence[Row],
    predictions: Sequence[Prediction],
    classes: Sequence[str],
) -> Path:
    """Writes curves.svg and page.html into a run's folder; returns the page's path."""
    drawn = curves(records.read(folder))
    files.write(folder / CURVES, drawn)
    confusions = {group: v["confusion"] for group, baseline, v in rows if "confusion" in v and not baseline}
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    page = environment.from_string(_TEMPLATE).render(
        title=f"mmkern: {folder.name}",
        facts=facts,
        names=metric_names(rows),
        rows=rows,
        classes=classes,
        confusions=confusions if len(classes) <= CLASSES_SHOWN else {},
        shown=lambda v: "" if v is None else f"{v:.3f}" if isinstance(v, float) else v,
        curves=jinja2.utils.markupsafe.Markup(drawn[drawn.index("<svg") :]),
        predictions=[_entry(p, classes) for p in predictions],
    )
    files.write(folder / PAGE, page)
    return folder / PAGE


def _entry(p: Prediction, classes: Sequence[str]) -> dict[str, Any]:
    said, expected = [], []
    if p.label is not None:
        said.append(f"{classes[p.label]} ({p.confidence:.0%})")
        expected.append(classes[p.sample.label])
    if p.text is not None:
        said.append(p.text or "(nothing)")
        expected.append(p.sample.text)
    right = (p.label is None or p.label == p.sample.label) and (p.text is None or p.text == p.sample.text)
    return {
        "picture": _picture(p.sample.image),
        "prompt": p.sample.prompt,
        "said": ", ".join(said),
        "expected": ", ".join(expected),
        "right": right,
    }


def _picture(image: Any) -> str:
    if image is None:
        return ""
    opened = (pictures.read(image) if isinstance(image, Path) else image).convert("RGBA")
    opened.thumbnail((144, 144))
    written = io.BytesIO()
    opened.save(written, "PNG")
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()

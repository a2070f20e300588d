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
_TEMPLATE = Path(__file__).with_name("run.html")


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
    page = environment.from_string(_TEMPLATE.read_text()).render(
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
    said, expected, sample = [], [], p.sample
    if p.label is not None and sample.label is not None:
        said.append(f"{classes[p.label]} ({p.confidence:.0%})")
        expected.append(classes[sample.label])
    if p.text is not None and sample.text is not None:
        said.append(p.text or "(nothing)")
        expected.append(sample.text)
    return {
        "picture": _picture(sample.image),
        "prompt": sample.prompt,
        "said": ", ".join(said),
        "expected": ", ".join(expected),
        "right": p.label in (None, sample.label) and p.text in (None, sample.text),
    }


def _picture(image: Any) -> str:
    if image is None:
        return ""
    opened = (pictures.read(image) if isinstance(image, Path) else image).convert("RGBA")
    opened.thumbnail((144, 144))
    written = io.BytesIO()
    opened.save(written, "PNG")
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()

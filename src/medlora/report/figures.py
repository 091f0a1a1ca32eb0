"""Curves, forest plot and reliability diagram, each once as PNG and SVG files and once as SVG inside the page.

Inside the page the ink takes the colour of the text around it, so that one drawing serves light, dark and print.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from medlora.evaluate.calibration import Calibration
from medlora.evaluate.metrics import METRICS
from medlora.report.run import RunData
from medlora.train.manifest import BLUE, ORANGE, draw_loss

INK = "#0b0c0d"  # stands for the colour of the text
SIDE_COLOURS = {"untuned": ORANGE, "tuned": BLUE}
WIDTH = 5.0  # inches: on a phone, letters of 10 points stay as large
Draw = Callable[[Any], None]
"""Draws onto matplotlib axes."""


@dataclass(frozen=True, slots=True)
class Figure:
    name: str
    svg: str
    """For the page."""
    caption: str


def figures(run: RunData) -> list[Figure]:
    """Every figure that the run has data for, written to RUN/figures too."""
    held = {side: run.manifest[side]["loss"] for side in ("before", "after") if "loss" in run.manifest.get(side, {})}
    steps = [entry for entry in run.history if "loss" in entry]
    found = []
    if steps:
        loss = partial(draw_loss, entries=run.history, held_out=held)
        found.append(_make(run, "loss", "Training loss by step, in nats a token.", loss))
        found.append(_make(run, "learning_rate", "Learning rate by step.", _rate(steps)))
    rows = forest_rows(run.summary)
    if rows:
        caption = (
            "Change after tuning, in percent of the untuned value, with 95 % intervals; right of the line is better."
        )
        found.append(_make(run, "forest", caption, _forest(rows), height=0.9 + 0.42 * len(rows)))
    for task in dict.fromkeys(c.task for c in run.calibrations):
        sides = [c for c in run.calibrations if c.task == task]
        caption = (
            f"Reliability on {task}: how often answers of a given confidence are right; on the diagonal is honest."
        )
        found.append(_make(run, f"reliability-{task}", caption, _reliability(sides)))
    return found


def forest_rows(summary: dict[str, Any] | None) -> list[tuple[str, float, float, float]]:
    """(label, change, low, high) in percent of the untuned value, turned so that more is better."""
    rows = []
    for task, entry in (summary or {"tasks": {}})["tasks"].items():
        for metric in METRICS[entry["kind"]]:
            found = entry["metrics"].get(metric.name, {})
            gap = found.get("difference")
            if metric.lower_is_better is None or not gap or gap["low"] is None or not found["untuned"]["value"]:
                continue
            scale = (-100 if metric.lower_is_better else 100) / abs(found["untuned"]["value"])
            low, high = sorted((gap["low"] * scale, gap["high"] * scale))
            rows.append((f"{task}: {metric.label}", gap["value"] * scale, low, high))
    return rows


def _rate(steps: list[dict[str, Any]]) -> Draw:
    def draw(axes: Any) -> None:
        known = [s for s in steps if "learning_rate" in s]
        axes.plot([s["step"] for s in known], [s["learning_rate"] for s in known], color=BLUE)
        axes.set(xlabel="step", ylabel="learning rate", ylim=(0, None))

    return draw


def _forest(rows: list[tuple[str, float, float, float]]) -> Draw:
    def draw(axes: Any) -> None:
        for place, (label, value, low, high) in enumerate(reversed(rows)):
            shown = low > 0 or high < 0
            axes.plot([low, high], [place, place], color=BLUE if shown else INK, linewidth=2)
            axes.plot([value], [place], "s", color=BLUE if shown else INK, ms=6)
            axes.text(0, place + 0.2, label, transform=axes.get_yaxis_transform(), fontsize=9)
        axes.axvline(0, color=INK, linewidth=1, linestyle=":")
        axes.spines["left"].set_visible(False)
        axes.set(xlabel="worse  <  change (%)  >  better", yticks=[], ylim=(-0.5, len(rows) - 0.3))

    return draw


def _reliability(sides: list[Calibration]) -> Draw:
    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=":")
        for found in sides:
            x, y = [b.confidence for b in found.bins], [b.accuracy for b in found.bins]
            label = f"{found.side}: calibration error {found.error:.3f}"
            axes.plot(x, y, marker="o", ms=4, color=SIDE_COLOURS[found.side], label=label)
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))  # above, where no curve runs

    return draw


def _make(run: RunData, name: str, caption: str, draw: Draw, height: float = 3.2) -> Figure:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder = run.folder / "figures"
    folder.mkdir(exist_ok=True)
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    style = ink | {"svg.fonttype": "none", "svg.hashsalt": name, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(WIDTH, height), layout="constrained")
        draw(axes)
        figure.savefig(folder / f"{name}.png", dpi=150)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    return Figure(name, _inline(drawn.getvalue(), name, caption), caption)


def _inline(svg: str, name: str, caption: str) -> str:
    """The drawing as an element of a page: named, its ids its own, its ink the text's."""
    body = svg[svg.index("<svg") :].replace(INK, "currentColor")
    body = re.sub(r'(id="|href="#|url\(#)', rf"\1{name}-", body)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    title = caption.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{title}">', body, count=1)

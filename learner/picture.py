"""The learning curve as a picture."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import EngFormatter

CURVE_COLOR, EXPERT_COLOR, RANDOM_COLOR, TEXT_COLOR = "#1f5fa8", "#2e8b57", "#9a9a9a", "#333333"
CLONE_COLOR = "#b5651d"
LABEL_POINTS, POINTS_PER_INCH = 6, 72
"""Between the axes and what is written beside them."""
GAP_PIXELS = 2
"""Between what is written below each other."""
TITLE_CHARACTERS = 68
"""In a line: an environment's name, with all its options, may be longer than the picture is wide."""


def draw_curve(rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any], path: Path) -> None:
    """Draw `curve_figure` into a PNG file."""
    save(curve_figure(rows, result), path)


def curve_figure(rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> Figure:
    """Return against environment steps, with a band of one standard error and lines for random, clone and expert.

    A run that takes no steps is drawn against iterations. Beside a clone, what matters is the way from it to the
    expert: the random policy far below is told, not drawn.

    rows: of `curve.csv`. result: of `result.json`. Returns are true returns per agent and episode.
    """
    unit, column = "joint environment steps", "env_steps"
    if not any(float(row[column]) for row in rows):
        unit, column = "iterations", "iteration"
    steps = [float(row[column]) for row in rows]
    means = [float(row["return_mean"]) for row in rows]
    errors = [float(row["return_stderr"] or 0.0) for row in rows]  # of one episode it is unknown
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    clone, random = result.get("clone_return"), result.get("random_return")
    references = [
        ("expert", result.get("expert_return"), EXPERT_COLOR),
        ("clone", clone, CLONE_COLOR),
        ("random", None if clone is not None else random, RANDOM_COLOR),
    ]
    labels = []
    for name, value, color in references:
        if value is not None:
            axes.axhline(value, color=color, linestyle=(0, (5, 3)), linewidth=1.2)
            aside = "\nas demonstrated" if name == "expert" and result.get("changes") else ""
            labels.append(_label(axes, f"{name} {value:.1f}{aside}", value, color=color))
    low = [mean - error for mean, error in zip(means, errors, strict=True)]
    high = [mean + error for mean, error in zip(means, errors, strict=True)]
    axes.fill_between(steps, low, high, color=CURVE_COLOR, alpha=0.2, linewidth=0)
    axes.plot(steps, means, color=CURVE_COLOR, linewidth=1.8, marker="o", markersize=3)
    if means:
        axes.plot(steps[-1], means[-1], "o", color=CURVE_COLOR, markersize=6)
        labels.append(_label(axes, f"learned {means[-1]:.1f}", means[-1], color=CURVE_COLOR, fontweight="bold"))
    title = f"{result.get('algorithm', '')} on {result.get('environment', '')}"
    # Lines break at spaces, of which the options in an environment's name have none.
    lines_of_title = textwrap.fill(title.replace("&", "& "), TITLE_CHARACTERS).replace("& ", "&")
    axes.set_title(lines_of_title, loc="left", color=TEXT_COLOR)
    if clone is not None and random is not None:
        unit += f"  (random policy: {random:.1f})"
    axes.set_xlabel(unit, color=TEXT_COLOR)
    axes.set_ylabel("true return per agent and episode", color=TEXT_COLOR)
    axes.margins(x=0.02, y=0.1)
    dress_steps(axes)
    _keep_apart(labels, axes)
    return figure


def dress_steps(axes: Axes) -> None:
    """What curves over environment steps have in common: 60k instead of 60000, and lines across to read heights by."""
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Figure, path: Path) -> None:
    """As a PNG file, of which nobody ever sees a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    temporary.rename(path)


def _label(axes: Axes, text: str, value: float, **look: Any) -> Annotation:
    """Beside the axes, at the height of a return."""
    at = (1, value)
    return axes.annotate(
        text,
        at,
        (LABEL_POINTS, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="center",
        fontsize=9,
        **look,
    )


def _keep_apart(labels: Sequence[Annotation], axes: Axes) -> None:
    """Move labels up, and those that then stand above the axes down again, until none lies on another."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    # Texts have no size before they are laid out.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is moved now shall not move the axes
    labels = sorted(labels, key=lambda label: label.xy[1])
    boxes = [label.get_window_extent() for label in labels]
    floor, bottoms = -math.inf, []
    for box in boxes:
        bottoms.append(max(box.y0, floor))
        floor = bottoms[-1] + box.height + GAP_PIXELS
    ceiling = axes.get_window_extent().y1
    for label, box, bottom in reversed(list(zip(labels, boxes, bottoms, strict=True))):
        lower = min(bottom, ceiling - box.height)
        ceiling = lower - GAP_PIXELS
        label.xyann = (LABEL_POINTS, (lower - box.y0) * POINTS_PER_INCH / figure.dpi)

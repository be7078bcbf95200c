"""The learning curve as a picture."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

CURVE_COLOR, EXPERT_COLOR, RANDOM_COLOR, TEXT_COLOR = "#1f5fa8", "#2e8b57", "#9a9a9a", "#333333"
CLONE_COLOR = "#b5651d"
TITLE_CHARACTERS = 68
"""In a line: an environment's name, with all its options, may be longer than the picture is wide."""


def draw_curve(rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any], path: Path) -> None:
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
    errors = [float(row["return_stderr"]) for row in rows]
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    clone, random = result.get("clone_return"), result.get("random_return")
    references = [
        ("expert, as demonstrated" if result.get("changes") else "expert", result.get("expert_return"), EXPERT_COLOR),
        ("clone", clone, CLONE_COLOR),
        ("random", None if clone is not None else random, RANDOM_COLOR),
    ]
    for name, value, color in references:
        if value is not None:
            _draw_reference(axes, f"{name} {value:.1f}", value, color)
    low = [mean - error for mean, error in zip(means, errors, strict=True)]
    high = [mean + error for mean, error in zip(means, errors, strict=True)]
    axes.fill_between(steps, low, high, color=CURVE_COLOR, alpha=0.2, linewidth=0)
    axes.plot(steps, means, color=CURVE_COLOR, linewidth=1.8, marker="o", markersize=3)
    if means:
        lines = [value for _, value, _ in references if value is not None]
        below = _is_crowded_above(means[-1], [*lines, *means])
        axes.plot(steps[-1], means[-1], "o", color=CURVE_COLOR, markersize=6)
        axes.annotate(
            f"{means[-1]:.1f}",
            (steps[-1], means[-1]),
            (-6, -8 if below else 8),
            textcoords="offset points",
            ha="right",
            va="top" if below else "bottom",
            color=CURVE_COLOR,
            fontsize=10,
            fontweight="bold",
        )
    title = f"{result.get('algorithm', '')} on {result.get('environment', '')}"
    lines_of_title = textwrap.fill(title.replace("&", "& "), TITLE_CHARACTERS).replace("& ", "&")
    axes.set_title(lines_of_title, loc="left", color=TEXT_COLOR)
    if clone is not None and random is not None:
        unit += f"  (random policy: {random:.1f})"
    axes.set_xlabel(unit, color=TEXT_COLOR)
    axes.set_ylabel("true return per agent and episode", color=TEXT_COLOR)
    axes.margins(x=0.02, y=0.1)
    dress_steps(axes)
    save(figure, path)


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


def _is_crowded_above(value: float, others: Sequence[float]) -> bool:
    """Whether a label above `value` would meet one of the lines, and one below it would not so soon."""
    above = min((other - value for other in others if other > value), default=math.inf)
    below = min((value - other for other in others if other < value), default=math.inf)
    room = 0.15 * (max([value, *others]) - min([value, *others]))
    return above < room and below > above


def _draw_reference(axes: Axes, label: str, value: float, color: str) -> None:
    """A dashed line at a return, named at its right end."""
    axes.axhline(value, color=color, linestyle=(0, (5, 3)), linewidth=1.2)
    axes.annotate(
        label,
        (1, value),
        (-4, 4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=color,
        fontsize=9,
    )

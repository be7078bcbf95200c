"""The learning curves of groups of runs in one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.figure import Figure

from bm3il.launch.studies.compared import UNITS, Group, Grouping
from bm3il.launch.studies.statistics import (
    CURVE_REPETITIONS,
    LEVEL,
    interquartile_mean,
    interquartile_mean_interval,
    on_common_steps,
)
from bm3il.launch.studies.trial import AS_TRAINED
from bm3il.learner.picture import dress_steps, save

COLOURS = ("#1f5fa8", "#b5651d", "#2e8b57", "#a83279", "#7a7a00", "#5b4b9a", "#00869a", "#c0392b")
STYLES = ("-", "--", ":", "-.")
"""One after the other when the colours have run out."""
DOTS_PER_INCH = 150


def draw_curves(grouping: Grouping, score: str, path: Path) -> bool:
    """Interquartile means over the runs of each group against environment steps, with bootstrapped bands; a group that
    plays none, of clones, is a line at what it ends with. False if no run has a curve."""
    curves = [band(group, score) for group in grouping.groups]
    if not any(curves):
        return False
    figure = Figure(figsize=(8, 4.5), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    for number, (group, curve) in enumerate(zip(grouping.groups, curves, strict=True)):
        colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
        look: dict[str, Any] = {"color": colour, "linestyle": style, "label": group.name}
        if curve is None:
            ends = np.concatenate([*group.scores(AS_TRAINED, score).values(), np.empty(0)])
            if len(ends):
                axes.axhline(float(interquartile_mean(ends)), linewidth=1.2, alpha=0.8, **look)
            continue
        steps, middle, low, high = curve
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(steps, middle, linewidth=1.8, **look)
    axes.set(xlabel="joint environment steps", ylabel=UNITS[score])
    axes.set_title(f"interquartile mean over runs, {LEVEL:.0%} bootstrap intervals", loc="left", fontsize=10)
    axes.legend(title=", ".join(grouping.keys), frameon=False, fontsize=8, title_fontsize=8)
    dress_steps(axes)
    save(figure, path)
    return True


def band(group: Group, score: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Steps [P], interquartile mean, and both ends of its interval; None of runs that play no steps."""
    known = [[_known(run.curve["env_steps"], run.curve[score]) for run in runs] for runs in group.strata.values()]
    played = [[curve for curve in of_task if len(curve[0]) > 1 and curve[0][-1] > curve[0][0]] for of_task in known]
    sizes = [len(of_task) for of_task in played if of_task]
    if not sizes:
        return None
    steps, scores = on_common_steps([curve for of_task in played for curve in of_task])
    strata = np.split(scores, np.cumsum(sizes)[:-1])
    return steps, interquartile_mean(scores), *interquartile_mean_interval(strata, CURVE_REPETITIONS)


def _known(steps: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    there = ~np.isnan(steps + scores)
    return steps[there], scores[there]

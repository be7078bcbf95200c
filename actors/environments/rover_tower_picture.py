"""A game of Rover Tower as a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from bm3il.actors.environments.drawing import pixels

EDGE = 1.5
"""Of what is shown; rovers that drove farther are shown there, hollow."""
INCHES, DOTS_PER_INCH = 4.0, 100
ARROW = 0.3
"""Length of a velocity of 1."""
TOWERS_Y, FIRST_TOWER_X = 1.75, -0.9
SILENT = "–"


def draw(
    positions: np.ndarray,
    velocities: np.ndarray,
    goals: np.ndarray,
    towers: Sequence[int],
    symbols: Sequence[str],
    radius: float,
) -> np.ndarray:
    """[H, W, 3] uint8: pairs by colour, rovers as discs with their velocities, goals as stars in the circles where they
    count as reached, and above them the towers, each with the symbol that its rover hears. All begin in the square.

    positions, velocities, goals: [P, 2] of the rovers.   towers: [P] the tower of each.   symbols: what each hears.
    """
    figure = Figure(figsize=(INCHES, INCHES * 1.1), dpi=DOTS_PER_INCH)
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.96))
    axes.add_patch(Rectangle((-1, -1), 2, 2, fill=False, edgecolor="#dddddd"))
    axes.text(-EDGE, TOWERS_Y, "towers say", color="#777777", va="center", fontsize=8)
    colours = colormaps["tab10"](np.arange(len(positions)) % 10)
    shown = positions.clip(-EDGE, EDGE)
    for colour, place, way, goal, tower, symbol, there in zip(
        colours, shown, velocities, goals, towers, symbols, (shown == positions).all(axis=1), strict=True
    ):
        axes.plot(*zip(place, goal, strict=True), color=colour, linestyle=":", linewidth=1)
        axes.add_patch(Circle(tuple(goal), radius, facecolor=(*colour[:3], 0.08), edgecolor=(*colour[:3], 0.5)))
        axes.plot(*goal, "*", color=colour, markersize=13, markeredgecolor="white")
        axes.annotate(
            "", place + ARROW * way, place, arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 1.6}
        )
        face = colour if there else "white"
        axes.plot(*place, "o", color=face, markeredgecolor=colour if not there else "white", markersize=10)
        x = FIRST_TOWER_X + (tower + 0.5) * (EDGE - FIRST_TOWER_X) / len(positions)
        axes.text(
            x,
            TOWERS_Y,
            symbol,
            color="white",
            ha="center",
            va="center",
            fontsize=10,
            fontweight="bold",
            bbox={"boxstyle": "square,pad=0.35", "facecolor": colour, "edgecolor": "none"},
        )
    axes.set(xlim=(-EDGE - 0.1, EDGE + 0.1), ylim=(-EDGE - 0.1, TOWERS_Y + 0.2), aspect="equal")
    axes.set_axis_off()
    return pixels(figure)

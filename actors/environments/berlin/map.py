"""Maps of scenarios: roads, facilities, and what happens on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps, patheffects
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from bm3il.actors.environments.berlin.scenario import Scenario
from bm3il.actors.environments.drawing import pixels

OFFSET = 0.007
"""Of the map's width: half the distance between the two directions of a road."""
HOME_COLOUR, WORK_COLOUR = "#0072B2", "#D55E00"
COLOURS = "viridis_r"
SOMEBODY, FULL, EMPTY_COLOUR = 1e-6, 4.0, "#dddddd"
"""Where the colours of a moment begin and end: nobody is on a grey road, and one with four times the agents that it
holds at free speed is as dark as can be."""


def draw_map(
    axes: Any,
    scenario: Scenario,
    road_values: np.ndarray | None = None,
    facility_counts: np.ndarray | None = None,
    limits: tuple[float, float] | None = None,
    names: bool = True,
    closed: Sequence[int] = (),
) -> LineCollection:
    """Draw a scenario into matplotlib axes; returns the roads, for a colour bar or to be coloured anew.

    Traffic keeps to the right: each direction is a line of its own, as wide as its capacity says.
    road_values: [R] what colours the roads, within `limits`; grey without.   facility_counts: [F] agents there, written
    beside the facilities.   names: whether facilities' names are written.   closed: roads that are drawn dotted.
    """
    # Epsilons here and below: nothing keeps junctions of an imported network from lying at one place.
    xy, width = scenario.junction_xy, max(float(np.ptp(scenario.junction_xy, axis=0).max()), 1e-9)
    ends = np.stack([xy[scenario.tail], xy[scenario.head]], axis=1)
    along = ends[:, 1] - ends[:, 0]
    along /= np.linalg.norm(along, axis=1, keepdims=True).clip(min=1e-12)
    right = np.stack([along[:, 1], -along[:, 0]], axis=1)
    lines = ends + OFFSET * width * right[:, None]
    hourly = scenario.load_vehicles / scenario.free_flow_minutes
    widths = 1.0 + 4.0 * np.sqrt(hourly / hourly.max())
    styles = [":" if road in closed else "-" for road in range(scenario.num_roads)]
    roads = LineCollection(list(lines), linewidths=widths, linestyles=styles, capstyle="butt", zorder=2)
    if road_values is None:
        roads.set_color("#888888")
    else:
        roads.set_cmap(COLOURS)
        roads.set_norm(Normalize(*(limits or (0, max(float(road_values.max()), 1e-9)))))
        roads.set_array(np.asarray(road_values, float))
    axes.add_collection(roads)
    axes.scatter(*xy.T, s=14, color="white", edgecolor="#444444", linewidth=0.8, zorder=3)
    _draw_facilities(axes, scenario, facility_counts, names)
    axes.set_aspect("equal")
    axes.margins(0.08)
    axes.autoscale_view()
    axes.set_axis_off()
    return roads


def _draw_facilities(axes: Any, scenario: Scenario, counts: np.ndarray | None, names: bool) -> None:
    xy = scenario.junction_xy[scenario.facility_junction]
    for kind, colour, marker in (("home", HOME_COLOUR, "s"), ("work", WORK_COLOUR, "o")):
        of_kind = np.array([k == kind for k in scenario.kinds])
        axes.scatter(*xy[of_kind].T, s=70, color=colour, marker=marker, edgecolor="white", zorder=4, label=kind)
    for number, place in enumerate(xy):
        parts = [scenario.facility_names[number]] if names else []
        parts += [] if counts is None else [f"{counts[number]:.0f}"]
        if parts:
            colour = HOME_COLOUR if scenario.kinds[number] == "home" else WORK_COLOUR
            label = axes.annotate(
                ": ".join(parts),
                place,
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=colour,
            )
            label.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])
            label.set_zorder(5)


def draw_now(
    scenario: Scenario, loads: np.ndarray, facility_counts: np.ndarray, closed: Sequence[int], minute: float
) -> np.ndarray:
    """A moment of a day, [H, W, 3] uint8.

    loads: [R] agents on each road, as a part of what it holds at free speed.   minute: after midnight.
    """
    figure = Figure(figsize=(5.4, 4.4), dpi=100)
    axes = figure.add_axes((0.01, 0.01, 0.83, 0.93))
    roads = draw_map(axes, scenario, loads, facility_counts, (SOMEBODY, FULL), names=False, closed=closed)
    roads.set_cmap(colormaps[COLOURS].with_extremes(under=EMPTY_COLOUR))
    bar = figure.colorbar(roads, cax=figure.add_axes((0.85, 0.2, 0.02, 0.55)), extend="max", ticks=range(int(FULL) + 1))
    bar.set_label("agents on the road / agents that it holds at free speed", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    axes.legend(loc="lower left", frameon=False, fontsize=8)
    figure.suptitle(f"{int(minute) // 60:02d}:{int(minute) % 60:02d}", fontsize=12)
    return pixels(figure)


def save_map(scenario: Scenario, path: Path) -> None:
    """The scenario's map with what its roads hold, as a picture file."""
    matplotlib.use("Agg")
    figure = Figure(figsize=(8, 7.5), layout="constrained")
    axes = figure.add_subplot()
    roads = draw_map(axes, scenario, scenario.load_agents, names=scenario.num_facilities <= 20)
    figure.colorbar(roads, ax=axes, shrink=0.6, label="agents that a road holds at free speed")
    axes.legend(loc="lower left", frameon=False)
    axes.set_title(f"{scenario.name}: {scenario.num_roads} roads, {scenario.num_facilities} facilities")
    figure.savefig(path, dpi=110)

"""What people see of `bm3il whatif`: tables, and for Berlin the map of what changes on the roads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import patheffects
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bm3il.actors.environments.berlin.environment import Berlin
from bm3il.actors.environments.berlin.map import draw_map
from bm3il.actors.environments.berlin.scenario import Scenario
from bm3il.launch.whatif.figures import Figures

NAMES = {
    "random": "random",
    "run": "run as it is",
    "clone": "clone as it is",
    "imitator": "imitator",
    "expert": "expert, re-planned",
}
TYPE_COLUMNS = (("clone", ""), ("imitator", ""), ("gain", "+"), ("expert", ""))
"""Who, and the sign of numbers above 0."""
NOTHING = "–"
SHOWN_ROADS = 14
MOST_NAMED = 20
"""Facilities; the names of more would hide the map."""
MIN_LIMIT = 0.01
"""Of the colours, in agents: less than this is no change."""
CHANGE_COLOURS = "coolwarm"
POINTS = {
    "clone": ("clone", "#999999", "D"),
    "imitator": ("clone", "#1f5fa8", "o"),
    "expert": ("expert", "#2e8b57", "s"),
}
"""Whose loads are shown → whose they were before (the imitator was the clone), colour, marker."""
DOTS_PER_INCH = 100
ONE_SEED = "One seed: how far another would be from it is not known, so there is no interval over seeds."


@dataclass(frozen=True)
class Sheet:
    """A table as text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def sheets(report: Figures) -> list[Sheet]:
    """The returns of all agents, and of each type, from what `whatif.json` holds."""
    before, after, gain = report["before_returns"], report["returns"], report["imitator_minus_clone"]
    rows = [(label, _mean(before.get(name)), *_cells(after.get(name))) for name, label in NAMES.items()]
    rows.append(("imitator − clone", NOTHING, *_cells(gain, "+")))
    found = after | {"gain": gain}
    of_types = [
        (kind, *(_mean(found[name]["types"][kind] if name in found else None, sign) for name, sign in TYPE_COLUMNS))
        for kind in gain["types"]
    ]
    interval = f"± half of the {report['level']:.0%} interval"
    return [
        Sheet(f"{report['unit']}, {interval}", ("", "before", "after", "of", "normalised"), tuple(rows)),
        Sheet("of each type, after", ("type", "clone", "imitator", "imitator − clone", "expert"), tuple(of_types)),
    ]


def print_tables(report: Figures, console: Console) -> None:
    """To the terminal."""
    for sheet in sheets(report):
        table = Table(title=sheet.title, title_justify="left")
        for number, name in enumerate(sheet.header):
            table.add_column(name, justify="right" if number else "left", no_wrap=not number)
        for row in sheet.rows:
            table.add_row(*map(Text, row))  # no markup: a type may be called [bus]
        console.print(table)
    if len(report["seeds"]) == 1:
        console.print(ONE_SEED)


def markdown(report: Figures) -> str:
    """The text of `whatif.md`."""
    lines = [
        f"# {report['change']}",
        "",
        f"What `{report['run']}` says of it: {report['algorithm']} from the clone, {report['steps']:,} steps in the "
        f"changed world for each of the seeds {', '.join(map(str, report['seeds']))}, compared on "
        f"{report['episodes']:,} fresh episodes. Demonstrated was `{report['before']}`.",
    ]
    for sheet in sheets(report):
        rule = "|".join("---:" if number else "---" for number in range(len(sheet.header)))
        body = [" | ".join(row) for row in (sheet.header, *sheet.rows)]
        lines += ["", f"{sheet.title}:", "", f"| {body[0]} |", f"|{rule}|", *(f"| {row} |" for row in body[1:])]
    if len(report["seeds"]) == 1:
        lines += ["", ONE_SEED]
    if "loads" in report:
        lines += ["", "![what changes on the roads](whatif.png)"]
    return "\n".join(lines) + "\n"


def _cells(figures: Figures | None, sign: str = "") -> tuple[str, str, str]:
    if figures is None:
        return (NOTHING,) * 3
    normalized = figures["normalized"]
    return _mean(figures, sign), figures["over"], NOTHING if normalized is None else f"{normalized:{sign}.3f}"


def _mean(figures: Figures | None, sign: str = "") -> str:
    if figures is None:
        return NOTHING
    text, ends = f"{figures['mean']:{sign}.1f}", figures["interval"]
    return f"{text} ± {(ends[1] - ends[0]) / 2:.1f}" if ends else text


def draw_changes(berlin: Berlin, report: Figures, path: Path) -> None:
    """What changes on the roads in the hours of the rush: the imitator's map beside the expert's, and below them the
    roads where most changes, closed ones left out, with the intervals of `whatif.json`."""
    loads, scenario = report["loads"], berlin.scenario
    closed, change = loads["closed"], {name: _load_change(loads, name) for name in ("imitator", "expert")}
    largest = np.abs(np.stack(list(change.values()))).max(axis=0)
    still_open = np.setdiff1d(np.arange(scenario.num_roads), closed)
    # Stable, so that roads with equal changes are in the same order on every machine.
    shown = still_open[np.argsort(-largest[still_open], kind="stable")][:SHOWN_ROADS]
    limit = max(float(largest.max()), MIN_LIMIT)
    figure = Figure(figsize=(13, 10.5), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(1.45, 1))
    above, below = (figure.add_subfigure(grid[row]) for row in (0, 1))
    maps = above.subplots(1, 2)
    names = scenario.num_facilities <= MOST_NAMED
    for axes, (name, values) in zip(maps, change.items(), strict=True):
        roads = draw_map(axes, scenario, values, limits=(-limit, limit), names=names, closed=closed)
        roads.set_cmap(CHANGE_COLOURS)
        roads.set_linestyle(["--" if road in closed else "-" for road in range(scenario.num_roads)])
        segments = roads.get_segments()
        for road in (*shown, *closed):
            _write_number(axes, int(road), segments[road])
        axes.set_title(NAMES[name])
    dashed = ", dashed roads closed" if closed else ""
    above.suptitle(f"{report['change']}: what changes on the roads, {_spans(loads['rush_hours'])}{dashed}")
    above.colorbar(roads, ax=maps, shrink=0.85, label=f"after − before, {_unit(loads)}")
    _draw_points(below.subplots(), scenario, loads, shown)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _load_change(loads: Figures, name: str) -> np.ndarray:
    """[R] mean load after the change less that before it, in the hours of the rush."""
    return np.array(loads["after"][name]["rush"]["mean"]) - np.array(loads["before"][POINTS[name][0]]["rush"])


def _draw_points(axes: Any, scenario: Scenario, loads: Figures, shown: np.ndarray) -> None:
    """The load of each road before and after, with the interval of the mean after."""
    for shift, (name, (source, colour, marker)) in zip((-0.22, 0.0, 0.22), POINTS.items(), strict=True):
        rush = loads["after"][name]["rush"]
        before, after = (np.array(values)[shown] for values in (loads["before"][source]["rush"], rush["mean"]))
        x = np.arange(len(shown)) + shift
        axes.vlines(x, before, after, color=colour, linewidth=1, alpha=0.5)
        axes.plot(x, before, "_", color=colour, markersize=10, markeredgewidth=2)
        if rush["low"] is not None:
            ends = [np.abs(np.array(rush[end])[shown] - after) for end in ("low", "high")]
            axes.errorbar(x, after, ends, fmt="none", ecolor=colour, elinewidth=3, alpha=0.35)
        axes.plot(x, after, marker, color=colour, markersize=6, label=NAMES[name])
    names = scenario.junction_names
    ways = [f"{road}: {names[scenario.tail[road]]}\n→ {names[scenario.head[road]]}" for road in shown]
    axes.set_xticks(np.arange(len(shown)), ways, rotation=45, ha="right", fontsize=8)
    axes.set_ylabel(_unit(loads))
    axes.set_title(
        f"roads where most changes: from the dash (before) to the mark (after, with the {loads['level']:.0%} interval)"
    )
    axes.legend(frameon=False, ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def _write_number(axes: Any, road: int, segment: np.ndarray) -> None:
    """Beside a road, on its right."""
    along = segment[1] - segment[0]
    right = np.array([along[1], -along[0]]) / max(float(np.linalg.norm(along)), 1e-12)
    upper = segment[:, 1].argmax()
    place = segment[upper] + 0.4 * (segment[1 - upper] - segment[upper])  # a facility's name stands above its place
    label = axes.annotate(
        str(road), place, xytext=9 * right, textcoords="offset points", ha="center", va="center", fontsize=8
    )
    label.set_path_effects([patheffects.withStroke(linewidth=2, foreground="white")])
    label.set_zorder(6)


def _unit(loads: Figures) -> str:
    return f"{loads['unit']} (each {loads['vehicles_per_agent']:g} vehicles)"


def _spans(hours: Sequence[int]) -> str:
    """[6, 7, 15] → `06–08 and 15–16 h`."""
    begins = [hour for hour in hours if hour - 1 not in hours]
    ends = [hour + 1 for hour in hours if hour + 1 not in hours]
    return " and ".join(f"{begin:02d}–{end:02d}" for begin, end in zip(begins, ends, strict=True)) + " h"

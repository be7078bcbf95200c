"""Figures and tables of studies, from the rows that these keep: `figures:` in benchmarks/reproduce.yaml describes them.

    - name: figure3                # the picture's file, and the section of the page
      title: …
      study: figure3               # benchmarks/studies/figure3.yaml
      panel: environment           # a setting of its grid: each value has axes of its own
      x: env_steps                 # learning curves; or a setting, values side by side; or nothing: a line each
      beside: [demonstrations]     # settings that go with others, and are not told
      world: own                   # in which runs were judged; default: `as trained`
      baseline: "1"                # the line that others are held against; without one nothing is
      areas: true                  # beside the returns, where no curves are drawn
      labels: {"rover_tower?pairs=2": 4 agents}
      paper: {"berlin?…": berlin_type5.csv}        # of a panel: the authors' curves, if they are there

What the grid varies beside these makes the lines. Statistics are those of `bm3il compare`.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bm3il.launch.studies.compare import LEVELS, areas, better, robust
from bm3il.launch.studies.compared import UNITS, Figures, Group, Result
from bm3il.launch.studies.file import Settings, Study, text_of
from bm3il.launch.studies.picture import COLOURS, DOTS_PER_INCH, STYLES, band
from bm3il.launch.studies.rows import Row, Rows
from bm3il.launch.studies.statistics import LEVEL, first_at, interquartile_mean
from bm3il.launch.studies.trial import AS_TRAINED
from bm3il.learner.picture import dress_steps

STEPS = "env_steps"
SCORE = "normalized_return"
PANEL_INCHES, LEAST_WIDTH_INCHES = (5.2, 3.8), 8.0
LINE_INCHES, AROUND_ROWS_INCHES = 0.26, 0.75  # the title and the axis of a panel of rows
LEAST_SCALE = 0.05
"""Of normalised return, across a panel of rows."""
FAR = 10
"""Times as far from the median as half of the rows are: such a row is told at the edge of its panel."""
PAPER_LOOK = {"BM3IL": "bm3il", "MTMFIL": "mtmfil", "MA-DAAC": "ma-daac", "MA-GAIL": "ma-gail"}
ALGORITHMS = ("bm3il", "mtmfil", "ma-daac", "ma-gail", "bc", "bayesian-ma-daac", "maac (true reward)")
"""Lines that look alike wherever they are drawn."""
EPOCH_STEPS = 1_000
"""Joint steps of an epoch of the authors' curves."""


@dataclass(frozen=True)
class Described:
    """A figure, as the file describes it."""

    name: str
    title: str
    study: str
    panel: str = ""
    x: str = ""
    beside: tuple[str, ...] = ()
    world: str = AS_TRAINED
    baseline: str = ""
    areas: bool = False
    labels: dict[str, str] = field(default_factory=dict)
    paper: dict[str, str] = field(default_factory=dict)

    def word(self, key: str, value: Any) -> str:
        """What stands for a setting's value."""
        text = text_of(value)
        short = text if isinstance(value, str) else f"{key.rpartition('.')[2].replace('_', ' ')} {text}"
        return self.labels.get(text, self.labels.get(f"{key}={text}", short))

    def line(self, settings: Settings) -> str:
        """The line that a run belongs to, by what the grid says of it."""
        told = {self.panel, self.x, *self.beside}
        words = [self.word(key, value) for key, value in settings.items() if key not in told]
        return ", ".join(words) or self.labels.get("", "as above")


Lines = dict[str, dict[str, list[Row]]]
"""Runs by line and x."""


@dataclass(frozen=True)
class Drawn:
    """A figure's runs, in the order of the study.

    panels: by the panel's word.   missing: how many runs are not there yet.   command: that makes them.
    """

    of: Described
    panels: dict[str, Lines]
    values: dict[str, str]
    missing: int
    command: str

    @classmethod
    def read(cls, of: Described, study: Study, runs_folder: Path, command: str) -> Drawn:
        """Rows of the study's own runs, as it calls them. Raises InputError for a file of results that is broken."""
        assert study.results is not None
        rows, trials = Rows.read(study.results), study.trials(runs_folder)
        pairs = [(trial, rows.find(trial.config)) for trial in trials]
        found = [replace(row, settings=trial.settings) for trial, row in pairs if row]
        panels: dict[str, Lines] = {}
        values = {}
        for row in found:
            value = row.settings.get(of.panel, "")
            panel = of.word(of.panel, value) if value != "" else of.labels.get("", "")
            values[panel] = text_of(value)
            x = of.word(of.x, row.settings[of.x]) if of.x in row.settings else ""
            panels.setdefault(panel, {}).setdefault(of.line(row.settings), {}).setdefault(x, []).append(row)
        return cls(of, panels, values, len(trials) - len(found), command)

    @property
    def rows(self) -> list[Row]:
        return [
            row
            for lines in self.panels.values()
            for points in lines.values()
            for rows in points.values()
            for row in rows
        ]

    @property
    def lines(self) -> list[str]:
        return list(dict.fromkeys(line for lines in self.panels.values() for line in lines))

    def base(self, panel: str | None) -> str:
        """The line that those of a panel are held against: its first, if the figure's baseline is not on it."""
        lines = self.lines if panel is None else list(self.panels[panel])
        return self.of.baseline if self.of.baseline in lines else lines[0]

    @property
    def is_whole(self) -> bool:
        """Whether all lines are in all panels and places, so that they can be told together."""
        places = [[(line, tuple(points)) for line, points in lines.items()] for lines in self.panels.values()]
        return all([line for line, _ in told] == self.lines and len({x for _, x in told}) == 1 for told in places)

    def group(self, line: str, panel: str | None = None, x: str | None = None) -> Group:
        """The runs of a line, of all panels and x if none is named: then these are tasks."""
        strata = {
            (p, at): [Result.of_row(row) for row in rows]
            for p, lines in self.panels.items()
            for at, rows in lines.get(line, {}).items()
            if panel in (None, p) and x in (None, at)
        }
        return Group((line,), strata)


def draw(drawn: Drawn, folder: Path, paper_folder: Path) -> Path:
    """The picture; its path."""
    of = drawn.of
    papers = {panel: paper_folder / of.paper[value] for panel, value in drawn.values.items() if value in of.paper}
    papers = {panel: path for panel, path in papers.items() if path.exists()}
    figure, grid = _axes(drawn, 2 if papers else 1)
    paint = _curves if of.x == STEPS else _points if of.x else _rows
    looks = _looks(drawn.lines)
    for axes, panel in zip(grid[0], drawn.panels, strict=True):
        paint(axes, drawn, panel, looks)
        axes.set_title(panel, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        if of.x and axes is not grid[0][0]:  # they share its scale
            axes.set_ylabel("")
    for axes, panel in zip(grid[-1], drawn.panels, strict=True) if papers else ():
        _paper(axes, papers.get(panel), looks)
    handles = {text: handle for axes in grid[0] for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    if len(handles) > 1:
        look = {"ncols": 4 if len(grid[0]) == 1 else 8, "frameon": False, "fontsize": 8}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", **look)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{of.name}.png"
    figure.savefig(path)
    return path


def _axes(drawn: Drawn, high: int) -> tuple[Figure, Any]:
    """A figure and its axes, high × panels: side by side, but for panels of rows, whose long names need the width."""
    heights = [len(lines) for lines in drawn.panels.values()]
    if drawn.of.x:
        size = (max(PANEL_INCHES[0] * len(heights), LEAST_WIDTH_INCHES), PANEL_INCHES[1] * high + 0.5)
        figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
        return figure, figure.subplots(high, len(heights), squeeze=False, sharey="row")
    size = (LEAST_WIDTH_INCHES, LINE_INCHES * sum(heights) + AROUND_ROWS_INCHES * len(heights))
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    return figure, figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights).T


def _looks(lines: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and style of each line: of an algorithm the same in all figures, of the others what these leave."""
    own = {line: ALGORITHMS.index(line) for line in lines if line in ALGORITHMS}
    left = (number for number in itertools.count() if number not in own.values())
    numbers = {line: own[line] if line in own else next(left) for line in lines}
    return {
        line: {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number // len(COLOURS) % len(STYLES)]}
        for line, number in numbers.items()
    }


def _curves(axes: Axes, drawn: Drawn, panel: str, looks: dict[str, dict[str, Any]]) -> None:
    for line in drawn.panels[panel]:
        group = drawn.group(line, panel)
        if (curve := band(group, SCORE)) is not None:
            steps, middle, low, high = curve
            axes.fill_between(steps, low, high, color=looks[line]["color"], alpha=0.2, linewidth=0)
            axes.plot(steps, middle, linewidth=1.6, label=line, **looks[line])
        elif scores := group.scores(drawn.of.world, SCORE):
            level = float(interquartile_mean(np.concatenate(list(scores.values()))))
            axes.axhline(level, linewidth=1.2, label=line, **looks[line])
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":", label="expert")
    axes.set(xlabel="joint environment steps", ylabel=UNITS[SCORE])
    dress_steps(axes)


def _points(axes: Axes, drawn: Drawn, panel: str, looks: dict[str, dict[str, Any]]) -> None:
    """Interquartile means and their intervals, the lines that have one x side by side around it."""
    lines = drawn.panels[panel]
    values = list(dict.fromkeys(x for points in lines.values() for x in points))
    places = {}
    for number, x in enumerate(values):
        there = [line for line, points in lines.items() if x in points]
        apart = min(0.12, 0.8 / len(there))
        places |= {(line, x): number + (n - (len(there) - 1) / 2) * apart for n, line in enumerate(there)}
    for line, points in lines.items():
        told = {places[line, x]: robust("", drawn.group(line, panel, x).scores(drawn.of.world, SCORE)) for x in points}
        errorbar(axes, told, looks[line]["color"], line, vertical=True)
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(values)), values, fontsize=8)
    axes.set(ylabel=UNITS[SCORE])
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)


def _rows(axes: Axes, drawn: Drawn, panel: str, looks: dict[str, dict[str, Any]]) -> None:
    """A line for each, from above."""
    lines = list(drawn.panels[panel])
    told = {
        -number: robust("", drawn.group(line, panel).scores(drawn.of.world, SCORE)) for number, line in enumerate(lines)
    }
    far = _far({place: figures[""] for place, figures in told.items() if figures})
    near = {place: figures for place, figures in told.items() if place not in far}
    errorbar(axes, near, COLOURS[0], vertical=False)
    if drawn.of.baseline and (first := near.get(-lines.index(drawn.base(panel)))):
        axes.axvspan(first["_low"], first["_high"], color=COLOURS[0], alpha=0.1, linewidth=0)
    left, right = axes.get_xlim()
    margin = max(0.0, LEAST_SCALE - (right - left)) / 2  # or intervals of nothing would fill the panel
    axes.set_xlim(left - margin, right + margin)
    for place, value in far.items():
        beyond = (
            {"x": 0.01, "s": f"← {value:.3f}"} if value < left else {"x": 0.99, "s": f"{value:.3f} →", "ha": "right"}
        )
        look = {"va": "center", "fontsize": 8, "color": COLOURS[0]}
        axes.text(y=place, transform=axes.get_yaxis_transform(), **beyond, **look)
    name_rows(axes, lines, fontsize=8)
    axes.set_ylim(0.5 - len(lines), 0.5)
    axes.locator_params(axis="x", nbins=5)
    axes.set(xlabel=UNITS[SCORE])


def _far(values: dict[float, float]) -> dict[float, float]:
    """Those so far from the others that on one scale with them the others' differences could not be seen."""
    if not values:
        return {}
    aside = {place: abs(value - np.median(list(values.values()))) for place, value in values.items()}
    most = FAR * max(np.median(list(aside.values())), LEAST_SCALE / 5)
    return {place: value for place, value in values.items() if aside[place] > most}


def name_rows(axes: Axes, names: Sequence[str], fontsize: float) -> None:
    """Of axes whose rows are at 0, -1, -2, …"""
    axes.set_yticks([-number for number in range(len(names))], names, fontsize=fontsize)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)


def errorbar(
    axes: Axes, told: dict[float, Figures], colour: str, label: str = "", *, vertical: bool, name: str = ""
) -> None:
    """Dots and intervals at these places: of each figures, what `robust` calls `name`."""
    told = {place: figures for place, figures in told.items() if figures}
    middle, low, high = (np.array([of[f"{name}{end}"] for of in told.values()]) for end in ("", "_low", "_high"))
    ends = np.nan_to_num(np.array([middle - low, high - middle])).clip(min=0.0)
    at = {"y": middle, "x": list(told), "yerr": ends} if vertical else {"x": middle, "y": list(told), "xerr": ends}
    axes.errorbar(**at, fmt="o", markersize=4, color=colour, label=label, linewidth=1.4)


def _paper(axes: Axes, path: Path | None, looks: dict[str, dict[str, Any]]) -> None:
    """The authors' own curves, on their own scale."""
    if path is None:
        axes.axis("off")
        return
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name, line in PAPER_LOOK.items():
        steps, middle, low, high = (
            np.array([float(row[key] or "nan") for row in rows]) * (EPOCH_STEPS if key == "epoch" else 1)
            for key in ("epoch", *(f"{name}_{part}" for part in ("mean", "low", "high")))
        )
        look = looks.get(line, {"color": "grey"})
        axes.fill_between(steps, low, high, color=look["color"], alpha=0.2, linewidth=0)
        axes.plot(steps, middle, linewidth=1.2, **look)
    axes.set_title("the paper's (its authors' released plot, their environment)", loc="left", fontsize=8)
    axes.set(xlabel="joint environment steps", ylabel="true return per agent and episode")
    dress_steps(axes)


def section(drawn: Drawn, picture: str) -> str:
    """Markdown: picture, caption, tables."""
    of = drawn.of
    parts = [f"## {of.title}\n\n![{of.title}]({picture})\n\n{caption(drawn)}"]
    tables = _of_curves(drawn) if of.x == STEPS else _of_points(drawn)
    return "\n\n".join([*parts, *tables])


def caption(drawn: Drawn) -> str:
    """By what command, commit and seeds, and at what cost."""
    rows = drawn.rows
    commits = ", ".join(dict.fromkeys(f"{row.commit[:7]}{'-dirty' * row.commit.endswith('-dirty')}" for row in rows))
    seeds = sorted({row.seed for row in rows})
    told = f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"
    hours = sum(row.core_seconds or 0.0 for row in rows) / 3600
    whole = f"; {drawn.missing} of {len(rows) + drawn.missing} runs are still to come" if drawn.missing else ""
    everywhere = all(drawn.base(panel) == drawn.base(None) for panel in drawn.panels)
    elsewhere = "" if everywhere else " (in panels without it: than one of their first line)"
    two = " (of two runs: the lesser and the greater)" if len(seeds) == 2 else ""
    held = f"; P: the probability that a run is better than one of *{drawn.base(None)}*{elsewhere}"
    return (
        f"`{drawn.command}`; {len(rows)} runs, commit {commits}, {told}, "
        f"{hours:.1f} core-hours{whole}. {UNITS[SCORE].capitalize()}, interquartile means "
        f"over runs, {LEVEL:.0%} bootstrap intervals{two}{held if drawn.of.baseline else ''}."
    )


def _of_curves(drawn: Drawn) -> Iterable[str]:
    head = ["", "runs", "at the end", "mean ± s.d., as in the paper", "P", "area under the curve", "P of the area"]
    head += [f"to {level}" for level in LEVELS]
    for panel in [*drawn.panels, *([None] if len(drawn.panels) > 1 and drawn.is_whole else [])]:
        body = []
        for line in drawn.lines if panel is None else drawn.panels[panel]:
            group, first = drawn.group(line, panel), drawn.group(drawn.base(panel), panel)
            scores, heights = group.scores(drawn.of.world, SCORE), areas(group, SCORE)
            other = bool(drawn.of.baseline) and group.name != first.name
            ends = np.concatenate([*scores.values(), np.empty(0)])
            told = robust("end", scores) | robust("area", heights)
            if other:
                told |= better("p", scores, first.scores(drawn.of.world, SCORE))
                told |= better("p_area", heights, areas(first, SCORE))
            spread = f"{ends.mean():.3f} ± {ends.std():.3f}" if len(ends) else "–"
            cells = [cell(told, "end"), spread, cell(told, "p", 2), cell(told, "area"), cell(told, "p_area", 2)]
            body.append([line, str(len(ends)), *cells, *(_steps_to(group, level) for level in LEVELS)])
        yield table(
            f"**{panel if panel is not None else 'All together'}**" if len(drawn.panels) > 1 else "", head, body
        )


def _steps_to(group: Group, level: float) -> str:
    """Mean over runs, or how many of them were ever so good."""
    found = [first_at(run.curve[STEPS], run.curve[SCORE], level) for run in group.results]
    played = [run for run in group.results if len(run.curve[STEPS]) and run.curve[STEPS][-1] > 0]
    if not played:
        return "–"
    reached = [steps for steps in found if steps == steps]
    return f"{np.mean(reached) / 1000:.0f} k" if len(reached) == len(found) else f"{len(reached)} of {len(found)} runs"


def _of_points(drawn: Drawn) -> Iterable[str]:
    """A table of the scores, one of areas if they are wanted, and with a baseline one of the probabilities, each with a
    last row of all together."""
    places: list[tuple[str | None, str | None]] = [
        (panel, x)
        for panel, lines in drawn.panels.items()
        for x in dict.fromkeys(x for points in lines.values() for x in points)
    ]
    if len(places) > 1 and drawn.is_whole:
        places.append((None, None))
    world = drawn.of.world

    def score(line: str, panel: str | None, x: str | None) -> str:
        return cell(robust("iqm", drawn.group(line, panel, x).scores(world, SCORE)), "iqm")

    def area(line: str, panel: str | None, x: str | None) -> str:
        return cell(robust("area", areas(drawn.group(line, panel, x), SCORE)), "area")

    def probability(line: str, panel: str | None, x: str | None) -> str:
        if line == (base := drawn.base(panel)):
            return "–"
        ours, theirs = (drawn.group(name, panel, x).scores(world, SCORE) for name in (line, base))
        return cell(better("p", ours, theirs), "p", 2)

    yield _turned("Returns", drawn, places, score)
    if drawn.of.areas:
        yield _turned("Areas under the curves", drawn, places, area)
    if drawn.of.baseline:
        yield _turned("P", drawn, places, probability)


def _turned(
    title: str,
    drawn: Drawn,
    places: Sequence[tuple[str | None, str | None]],
    told: Callable[[str, str | None, str | None], str],
) -> str:
    """Lines by places, whichever are more down the page."""
    names = [", ".join(filter(None, place)) or "all together" for place in places]
    cells = {line: [told(line, *place) for place in places] for line in drawn.lines}
    if len(cells) > len(names):
        return table(f"**{title}**", ["", *names], [[line, *row] for line, row in cells.items()])
    body = [[name, *(row[number] for row in cells.values())] for number, name in enumerate(names)]
    return table(f"**{title}**", ["", *cells], body)


def cell(told: Figures, name: str, digits: int = 3) -> str:
    """A figure and its interval; a dash if it is not known."""
    if name not in told:
        return "–"
    value, low, high = (told[key] for key in (name, f"{name}_low", f"{name}_high"))
    if name.startswith("p") and low != low:  # of two runs nobody knows
        return "–"
    return f"{value:.{digits}f}" + (f" [{low:.{digits}f}, {high:.{digits}f}]" if low == low else "")


def table(title: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]
    return "\n".join([*([title, ""] if title else []), *lines])

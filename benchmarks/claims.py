"""What is claimed, held against the rows of the studies: `claims:` in benchmarks/reproduce.yaml.

    - says: a learned reward beats cloning in changed worlds
      figure: worlds               # whose lines are compared: each of `better` with each of `than`
      better: [bm3il]
      than: [bc]
      by: end                      # returns of the figure's world; or `area`, under the learning curve
      at: [slip 0.05]              # of its panels, or of the values on its horizontal axis; default: all of them

A difference is that between two runs of the same seed on the same task: what seeds share, the clone and the days that
were drawn, cancels out. Of the differences the interquartile mean and its interval are told, of all places together the
mean of theirs; of the runs the probability that one is better than one of the others, as by `bm3il compare`.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from figures import DOTS_PER_INCH, LINE_INCHES, SCORE, STEPS, Drawn, cell, errorbar, name_rows, table
from matplotlib.figure import Figure

from bm3il.launch.studies.compare import better
from bm3il.launch.studies.compared import Figures
from bm3il.launch.studies.picture import COLOURS
from bm3il.launch.studies.rows import Row
from bm3il.launch.studies.statistics import area_under, mean_of_tasks, mean_of_tasks_interval

SHOWN, REVERSE, OPEN = "shown", "the reverse", "not shown"
LOOKS = {SHOWN: COLOURS[2], REVERSE: COLOURS[7], OPEN: "#9a9a9a"}
MEASURES = {"end": "return at the end", "area": "area under the curve"}
EVERYWHERE = "all together"
WIDTH_INCHES, HEAD_INCHES, TITLE_CHARACTERS = 9.0, 0.75, 80

Scores = dict[int, float]
"""By seed."""
Place = tuple[str, str]
"""A panel of the figure, and a value on its horizontal axis."""


@dataclass(frozen=True)
class Claim:
    """A claim, as the file tells it."""

    says: str
    figure: str
    better: tuple[str, ...]
    than: tuple[str, ...]
    by: str = "end"
    at: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Two lines in one place, or in all: their difference, figures as of `better`, and of how many pairs of runs."""

    ours: str
    theirs: str
    where: str
    figures: Figures
    pairs: int

    @property
    def verdict(self) -> str:
        """By the interval of the difference."""
        if self.figures["difference_low"] > 0:
            return SHOWN
        return REVERSE if self.figures["difference_high"] < 0 else OPEN


def compared(claim: Claim, drawn: Drawn) -> list[Comparison]:
    """Every pair of lines in every place that has two runs of both."""
    return [
        comparison
        for ours in claim.better
        for theirs in claim.than
        for comparison in _pair(claim, drawn, ours, theirs)
        if ours != theirs
    ]


def _pair(claim: Claim, drawn: Drawn, ours: str, theirs: str) -> list[Comparison]:
    tasks = {}
    for panel, x in _places(drawn):
        if claim.at and not {panel, x} & set(claim.at):
            continue
        of_ours, of_theirs = (
            _scores(claim, drawn, drawn.panels[panel].get(line, {}).get(x, [])) for line in (ours, theirs)
        )
        if len(seeds := sorted(of_ours.keys() & of_theirs.keys())) > 1:
            sides = (np.array([side[seed] for seed in seeds]) for side in (of_ours, of_theirs))
            tasks[panel, x] = tuple(sides)
    groups = {", ".join(filter(None, place)): [place] for place in tasks}
    if len(tasks) > 1:
        groups[EVERYWHERE] = list(tasks)
    return [_comparison(ours, theirs, where, {p: tasks[p] for p in places}) for where, places in groups.items()]


def _comparison(ours: str, theirs: str, where: str, tasks: dict[Place, tuple[np.ndarray, ...]]) -> Comparison:
    differences = {place: a - b for place, (a, b) in tasks.items()}
    of_ours, of_theirs = ({place: sides[n] for place, sides in tasks.items()} for n in (0, 1))
    strata = list(differences.values())
    low, high = mean_of_tasks_interval(strata)
    told = {"difference": mean_of_tasks(strata), "difference_low": low, "difference_high": high}
    told |= better("p", of_ours, of_theirs)
    return Comparison(ours, theirs, where, told, sum(map(len, strata)))


def _places(drawn: Drawn) -> list[Place]:
    """Of the figure, in its order."""
    found = [(panel, x) for panel, lines in drawn.panels.items() for points in lines.values() for x in points]
    return list(dict.fromkeys(found))


def _scores(claim: Claim, drawn: Drawn, rows: Sequence[Row]) -> Scores:
    """Of the runs of which it is known."""
    scores = {row.seed: _score(claim, drawn, row) for row in rows}
    return {seed: score for seed, score in scores.items() if score == score}


def _score(claim: Claim, drawn: Drawn, row: Row) -> float:
    if claim.by == "area":
        return area_under(*(np.array(row.curve[name], float) for name in (STEPS, SCORE)))
    value = row.evaluations.get(drawn.of.world, {}).get(SCORE)
    return float("nan") if value is None else float(value)


Held = list[tuple[Claim, list[Comparison]]]


def section(held: Held, picture: str) -> str:
    """Markdown: each claim in one sentence, the picture, and a table of all comparisons."""
    sentences = [f"- {sentence(claim, told)}" for claim, told in held]
    head = ["", "", "pairs", "difference", "P", ""]
    tables = [
        table(
            f"**{claim.says}** ({MEASURES[claim.by]}, *{claim.figure}*)",
            head,
            [
                [
                    *(f"{one.ours} − {one.theirs}", one.where, str(one.pairs)),
                    *(cell(one.figures, "difference"), cell(one.figures, "p", 2), one.verdict),
                ]
                for one in told
            ],
        )
        for claim, told in held
    ]
    parts = ["## Claims", "\n".join(sentences), f"![claims]({picture})"]
    how = (
        "A difference is taken between runs with the same seed. The tables show interquartile means of the differences "
        "of normalised returns, or of areas under their curves; for all places together, they show the mean over the "
        "places. The brackets hold 95% bootstrap intervals, which are not corrected for the number of comparisons: of "
        "a hundred, a few miss by chance. P is the probability that a run is better than one of the others. *Shown* "
        "means that the interval of the difference lies above 0, *the reverse* that it lies below 0. The picture shows "
        "the differences over all places together: green is shown, grey is not shown, red is the reverse. *Held back* "
        "means regularised, so that few episodes are not memorised."
    )
    return "\n\n".join([*parts, how, *tables])


def in_all(told: Sequence[Comparison]) -> Sequence[Comparison]:
    """Those of all places together, if there are several."""
    return [one for one in told if one.where == EVERYWHERE] or told


def sentence(claim: Claim, told: Sequence[Comparison]) -> str:
    """What came of a claim."""
    single = [one for one in told if one.where != EVERYWHERE]
    counts = Counter(one.verdict for one in single)
    verdicts = ", ".join(f"{verdict} {counts[verdict]}" for verdict in (SHOWN, OPEN, REVERSE) if counts[verdict])
    ends = "; ".join(f"{one.ours} − {one.theirs} {cell(one.figures, 'difference')}" for one in in_all(told))
    comparisons = "1 comparison" if len(single) == 1 else f"{len(single)} comparisons"
    return f"**{claim.says}**: of {comparisons} {verdicts}. {ends}"


def draw(held: Held, path: Path) -> Path:
    """The differences in all places together with their intervals, a panel for each claim."""
    held = [(claim, in_all(told)) for claim, told in held]
    heights = [HEAD_INCHES + LINE_INCHES * len(told) for _, told in held]
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights) + HEAD_INCHES), dpi=DOTS_PER_INCH, layout="constrained")
    grid = figure.subplots(len(held), 1, squeeze=False, height_ratios=heights)
    for axes, (claim, told) in zip(grid[:, 0], held, strict=True):
        for number, one in enumerate(told):
            errorbar(axes, {-number: one.figures}, LOOKS[one.verdict], vertical=False, name="difference")
        axes.set_ylim(0.5 - len(told), 0.5)
        axes.axvline(0.0, color="black", linewidth=0.8, linestyle=":")
        name_rows(axes, [f"{one.ours} − {one.theirs}" for one in told], fontsize=7)
        axes.set_title(textwrap.fill(claim.says, TITLE_CHARACTERS), loc="left", fontsize=9)
        axes.tick_params(axis="x", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    grid[-1, 0].set_xlabel("difference of normalised returns, or of areas under their curves", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path

"""`bm3il compare RUN_OR_STUDY…`: what the settings in which runs differ have to do with how good they are.

A table of each world on the screen, `compare.csv` with all figures, and `compare.png` with the curves of training.
A score is the normalised return (0 random, 1 expert) where all runs have one, and else the true return per agent and
episode.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bm3il.launch.studies.compared import (
    SCORES,
    UNITS,
    UNREWARDED,
    Figures,
    Group,
    Grouping,
    Result,
    Scores,
    read_results,
)
from bm3il.launch.studies.picture import draw_curves
from bm3il.launch.studies.statistics import (
    LEVEL,
    area_under,
    first_at,
    improvement,
    improvement_interval,
    interquartile_mean,
    interquartile_mean_interval,
)
from bm3il.launch.studies.trial import AS_TRAINED
from bm3il.launch.surroundings import lasting_output, screen
from bm3il.protocol.errors import InputError, unknown_name
from bm3il.protocol.files import write_atomically

LEVELS = (0.5, 0.8, 0.9)
"""Of the normalised return, whose steps are told."""
NOTHING = "–"
DEFAULT_OUTPUT = Path("comparison")
"""Of several folders, in the working folder: it belongs to none of them."""


def main(paths: Sequence[Path], by: str, world: str, baseline: str, output: Path | None) -> int:
    """Compare finished runs, print tables, and write CSV and picture; returns the exit code.

    by: the setting that makes groups; "": all in which the runs differ.   world: the only one; "": all.
    baseline: the group that others are held against; "": the first.
    output: the folder of CSV and picture; None: that of the run or study, if one is given alone.
    Raises InputError for what is neither run nor study, and for names that are not there.
    """
    results, unfinished, twice = read_results(paths)
    left_out = [f"since it is not finished: {folder.name}" for folder in unfinished]
    left_out += [f"since it is given twice: {folder.name}" for folder in twice]
    grouping = Grouping.of(results, by)
    first = _baseline(grouping, baseline)
    worlds = list(dict.fromkeys(name for result in results for name in result.evaluations))
    if world and world not in worlds:
        raise unknown_name("world", world, worlds)
    scores = {name: _score(results, name) for name in ([world] if world else worlds)}
    rows = [figures(group, first, name, score) for name, score in scores.items() for group in grouping.groups]
    if output is None:
        output = paths[0] if len(paths) == 1 and paths[0].is_dir() else DEFAULT_OUTPUT
    with lasting_output():
        _print(grouping, first, rows, left_out)
        for path in _write(grouping, rows, _score(results, AS_TRAINED), output):
            print(path)
    return 0


def _baseline(grouping: Grouping, name: str) -> Group:
    groups = {group.name: group for group in grouping.groups}
    if name and name not in groups:
        raise unknown_name("group", name, groups)
    return groups[name] if name else grouping.groups[0]


def _score(results: Sequence[Result], world: str) -> str:
    """The first of SCORES that all who were judged in a world have."""
    told = [result for result in results if world in result.evaluations]
    known = [score for score in SCORES if not any(math.isnan(result.figure(world, score)) for result in told)]
    return known[0] if known else SCORES[-1]


def figures(group: Group, first: Group, world: str, score: str) -> Figures:
    """Of a group in a world: see the columns of `compare.csv`. NaN is not known; in a world of the study nothing is
    told of the training."""
    scores = group.scores(world, score)
    strata = list(scores.values())
    told: Figures = {"world": world, "group": group.name, "runs": sum(map(len, strata)), "score": score}
    told |= robust("iqm", scores)
    if strata:
        together = np.concatenate(strata)
        told |= {"mean": float(together.mean()), "least": float(together.min()), "most": float(together.max())}
    if group is not first:
        told |= better("improvement", scores, first.scores(world, score))
    for name in ("return_mean", "greedy_return_mean"):
        told[name] = _mean([run.figure(world, name) for run in group.results])
    return told | (_of_training(group, first, score) if world == AS_TRAINED else {})


def robust(name: str, scores: Scores) -> Figures:
    """The interquartile mean of scores, and both ends of its interval; nothing if there are none."""
    if not scores:
        return {}
    strata = list(scores.values())
    low, high = interquartile_mean_interval(strata)
    return {
        name: float(interquartile_mean(np.concatenate(strata))),
        f"{name}_low": float(low),
        f"{name}_high": float(high),
    }


def better(name: str, ours: Scores, theirs: Scores) -> Figures:
    """The probability that a run of ours is better than one of theirs, on the tasks that both know, and its interval;
    nothing if there are none."""
    if not (common := [task for task in ours if task in theirs]):
        return {}
    sides = [ours[task] for task in common], [theirs[task] for task in common]
    low, high = improvement_interval(*sides)
    return {name: improvement(*sides), f"{name}_low": low, f"{name}_high": high}


def areas(group: Group, score: str) -> Scores:
    """The mean heights of the curves of a group's runs."""
    return group.figures_of(lambda run: area_under(run.curve["env_steps"], run.curve[score]))


def _of_training(group: Group, first: Group, score: str) -> Figures:
    """Of the area under the curve as of returns, else means over runs; of a level the number of runs that reached it,
    too."""
    results, heights = group.results, areas(group, score)
    curves = [(run.curve["env_steps"], run.curve["wall_seconds"], run.curve[score]) for run in results]
    told = {"wall_seconds": _mean([run.wall_seconds for run in results]), "area": math.nan} | robust("area", heights)
    if group is not first:
        told |= better("area_improvement", heights, areas(first, score))
    for level in LEVELS if score == SCORES[0] and not math.isnan(told["area"]) else ():
        for name, column in (("steps", 0), ("seconds", 1)):
            # Unknown if one run never got there: the mean of the others would flatter a method that often fails.
            told[f"{name}_to_{level}"] = _mean([first_at(curve[column], curve[2], level) for curve in curves])
        told[f"reached_{level}"] = sum(bool((scores >= level).any()) for _, _, scores in curves)
    return told


def _mean(values: Sequence[float]) -> float:
    """NaN if one of them is."""
    return float(np.mean(values)) if values else math.nan


def _print(grouping: Grouping, first: Group, rows: Sequence[Figures], left_out: Sequence[str]) -> None:
    console = screen()
    lines = [f"left out, {why}" for why in left_out]
    if not grouping.shared:
        lines.append("no task is shared by all groups: their figures are not of the same tasks")
    elif grouping.tasks:
        lines += [
            f"left out, since not all groups have it: the task {task} ({runs} runs)"
            for task, runs in grouping.lacking.items()
        ]
        lines.append(f"on the same tasks, by {', '.join(grouping.tasks)}")
    lines += [f"with these differs {key}: {', '.join(values)}" for key, values in grouping.also.items()]
    against = len(grouping.groups) > 1
    explained = [f"P: that a run is better than one of {first.name}"] if against else []
    if any(not math.isnan(row.get("iqm_low", math.nan)) for row in rows):
        explained.append(f"in brackets: {LEVEL:.0%} intervals")
    for line in [*lines, "; ".join(explained)] if explained else lines:
        console.print(line, markup=False)
    head = ", ".join(grouping.keys) or "group"
    for world in dict.fromkeys(row["world"] for row in rows):
        of_world = [row for row in rows if row["world"] == world]
        _print_scores(console, head, world, of_world, against)
        if all(row.get("least") == row.get("most") == 0.0 for row in of_world):
            console.print(UNREWARDED)
    if learned := [row for row in rows if not math.isnan(row.get("area", math.nan))]:
        _print_areas(console, head, learned, against)
        _print_training(console, head, learned)


def _print_scores(console: Console, head: str, world: str, rows: Sequence[Figures], against: bool) -> None:
    columns = {
        head: [row["group"] for row in rows],
        "runs": [str(row["runs"]) for row in rows],
        "IQM": [_interval(row, "iqm") for row in rows],
        "mean": [_number(row, "mean") for row in rows],
    }
    if against:
        columns["P"] = [_interval(row, "improvement", 2) for row in rows]
    _print_table(console, f"{world}: {UNITS[rows[0]['score']]}", columns)


def _print_areas(console: Console, head: str, rows: Sequence[Figures], against: bool) -> None:
    columns = {head: [row["group"] for row in rows], "IQM": [_interval(row, "area") for row in rows]}
    if against:
        columns["P"] = [_interval(row, "area_improvement", 2) for row in rows]
    _print_table(console, f"area under the curve: {UNITS[rows[0]['score']]}", columns)


def _print_training(console: Console, head: str, rows: Sequence[Figures]) -> None:
    levels = [level for level in LEVELS if f"reached_{level}" in rows[0]]
    columns = {head: [row["group"] for row in rows]}
    columns |= {f"to {level}": [_reached(row, level) for row in rows] for level in levels}
    columns["wall, s"] = [_number(row, "wall_seconds", 0) for row in rows]
    _print_table(console, "on the way: joint environment steps, mean over runs", columns)


def _print_table(console: Console, title: str, columns: Mapping[str, Sequence[str]]) -> None:
    """Below its title, which a table of its own would break to its width."""
    table = Table()
    for number, name in enumerate(columns):
        table.add_column(Text(name), justify="right" if number else "left")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, cells))
    console.print(title, style="italic", markup=False)
    console.print(table)


def _reached(row: Figures, level: float) -> str:
    """Steps, or how many of the runs were ever so good."""
    steps = row[f"steps_to_{level}"]
    return f"{row[f'reached_{level}']} of {row['runs']} runs" if math.isnan(steps) else f"{steps:,.0f}"


def _number(row: Figures, name: str, digits: int = 3) -> str:
    value = row.get(name, math.nan)
    return NOTHING if math.isnan(value) else f"{value:.{digits}f}"


def _interval(row: Figures, name: str, digits: int = 3) -> str:
    value, low, high = (_number(row, key, digits) for key in (name, f"{name}_low", f"{name}_high"))
    return value if low == NOTHING else f"{value} [{low}, {high}]"


def _write(grouping: Grouping, rows: Sequence[Figures], score: str, folder: Path) -> list[Path]:
    """CSV and picture; the paths of those that there are. Raises InputError if they cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create {folder}: {error.strerror}; take another --output") from error
    values = {group.name: dict(zip(grouping.keys, group.values, strict=True)) for group in grouping.groups}
    lines = [{"world": row["world"]} | values[row["group"]] | row for row in rows]
    names = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if value != value else value for name, value in line.items()} for line in lines)
    table, picture = folder / "compare.csv", folder / "compare.png"
    write_atomically(table, text.getvalue())
    return [table, picture] if draw_curves(grouping, score, picture) else [table]

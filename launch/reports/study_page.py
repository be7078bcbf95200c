"""What the page of a study shows, from its `study.json` and the curves of its runs."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from bm3il.launch import run_folder
from bm3il.launch.reports.charts import Chart, Line, Reference, chart, decimals, number
from bm3il.launch.reports.recorded import Columns, read_curve
from bm3il.launch.studies.compared import UNREWARDED
from bm3il.launch.studies.statistics import interquartile_mean, interquartile_mean_interval
from bm3il.protocol.errors import InputError

RUN_PAGE = "report.html"
OF_WORLD = ("environment", "preset", "demonstrations")
"""Settings that change what a return means: their curves are apart."""
SCORES = {"normalized_return": "normalised: 0 random, 1 expert", "return_mean": "per agent and episode"}
MOST_LINES, CURVE_POINTS = 7, 60

Values = tuple[str, ...]
"""Of the settings in which the runs of a study differ: what its groups are made of."""


@dataclass(frozen=True)
class StudyRun:
    """A run of a study. settings: in words, without the seed.   evaluations: figures by world.   link: from the page to
    the run's, or to its folder; "" if it is not below the study."""

    name: str
    settings: Mapping[str, str]
    seed: str
    status: str
    reason: str
    evaluations: Mapping[str, Mapping[str, float | None]]
    folder: Path | None
    link: str


@dataclass(frozen=True)
class Final:
    """What the runs of some settings come to in a world: interquartile mean over them, and its interval (None of a
    single run). left, width: of the interval, and `at`, of the mean, on an axis 0..100 that the world's rows share."""

    group: Values
    runs: int
    mean: float
    low: float | None
    high: float | None
    lowest: float
    highest: float
    at: float
    left: float
    width: float


@dataclass(frozen=True)
class World:
    """The table of a world; `score` says what its figures are."""

    name: str
    score: str
    rows: list[Final]

    @property
    def decimals(self) -> int:
        """Of its figures."""
        return (
            3
            if self.score == SCORES["normalized_return"]
            else decimals(end for row in self.rows for end in (row.lowest, row.highest))
        )


@dataclass(frozen=True)
class StudyPage:
    """All of a page."""

    name: str
    counts: list[tuple[str, int]]
    common: dict[str, str]
    varied: list[str]
    worlds: list[World]
    curves: list[Chart]
    runs: list[StudyRun]
    notes: list[str]

    @property
    def decimals(self) -> int:
        """Of returns."""
        return decimals(of["return_mean"] for run in self.runs for of in run.evaluations.values())

    @property
    def failed(self) -> list[StudyRun]:
        """Runs that did not come to their end, and told why."""
        return [run for run in self.runs if run.status == "failed" or (run.reason and run.status != "finished")]


def study_page(folder: Path, page_folder: Path) -> StudyPage:
    """Read a study's folder. page_folder: where the page will lie, for its links.

    Raises InputError if its `study.json` cannot be understood.
    """
    told = _read(folder / run_folder.STUDY)
    runs = [_run(run, folder, page_folder) for run in told["runs"]]
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    values = {key: {run.settings.get(key, "") for run in runs} for key in keys}
    varied = [key for key in keys if len(values[key]) > 1]
    groups: dict[Values, list[StudyRun]] = {}
    for run in runs:
        groups.setdefault(tuple(run.settings.get(key, "–") for key in varied), []).append(run)
    worlds = list(dict.fromkeys(world for run in runs for world in run.evaluations))
    finished = sum(run.status == "finished" for run in runs)
    returns = [of["return_mean"] for run in runs for of in run.evaluations.values()]
    notes = [f"{len(runs) - finished} of {len(runs)} runs are not finished"] if finished < len(runs) else []
    return StudyPage(
        name=str(told.get("name") or folder.resolve().name),
        counts=list(Counter(run.status for run in runs).items()),
        common={key: next(iter(values[key])) for key in keys if key not in varied},
        varied=varied,
        worlds=[world for name in worlds if (world := _world(name, groups)).rows],
        curves=_curves(groups, varied),
        runs=runs,
        notes=[*notes, *([UNREWARDED] if returns and all(value == 0.0 for value in returns) else [])],
    )


def estimate(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Over runs [runs, …]: the interquartile mean, and both ends of its interval by the percentile bootstrap; NaN of a
    single run."""
    return interquartile_mean(scores), *interquartile_mean_interval([scores])


def _read(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    runs = told.get("runs") if isinstance(told, dict) else None
    if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) and "run" in run for run in runs):
        raise InputError(f"{path} is not the record of a study: expected 'runs', a list of objects that name their run")
    if told.get("version") != 1:
        raise InputError(f"{path} has version {told.get('version')!r}, and this release reads version 1")
    return told


def _run(told: Mapping[str, Any], study: Path, page_folder: Path) -> StudyRun:
    name, settings, worlds = str(told["run"]), told.get("settings"), told.get("evaluations")
    folder = _below(study, name)
    figures = {str(k): v for k, v in worlds.items() if isinstance(v, dict)} if isinstance(worlds, dict) else {}
    return StudyRun(
        name,
        {str(k): _written(v) for k, v in settings.items() if k != "seed"} if isinstance(settings, dict) else {},
        str(told.get("seed", "")),
        str(told.get("status", "")),
        str(told.get("reason") or ""),
        {world: {key: number(values.get(key)) for key in SCORES} for world, values in figures.items()},
        folder,
        "" if folder is None else _link(folder, page_folder),
    )


def _below(study: Path, name: str) -> Path | None:
    """The folder of a run, if it is one inside the study: a name is a claim."""
    try:
        folder = (study / name).resolve()
        return folder if study.resolve() in folder.parents and folder.is_dir() else None
    except (OSError, ValueError):
        return None


def _link(folder: Path, page_folder: Path) -> str:
    target = folder / RUN_PAGE if (folder / RUN_PAGE).is_file() else folder
    address = quote(Path(os.path.relpath(target, page_folder.resolve())).as_posix())
    return f"./{address}" if target is not folder else f"./{address}/"


def _written(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _world(name: str, groups: Mapping[Values, Sequence[StudyRun]]) -> World:
    """Normalised returns, unless a run has a return and no normalised one."""
    told = [run.evaluations[name] for runs in groups.values() for run in runs if name in run.evaluations]
    score = next((s for s in SCORES if all(of[s] is not None for of in told if of["return_mean"] is not None)), "")
    score = score or "return_mean"
    found = {
        group: np.array([value for run in runs if (value := run.evaluations.get(name, {}).get(score)) is not None])
        for group, runs in groups.items()
    }
    found = {group: scores for group, scores in found.items() if len(scores)}
    marks = [0.0, 1.0] if score == "normalized_return" else []  # what the axis says that it is from, and to
    least, most = (of([*marks, *(of(s) for s in found.values())], default=0.0) for of in (min, max))
    span = (most - least) or 1.0
    rows = []
    for group, scores in found.items():
        mean, low, high = (float(part) for part in estimate(scores))
        known = not np.isnan(low)
        ends = (low, high) if known else (mean, mean)
        at, left, right = (100 * (value - least) / span for value in (mean, *ends))
        rows.append(
            Final(
                group,
                len(scores),
                mean,
                low if known else None,
                high if known else None,
                float(scores.min()),
                float(scores.max()),
                at,
                left,
                right - left,
            )
        )
    return World(name, SCORES[score], rows)


def _curves(groups: Mapping[Values, Sequence[StudyRun]], varied: Sequence[str]) -> list[Chart]:
    """A chart of each world that was trained in, a line of each group."""
    apart: dict[str, dict[str, list[Columns]]] = {}
    for values, runs in groups.items():
        curves = [curve for run in runs if run.folder is not None and (curve := read_curve(run.folder)).rows]
        if curves:
            named = list(zip(varied, values, strict=True))
            world = ", ".join(value for key, value in named if key in OF_WORLD)
            method = ", ".join(value for key, value in named if key not in OF_WORLD) or "all runs"
            apart.setdefault(world, {})[method] = curves
    charts = []
    for world, methods in apart.items():
        every = [curve for curves in methods.values() for curve in curves]
        score = next(s for s in SCORES if s == "return_mean" or all(all(v is not None for v in c[s]) for c in every))
        play = {name: curves for name, curves in methods.items() if any(any(curve["env_steps"]) for curve in curves)}
        x, unit = ("env_steps", "joint environment steps") if play else ("iteration", "iterations")
        drawn = play or methods
        lines = [_line(name, curves, x, score, n % MOST_LINES) for n, (name, curves) in enumerate(drawn.items())]
        # Who plays no steps, as a clone, has no way over them: where he ends is held against those who do.
        ends = [_end(name, curves, score) for name, curves in methods.items() if name not in drawn]
        title = f"Return in {world}" if world else "Return"
        charts += [
            chart(title, lines[first : first + MOST_LINES], unit, SCORES[score], ends, wide=True)
            for first in range(0, len(lines), MOST_LINES)
        ]
    return charts


def _end(name: str, curves: Sequence[Columns], score: str) -> Reference:
    last = np.array([curve.all_of(score)[-1] for curve in curves])
    return Reference(f"{name} ({len(last)})", float(estimate(last)[0]), "clone")


def _line(name: str, curves: Sequence[Columns], x: str, score: str, style: int) -> Line:
    """Over the steps that all of its runs have come to: in between their evaluations, lines."""
    known = [(np.array(curve.all_of(x)), np.array(curve.all_of(score))) for curve in curves]
    first, last = max(steps[0] for steps, _ in known), min(steps[-1] for steps, _ in known)
    grid = np.unique(np.concatenate([steps for steps, _ in known] + [np.linspace(first, last, CURVE_POINTS)]))
    grid = grid[(grid >= first) & (grid <= last)]
    if len(grid) > CURVE_POINTS:
        grid = np.linspace(first, last, CURVE_POINTS)
    if not len(grid):  # one has not come to where another began
        known, grid = known[:1], known[0][0]
    mean, low, high = (part.tolist() for part in estimate(np.stack([np.interp(grid, *curve) for curve in known])))
    line = Line(f"{name} ({len(known)})", grid.tolist(), mean, style=style)
    return line if np.isnan(low[0]) else replace(line, low=low, high=high)

"""Runs that are held against each other: read from their folders, and put into groups by the settings that differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bm3il.launch import run_folder
from bm3il.launch.result import curve_rows, present_result, read_result
from bm3il.launch.studies.file import Settings, text_of
from bm3il.launch.studies.pool import finished
from bm3il.launch.studies.rows import CURVE, DEFAULTS, Row, Rows, identity, short
from bm3il.launch.studies.trial import AS_TRAINED, all_evaluations
from bm3il.protocol.errors import InputError, unknown_name

UNITS = {"normalized_return": "normalised return", "return_mean": "true return per agent and episode"}
SCORES = tuple(UNITS)
UNKNOWN = "–"
"""The value of a setting that a run does not have."""
UNREWARDED = (
    "all returns are 0: this world seems to know no true reward; held_out_loss, accuracy_expert and accuracy_agent in "
    "log.jsonl tell how far an imitation is"
)
"""What is said in place of a judgement."""

Figures = dict[str, Any]
Scores = dict[tuple[str, ...], np.ndarray]
"""[runs] by task."""


@dataclass(frozen=True)
class Result:
    """A finished run.

    settings: all of them but the seed, in words, by dotted key.   evaluations: by world.
    curve: of each of CURVE an array [evaluations]; NaN where it is not known.   wall_seconds: of the training.
    """

    folder: Path
    settings: dict[str, str]
    seed: int
    evaluations: dict[str, Figures]
    curve: dict[str, np.ndarray]
    wall_seconds: float

    @classmethod
    def of(cls, folder: Path) -> Result:
        """Raises InputError if this is no run."""
        config = run_folder.read_config(folder)
        result, rows = read_result(folder), curve_rows(folder)
        curve = {name: np.array([_number(row.get(name)) for row in rows], float) for name in CURVE}
        settings, wall_seconds = _in_words(identity(config)), _number(result.get("wall_seconds"))
        return cls(folder, settings, config.seed, all_evaluations(folder), curve, wall_seconds)

    @classmethod
    def of_row(cls, row: Row) -> Result:
        """Of a run that may be gone, by what a file of results keeps."""
        settings = _in_words(DEFAULTS | row.config)  # what was no setting yet was as the default is: see `Row.is_of`
        curve = {name: np.array([_number(value) for value in values], float) for name, values in row.curve.items()}
        return cls(Path(row.run), settings, row.seed, row.evaluations, curve, _number(row.wall_seconds))

    @property
    def fingerprint(self) -> tuple[Any, ...]:
        """Equal for a run and its row, or a copy: settings, seed, and returns in as many digits as rows have."""
        returns = [*self.curve["return_mean"], self.figure(AS_TRAINED, "return_mean")]
        return tuple(sorted(self.settings.items())), self.seed, tuple(map(short, returns))

    def value(self, key: str) -> str:
        """Of a setting, in words."""
        return self.settings.get(key, UNKNOWN)

    def figure(self, world: str, name: str) -> float:
        """Of an evaluation; NaN if it is not known."""
        return _number(self.evaluations.get(world, {}).get(name))


def _in_words(identity: Settings) -> dict[str, str]:
    """The settings that make a method."""
    return {key: text_of(value) for key, value in identity.items() if key != "seed"}


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def read_results(paths: Sequence[Path]) -> tuple[list[Result], list[Path], list[Path]]:
    """Finished runs of these folders of runs and studies, those that are not finished, and those that are there twice.

    Raises InputError for a folder that is neither, and if nothing is finished.
    """
    every = [run for path in paths for run in _runs_of(path)]
    done = [(folder, row) for folder, row in every if row or _stands_finished(folder)]
    if not done:
        raise InputError(f"none of {len(every)} runs is finished (`bm3il list {paths[0]}`)")
    results: dict[Any, Result] = {}
    twice = []
    for folder, row in done:
        result = Result.of_row(row) if row else Result.of(folder)
        if results.setdefault(result.fingerprint, result) is not result:
            twice.append(folder)
    left_out = dict.fromkeys(folder for folder, row in every if (folder, row) not in done)
    return list(results.values()), list(left_out), twice


def _stands_finished(folder: Path) -> bool:
    """Whether it is at its end: one that goes on for more steps has a result that is older than its curve."""
    return finished(folder) and present_result(folder, run_folder.read_config(folder)).get("status") == "finished"


def _runs_of(path: Path) -> list[tuple[Path, Row | None]]:
    """The folders of runs, each with its row if that is all there is of it."""
    if path.is_file():
        return [(path / row.run, row) for row in Rows.read(path).rows]
    if not path.exists():
        raise run_folder.missing(path)
    if (path / run_folder.CONFIG).exists():
        return [(path.resolve(), None)]
    try:
        told = json.loads((path / run_folder.STUDY).read_text(encoding="utf-8"))
        kept, common = Rows.read(Path(told["results"])) if told.get("results") else None, told.get("common", {})
        found: dict[Path, Row | None] = {}
        for run in told["runs"]:
            # The file may be anybody's: a name must not lead out of the study's folder.
            place = (path / Path(run["run"]).name).resolve()
            # By its configuration: rows of another study, or of this one before it was edited, may be called the same.
            found[place] = kept.of(common | run.get("config", {})) if kept and not finished(place) else None
        return list(found.items())
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} is neither the folder of a run nor of a study") from error


@dataclass(frozen=True)
class Group:
    """Runs of one method: they differ by seed, and by the task on which methods are compared.

    values: of the settings that make the method.   strata: the runs by task.
    """

    values: tuple[str, ...]
    strata: dict[tuple[str, ...], list[Result]]

    @property
    def name(self) -> str:
        return ", ".join(self.values) or "all"

    @property
    def results(self) -> list[Result]:
        return [result for of_task in self.strata.values() for result in of_task]

    def scores(self, world: str, figure: str) -> Scores:
        """[runs] of each task where it is known."""
        return self.figures_of(lambda run: run.figure(world, figure))

    def figures_of(self, of: Callable[[Result], float]) -> Scores:
        """[runs] of each task where a figure of a run is known."""
        arrays = {task: np.array([of(run) for run in runs]) for task, runs in self.strata.items()}
        known = {task: scores[~np.isnan(scores)] for task, scores in arrays.items()}
        return {task: scores for task, scores in known.items() if len(scores)}


@dataclass(frozen=True)
class Grouping:
    """Groups of runs, and why they are groups.

    keys: the settings that make a method.   tasks: others that differ beside them.   also: of settings that go with
    these the values, in the order of the runs.   lacking: runs by task that not all groups have; they are left out,
    unless nothing else is there (`shared` is False).
    """

    keys: tuple[str, ...]
    tasks: tuple[str, ...]
    also: dict[str, tuple[str, ...]]
    lacking: dict[str, int]
    shared: bool
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, results: Sequence[Result], by: str = "") -> Grouping:
        """By all settings that differ, or by one: then the others make tasks, on which its values are compared.

        Raises InputError for a setting that does not exist, or in which the runs do not differ.
        """
        # Rows of old may have settings that are none now.
        names = dict.fromkeys(key for result in results for key in result.settings)
        varied = {key: tuple(result.value(key) for result in results) for key in names}
        varied = {key: values for key, values in varied.items() if len(set(values)) > 1}
        by = by.replace("-", "_")
        if by and by not in varied:
            if by not in names:
                raise unknown_name("setting", by, names)
            raise InputError(f"--by {by}: it is {results[0].value(by)} in all of these runs; {_differ(varied)}")
        # What makes no finer parts than those before it goes with them: a batch size that an algorithm brings along.
        parting: list[str] = []
        for key in [by, *varied] if by else varied:
            if key not in parting and _parts(varied, [*parting, key]) > _parts(varied, parting):
                parting.append(key)
        keys = (by,) if by else tuple(parting)
        tasks = tuple(key for key in parting if key not in keys)
        groups: dict[tuple[str, ...], dict[tuple[str, ...], list[Result]]] = {}
        for result in results:
            method, task = (tuple(result.value(key) for key in part) for part in (keys, tasks))
            groups.setdefault(method, {}).setdefault(task, []).append(result)
        every = dict.fromkeys(task for strata in groups.values() for task in strata)
        common = [task for task in every if all(task in strata for strata in groups.values())]
        lacking = {
            ", ".join(task): sum(len(strata.get(task, ())) for strata in groups.values())
            for task in every
            if task not in common
        }
        if common:
            groups = {method: {task: strata[task] for task in common} for method, strata in groups.items()}
        also = {key: tuple(dict.fromkeys(values)) for key, values in varied.items() if key not in parting}
        return cls(keys, tasks, also, lacking, bool(common), tuple(Group(*group) for group in groups.items()))


def _parts(varied: dict[str, tuple[str, ...]], keys: Sequence[str]) -> int:
    return len(set(zip(*(varied[key] for key in keys), strict=True))) if keys else 1


def _differ(varied: dict[str, tuple[str, ...]]) -> str:
    return f"they differ in {', '.join(varied)}" if varied else "they differ in nothing but seeds"

"""`bm3il study FILE`: many runs from one file, as many at once as there is room for; see `file`.

RUNS/NAME/ holds a folder of each run, `study.yaml`, a copy of the file, and `study.json`: of every run its folder, what
distinguishes it, how it stands (`waiting`, `running`, `finished`, `failed` and why, `interrupted`), and its returns in
the worlds, of which `as trained` is the final evaluation of the training. A study whose file names `results` takes what
that holds as done, without a folder, and adds to it what finishes; see `rows`. Then `study.json` tells `results`, and
as that file does the configuration of each run, by which its row is found.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bm3il.launch import run_folder
from bm3il.launch.config import Config
from bm3il.launch.locks import held
from bm3il.launch.outcome import CRASHED, FINISHED, INTERRUPTED
from bm3il.launch.processes.supervisor import StopRequests
from bm3il.launch.run import differences, iterations
from bm3il.launch.studies.board import Board
from bm3il.launch.studies.file import Study, Trial, text_of
from bm3il.launch.studies.pool import LOG, Work, finished, run_all
from bm3il.launch.studies.rows import Row, Rows, identity, shared
from bm3il.launch.studies.trial import all_evaluations, evaluations
from bm3il.launch.surroundings import cores, lasting_output, module_command, screen
from bm3il.launch.topology import processes_of
from bm3il.protocol.errors import InputError
from bm3il.protocol.files import write_atomically

VERSION = 1


def main(file: Path, jobs: int | None, runs_folder: Path, dry_run: bool) -> int:
    """Do the runs of a study that are not done, `jobs` at once (None: as many as the cores have room for), and judge
    what they learned; returns the exit code. What was stopped, or has failed, goes on by the same command.

    Raises InputError before anything starts.
    """
    study = Study.read(file)
    if jobs is not None and jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {jobs}")
    folder = runs_folder / study.name
    check_same(study, folder)
    every = study.trials(folder)
    record, console = Record(study, folder, every), screen(soft_wrap=True)
    if dry_run:
        console.print(table(record.rows()))
        console.print(_estimate(record, jobs or cores()))
        return FINISHED
    threads = max(threads_of(trial.config) for trial in every)
    jobs = min(len(every), jobs or max(1, cores() // threads))
    work = Work(_command, record.is_done, max(trial.config.threads_of("learner") for trial in every))
    stopped = StopRequests()
    with held(folder), stopped.heard(), lasting_output():
        trials = [trial for trial in every if not record.kept(trial)]
        _open(trials, file, folder)
        record.open_results()
        record.write()
        console.print(f"{folder}: {len(every)} runs, {jobs} at once, {threads} threads each", markup=False)
        console.print(_estimate(record, jobs))
        size = {record.place(trial): iterations(trial.config, trial.spec) for trial in trials}
        kinds = {record.place(trial): str(trial.settings) for trial in trials}
        with Board(size, kinds, jobs, console) as board:

            def watch(running: Collection[Path], failed: Mapping[Path, str]) -> None:
                record.write(running, failed)
                board.show(running, failed)

            failed = run_all(list(size), jobs, stopped, watch, work)
    return _conclude(record, failed, stopped, console)


def threads_of(config: Config) -> int:
    """Of all processes of a run together."""
    if config.mode == "serial":
        return config.threads_of("learner")
    return sum(config.threads_of(process.role) for process in processes_of(config))


def check_same(study: Study, folder: Path) -> None:
    """Raise InputError if the folder holds another study, and not this one with fewer values."""
    if not (folder / run_folder.STUDY_FILE).exists():
        return
    if changed := study.differences(Study.read(folder / run_folder.STUDY_FILE)):
        raise InputError(
            f"{study.source} is not the study that {folder} holds: {', '.join(changed)} changed; values of grid, seeds "
            "and worlds can be added, for anything else take another name"
        )


def _open(trials: Sequence[Trial], file: Path, folder: Path) -> None:
    """Make the folders that are not there. Raises InputError if one was begun with other settings."""
    fresh = []
    for trial in trials:
        place = folder / trial.name
        if not place.exists():
            fresh.append(trial)
            continue
        # The folder is the same, but its path may be written otherwise if the command is given elsewhere.
        begun = replace(run_folder.open_existing(place), runs_folder=trial.config.runs_folder)
        if begun != trial.config:
            raise InputError(
                f"{place} was begun with other settings: {differences(begun, trial.config)}; make them what they were, "
                "or take another name for the study"
            )
    # Only now, when no run has objected: a study that is refused has changed nothing.
    write_atomically(folder / run_folder.STUDY_FILE, file.read_text(encoding="utf-8"))
    for trial in fresh:
        run_folder.create(trial.config)


def _estimate(record: Record, jobs: int) -> str:
    """What is left to do, in words."""
    left = sum(not record.is_done(record.place(trial)) for trial in record.trials)
    if not (each := record.study.core_seconds):
        return f"{left} to do"
    core_hours = left * each / 3600
    return f"{left} to do, about {core_hours:.1f} core-hours: {core_hours / jobs:.1f} hours, {jobs} at once"


def _command(place: Path) -> list[str]:
    return module_command("bm3il.launch.studies.trial", str(place))


def _conclude(record: Record, failed: Mapping[Path, str], stopped: StopRequests, console: Console) -> int:
    """Write down and say how it ended."""
    record.write((), failed)
    states = [row["status"] for row in record.rows((), failed)]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    console.print(f"{counts}; {record.folder / run_folder.STUDY}", markup=False)
    for place, why in failed.items():
        print(f"bm3il: {place.name} failed: {why}; log: {place / LOG}", file=sys.stderr)
    if stopped.count:
        console.print("stopped; the same command goes on")
        return INTERRUPTED
    if failed:
        console.print("the same command tries again what failed")
        return CRASHED
    console.print(f"compare with: bm3il compare {record.folder}", markup=False, soft_wrap=True)
    return FINISHED


@dataclass
class Record:
    """What `study.json` holds."""

    study: Study
    folder: Path
    trials: Sequence[Trial]
    _written: tuple[Any, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        self._rows = Rows.read(self.study.results) if self.study.results else None
        self._trials = {self.place(trial): trial for trial in self.trials}

    def kept(self, trial: Trial) -> Row | None:
        """What the file of results holds of a run that was judged in all worlds."""
        row = self._rows.find(trial.config) if self._rows else None
        return row if row and row.has(self.study.worlds, self.study.episodes) else None

    def place(self, trial: Trial) -> Path:
        """The folder of a run."""
        return self.folder / trial.name

    def is_done(self, place: Path) -> bool:
        """Whether the run is trained, and judged in all worlds."""
        return self._is_here(place) or self.kept(self._trials[place]) is not None

    def _is_here(self, place: Path) -> bool:
        return finished(place) and set(self.study.worlds) <= set(evaluations(place))

    def rows(self, running: Collection[Path] = (), failed: Mapping[Path, str] | None = None) -> list[dict[str, Any]]:
        """Of every run, when these have a process and those have failed."""
        return [self._row(trial, running, failed or {}) for trial in self.trials]

    def write(self, running: Collection[Path] = (), failed: Mapping[Path, str] | None = None) -> None:
        """Anew, if it has changed who runs or has failed. Raises InputError if it cannot be written."""
        if (now := (set(running), dict(failed or {}))) == self._written:
            return
        self._keep(running)
        told: dict[str, Any] = {"version": VERSION, "name": self.study.name, "runs": self.rows(running, failed)}
        if self._rows:
            told["results"] = str(self._rows.path.resolve())
            # For whoever looks for their rows: of what the grid says a run can be called otherwise there.
            told["common"], configs = shared([identity(trial.config) for trial in self.trials])
            told["runs"] = [run | {"config": config} for run, config in zip(told["runs"], configs, strict=True)]
        write_atomically(self.folder / run_folder.STUDY, json.dumps(told, indent=1) + "\n")
        self._written = now

    def open_results(self) -> None:
        """Write the file of results as it is. Raises InputError, before any run is trained, if that cannot be."""
        if self._rows:
            self._rows.add([])

    def _keep(self, running: Collection[Path]) -> None:
        """Rows of what has finished here go to the file of results. What has a process is not at its end: it has yet to
        say what it cost."""
        if self._rows is None:
            return
        ended = [trial for place, trial in self._trials.items() if place not in running and self._is_here(place)]
        fresh = [trial for trial in ended if not self.kept(trial)]
        if fresh:
            episodes = self.study.episodes
            self._rows.add([Row.of(self.place(trial), trial.settings, trial.config, episodes) for trial in fresh])

    def _row(self, trial: Trial, running: Collection[Path], failed: Mapping[Path, str]) -> dict[str, Any]:
        place = self.place(trial)
        if place in running:
            state = "running"
        elif place in failed:
            state = "failed"
        elif self.is_done(place):
            state = "finished"
        else:
            state = "interrupted" if (place / LOG).exists() else "waiting"
        known: dict[str, Any] = all_evaluations(place) if finished(place) else {}
        if not known and (row := self.kept(trial)):
            known = row.evaluations
        return {
            "run": trial.name,
            "settings": trial.settings,
            "seed": trial.seed,
            "status": state,
            "reason": failed.get(place, ""),
            "evaluations": known,
        }


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Of the runs: a column for each setting that the grid varies."""
    keys = list(dict.fromkeys(key for row in rows for key in row["settings"]))
    shown = Table("run", *keys, "seed", "status", box=None, padding=(0, 1, 0, 0))
    for row in rows:
        values = (text_of(row["settings"][key]) if key in row["settings"] else "" for key in keys)
        shown.add_row(row["run"], *map(Text, values), str(row["seed"]), row["status"])
    return shown

"""`bm3il status` and `bm3il list`: what the folders of runs tell about them."""

from __future__ import annotations

import json
import math
import re
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bm3il.launch.config import Config
from bm3il.launch.events import read_events
from bm3il.launch.locks import is_running
from bm3il.launch.processes.director import PROCESSES
from bm3il.launch.progress import Progress, duration
from bm3il.launch.result import curve_rows, logged, present_result
from bm3il.launch.run_folder import CONFIG, STUDY, STUDY_FILE, folders_with, read_config
from bm3il.launch.surroundings import screen
from bm3il.protocol.errors import InputError

EVENTS_SHOWN, EVENTS_TOLD = 8, 50
"""To people, and to programs."""
ROUTINE = ("checkpoint", "best", "evaluated")
"""Events that would hide what went wrong, and whose figures are shown besides."""
RATE_SECONDS = 60.0
"""Of the run's clock, over which its speed is measured."""
CLOCK = {"iteration", "env_steps", "wall_seconds"}
STAGE_WIDTH = 20
"""The longest name of a stage of ours; others are cut."""


def print_status(folder: Path, as_json: bool = False) -> int:
    """Print whether a run is running, how far it is, what its processes do. Raises InputError if this is no run."""
    told = describe(folder)
    if as_json:
        print(json.dumps(told, indent=1))
        return 0
    console = screen()
    line = f"{told['run']}: {told['algorithm']} on {told['environment']}, seed {told['seed']}, {told['mode']}"
    console.print(line, markup=False)
    for line in (*_progress(told), *_evaluated(told["evaluation"])):
        console.print(line, markup=False)
    if checkpoint := told["checkpoint"]:
        age = duration(checkpoint["age_seconds"])
        console.print(f"last checkpoint: iteration {checkpoint['iteration']}, {age} ago", markup=False)
    if told["processes"]:
        console.print(_processes(told["processes"]))
    notable = [event for event in told["events"] if event["event"] not in ROUTINE]
    for event in notable[-EVENTS_SHOWN:]:
        line = f"{_local(event['time'])}  {event['process']}: {event['text']}".replace("\n", " ")
        _print_line(console, line)
    if told["result"]:
        if error := told["result"].get("error"):
            console.print(str(error), markup=False, soft_wrap=True)
        Progress().summary(folder, told["result"])
    elif told["state"] != "running":
        console.print(f"without a result; `bm3il resume {folder}` goes on", markup=False, soft_wrap=True)
    return 0


def print_list(runs: Path, as_json: bool = False) -> int:
    """Print the runs and studies of a folder, the newest first. Raises InputError if there is no such folder."""
    if not runs.is_dir():
        raise InputError(f"{runs} is no folder of runs; name one, or start a run")
    rows = sorted(_rows(runs), key=lambda row: str(row["started"]), reverse=True)
    if as_json:
        print(json.dumps(rows, indent=1))
        return 0
    if not rows:
        print(f"no runs and no studies in {runs.resolve()}")
    console = screen()
    for row in rows:
        reached, what = _told_of(row, runs)
        returned = _number(row.get("return_mean"), ".1f")
        console.print(row["run"], markup=False, soft_wrap=True)
        line = f"  {row['state']:<11}  {reached:<14}  {returned:>7}  {_local(row['started']):<11}  {what}"
        _print_line(console, line)
        if row.get("reason"):
            _print_line(console, f"  {row['reason']}")
    return 0


def _told_of(row: Mapping[str, Any], runs: Path) -> tuple[str, str]:
    """How far a run or a study is, and what it is."""
    if "error" in row:
        return "", row["error"]
    if "study" not in row:
        return _of(row, "iteration", "iterations"), f"{row['algorithm']} on {row['environment']}"
    states = row["study"]
    others = [f"{count} {state}" for state, count in states.items() if state not in ("runs", "finished")]
    what = f"{', '.join(['study', *others])}: bm3il list {shlex.quote(str(runs / row['run']))}"
    return f"{states.get('finished', 0)} of {states['runs']} runs", what


def _print_line(console: Console, line: str) -> None:
    """In one line of the terminal."""
    console.print(Text(line), no_wrap=True, overflow="ellipsis", crop=True)


def describe(folder: Path) -> dict[str, Any]:
    """Everything that a run's folder tells, as JSON. Raises InputError if it is not the folder of a run."""
    config = read_config(folder)
    told = _summary(folder, config)
    running = told["state"] == "running"
    return told | {
        "evaluation": _evaluation(folder),
        "checkpoint": _checkpoint(folder),
        "processes": _told_of_processes(folder) if running else {},
        "events": read_events(folder, EVENTS_TOLD),
        "result": present_result(folder, config),
        "config": asdict(config),
    }


def _summary(folder: Path, config: Config) -> dict[str, Any]:
    """What a run is, and how far: the same for one run and for a list of them."""
    running = is_running(folder)  # before its result, which a run writes before it ends
    result, progress = present_result(folder, config), _how_far(folder, config)
    state = "running" if running else str(result.get("status", "killed"))
    if state != "running":
        progress |= {"seconds_left": None}
    evaluation = _evaluation(folder)
    return {
        "run": folder.resolve().name,
        "state": state,
        "algorithm": config.algorithm,
        "environment": config.environment,
        "seed": config.seed,
        "mode": config.mode,
        "started": _started(folder),
        "reason": result.get("error", "") if state == "failed" else "",
        "return_mean": result.get("return_mean", evaluation.get("return_mean")),
        **progress,
    }


def _how_far(folder: Path, config: Config) -> dict[str, Any]:
    """Iterations and joint steps done and wanted, speed over the last minute, and the seconds that are left."""
    lines = [line for line in logged(folder) if line.keys() >= CLOCK]
    if not lines:
        return {"iteration": 0, "iterations": None, "env_steps": 0, "steps": config.steps, "seconds_left": None}
    last = lines[-1]
    iteration, steps = last["iteration"], last["env_steps"]
    # As if each had as many steps, though episodes may end early; where there are none, a clone is made.
    iterations = max(iteration, math.ceil(config.steps * iteration / steps)) if steps else config.cloning.iterations
    first = next(line for line in lines if line["wall_seconds"] >= last["wall_seconds"] - RATE_SECONDS)
    seconds, done = last["wall_seconds"] - first["wall_seconds"], iteration - first["iteration"]
    return {
        "iteration": iteration,
        "iterations": iterations,
        "env_steps": steps,
        "steps": config.steps if steps else None,
        "wall_seconds": last["wall_seconds"],
        "steps_per_second": (steps - first["env_steps"]) / seconds if seconds > 0 else None,
        "seconds_left": (iterations - iteration) * seconds / done if done else None,
    }


def _rows(runs: Path) -> Iterator[dict[str, Any]]:
    for folder in folders_with(runs, (CONFIG, STUDY)):
        try:
            yield _summary(folder, read_config(folder)) if (folder / CONFIG).exists() else _study(folder)
        except (InputError, OSError) as error:
            yield {"run": folder.name, "state": "broken", "started": _started(folder), "error": str(error)}


def _study(folder: Path) -> dict[str, Any]:
    """How many of its runs are in which state; of one that is not at work, none is running any more.

    Raises InputError if its `study.json` cannot be understood.
    """
    try:
        states = Counter(str(run["status"]) for run in json.loads((folder / STUDY).read_text(encoding="utf-8"))["runs"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{folder / STUDY} is not that of a study: {error}") from error
    state = "running"
    if not is_running(folder):
        states += Counter(interrupted=states.pop("running", 0))
        state = next((name for name in ("failed", "interrupted", "waiting") if states[name]), "finished")
    told = {"runs": states.total(), **states}
    return {"run": folder.resolve().name, "state": state, "started": _started(folder), "study": told}


def _started(folder: Path) -> str:
    """When the run's `config.yaml` was written: again only for another budget of steps; of a study, when it was begun
    last."""
    mark = next(folder / name for name in (CONFIG, STUDY_FILE, STUDY) if (folder / name).exists())
    return datetime.fromtimestamp(mark.stat().st_mtime).astimezone().isoformat(timespec="seconds")


def _evaluation(folder: Path) -> dict[str, float | None]:
    """The last row of the curve."""
    rows = curve_rows(folder)
    return {str(name): _float(value) for name, value in rows[-1].items()} if rows else {}


def _float(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except (ValueError, TypeError):
        return None
    return value if math.isfinite(value) else None


def _checkpoint(folder: Path) -> dict[str, Any]:
    """Iteration and age of the newest one."""
    written = [path for path in (folder / "checkpoints").glob("*") if re.fullmatch(r"\d{8,}", path.name)]
    if not written:
        return {}
    newest = max(written, key=lambda path: int(path.name))
    return {"iteration": int(newest.name), "age_seconds": round(max(0.0, time.time() - newest.stat().st_mtime), 1)}


def _told_of_processes(folder: Path) -> dict[str, dict[str, Any]]:
    """Every process as the director heard of it last, with the address of its metrics."""
    try:
        processes = dict(json.loads((folder / PROCESSES).read_text(encoding="utf-8")))
        entries = json.loads((folder / "targets.json").read_text(encoding="utf-8"))
        addresses = {entry["labels"]["process"]: f"http://{entry['targets'][0]}/metrics" for entry in entries}
    except (OSError, ValueError, LookupError, TypeError):  # the run has just begun
        return {}
    newest = processes.get("learner-0", {}).get("policy_version")
    for name, told in processes.items():
        version = told["policy_version"]
        has_lag = name.startswith("actor-") and None not in (version, newest)
        lag = max(0, newest - version) if has_lag else None  # an actor may have been heard later than the learner
        told |= {"lag": lag, "metrics": addresses.get(name)}
    return processes


def _processes(processes: Mapping[str, Mapping[str, Any]]) -> Table:
    """An actor's lag is in iterations of the learner."""
    table = Table(
        "process", "node", "state", "stage", "for", "weights", "lag", "restarts", box=None, padding=(0, 1, 0, 0)
    )
    for name, told in processes.items():
        cells = (
            name,
            _number(told["node"]),
            told["state"],
            told["stage"][:STAGE_WIDTH],
            duration(told["stage_seconds"]),
            _number(told["policy_version"]),
            _number(told["lag"]),
            _number(told["restarts"]),
        )
        table.add_row(*(Text(cell, no_wrap=True) for cell in cells))  # a process names its stage itself: no markup
    return table


def _progress(told: Mapping[str, Any]) -> Iterator[str]:
    """The state and how far it is, and in a second line the steps."""
    left = "" if told["seconds_left"] is None else f", {duration(told['seconds_left'])} left"
    reached = _of(told, "iteration", "iterations")
    begun = "in" if told["checkpoint"] else "before"  # the first checkpoint is that of the start
    yield f"{told['state']}: " + (f"iteration {reached}{left}" if reached else f"{begun} the first iteration")
    if told["env_steps"] and told["steps"]:
        speed = told["steps_per_second"]
        yield f"{told['env_steps']:,} of {told['steps']:,} steps" + (f", {speed:,.0f} steps/s" if speed else "")


def _evaluated(row: Mapping[str, float | None]) -> Iterator[str]:
    if row.get("return_mean") is not None:
        parts = [f"iteration {row['iteration']:.0f}, return {row['return_mean']:.2f}"]
        parts += [f"± {row['return_stderr']:.2f}"] if row.get("return_stderr") is not None else []
        parts += [f"(normalised {row['normalized_return']:.3f})"] if row.get("normalized_return") is not None else []
        yield f"last evaluation: {' '.join(parts)}"


def _of(told: Mapping[str, Any], done: str, wanted: str) -> str:
    return f"{told[done]} of {told[wanted]}" if told.get(wanted) else ""


def _number(value: float | None, form: str = ".0f") -> str:
    return "" if value is None else f"{value:{form}}"


def _local(when: str) -> str:
    """A time for people: theirs, to the second; the day, too, if it is not today."""
    try:
        local = datetime.fromisoformat(when.replace("Z", "+00:00")).astimezone()
    except (ValueError, TypeError, AttributeError):
        return ""
    return local.strftime("%H:%M:%S" if local.date() == datetime.now().date() else "%m-%d %H:%M")

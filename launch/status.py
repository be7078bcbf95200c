"""`bm3il status`: what a run's folder tells about it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.director import PROCESSES
from launch.progress import Progress
from launch.run_folder import is_running, open_existing, read_result


def print_status(folder: Path) -> int:
    """Print whether a run is running, how far it is, and where its metrics are. Raises InputError."""
    config = open_existing(folder)
    console = Console(highlight=False, soft_wrap=True)
    running = is_running(folder)
    console.print(f"{config.algorithm} on {config.environment}, seed {config.seed}", markup=False)
    if running:
        console.print("running")
        console.print(_processes(folder))
    if row := _last_evaluation(folder):
        values = [f"{key} {value}" for key, value in row.items() if value][:6]
        console.print("last evaluation: " + ", ".join(values), markup=False)
    if result := read_result(folder):
        Progress(console).summary(folder, result)
    elif not running:
        console.print(f"stopped without a result; `bm3il resume {folder}` goes on", markup=False)
    return 0


def _processes(folder: Path) -> Table:
    """Every process as the director heard of it last; an actor's lag is in iterations of the learner."""
    table = Table("process", "node", "state", "stage", "for", "weights", "lag", "restarts", "metrics")
    addresses = dict(_targets(folder))
    try:
        processes = dict(json.loads((folder / PROCESSES).read_text()))
    except (OSError, ValueError, TypeError):  # the run has just begun
        processes = {}
    newest = processes.get("learner-0", {}).get("policy_version")
    for name, told in processes.items():
        version = told["policy_version"]
        has_lag = name.startswith("actor-") and None not in (version, newest)
        cells = (
            name,
            "" if told["node"] is None else str(told["node"]),
            told["state"],
            told["stage"],
            f"{told['stage_seconds']:.0f} s",
            "" if version is None else f"{version:.0f}",
            f"{newest - version:.0f}" if has_lag else "",
            str(told["restarts"]),
            f"http://{addresses[name]}/metrics" if name in addresses else "",
        )
        table.add_row(*(Text(cell) for cell in cells))  # a process names its stage itself: no markup
    return table


def _targets(folder: Path) -> list[tuple[str, str]]:
    try:
        entries = json.loads((folder / "targets.json").read_text())
        return [(str(entry["labels"]["process"]), str(entry["targets"][0])) for entry in entries]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def _last_evaluation(folder: Path) -> dict[str, str]:
    try:
        with (folder / "curve.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError:
        return {}
    return rows[-1] if rows else {}

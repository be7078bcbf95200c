"""How well imitation works, and cloning beside it: `python benchmarks/imitation.py rover_tower_8 berlin --jobs 2`.

For every preset (`PRESET`, or `PRESET=FILE` for other demonstrations), number of demonstration episodes, method and
seed: one serial run of `bm3il train`, whose final evaluation (from the demonstrations' own start states, if the preset
says so) gives the normalised return (0 random, 1 expert); `bm3il evaluate` adds fresh starts, drawn and greedy.
Prints a table of means over seeds [smallest, largest], and when the curve first passed 0.5, 0.8 and 0.9. All figures
go to `imitation.json` in the folder of the runs; runs that are there already are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

THRESHOLDS = (0.5, 0.8, 0.9)
ALGORITHMS = ("bc", "ma-gail", "mtmfil", "ma-daac", "bayesian-ma-daac", "bm3il", "maac")
METHODS = {name: ["--algorithm", name] for name in ALGORITHMS} | {
    "bm3il+cloning": ["--algorithm", "bm3il", "--learner.cloning-weight", "2", "--reward.learning-rate", "2e-4"],
}
WITHOUT_DEMONSTRATIONS = ("maac",)


@dataclass(frozen=True)
class Trial:
    """One run."""

    preset: str
    demonstrations: str
    episodes: int
    method: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.preset}-{self.episodes or 'all'}-{self.method}-{self.steps}-seed-{self.seed}"


def run(trial: Trial, folder: Path, episodes: int) -> dict[str, Any]:
    """Train and judge; returns the figures of the run."""
    place = folder / trial.name
    if not (place / "evaluation.json").exists():
        train = [
            *("train", "--mode", "serial", "--preset", trial.preset, "--demonstration-episodes", str(trial.episodes)),
            *(("--demonstrations", trial.demonstrations) if trial.demonstrations else ()),
            *("--seed", str(trial.seed), "--steps", str(trial.steps)),
            *("--run", trial.name, "--runs-folder", str(folder)),
            *METHODS[trial.method],
        ]
        for command in (train, ["evaluate", str(place), "--episodes", str(episodes)]):
            done = subprocess.run(
                [sys.executable, "-m", "bm3il.launch.cli", *command],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise RuntimeError(f"{trial.name}: {done.stderr[-1000:]}")
    rows = {(r["starts"], r["actions"]): r for r in json.loads((place / "evaluation.json").read_text())["rows"]}
    result = json.loads((place / "result.json").read_text())
    with (place / "curve.csv").open(newline="") as file:
        curve = [{k: float(row[k]) for k in CURVE} for row in csv.DictReader(file)]
    return {
        "trial": trial.__dict__,
        "normalized_return": result["normalized_return"],
        "return": result["return_mean"],
        "fresh_return": rows["fresh", "drawn"]["return_mean"],
        "fresh_greedy_return": rows["fresh", "greedy"]["return_mean"],
        "wall_seconds": result["wall_seconds"],
        "policy_sha256": result["policy_sha256"],
        "curve": curve,
        "reached": {str(level): _first(curve, level) for level in THRESHOLDS},
    }


COLUMNS = (("normalized_return", 3), ("return", 1), ("fresh_return", 1), ("fresh_greedy_return", 1))
CURVE = ("env_steps", "wall_seconds", "normalized_return")


def _first(curve: list[dict[str, float]], level: float) -> dict[str, float] | None:
    return next((row for row in curve if row["normalized_return"] >= level), None)


def table(figures: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table: a row per setting, means over seeds."""
    lines = [
        "| preset | episodes | steps | method | normalised | return | fresh | greedy | to 0.5 / 0.8 / 0.9 | wall, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, int, int, str], list[dict[str, Any]]] = {}
    for row in figures:
        trial = row["trial"]
        groups.setdefault((trial["preset"], trial["episodes"], trial["steps"], trial["method"]), []).append(row)
    for (preset, episodes, steps, method), rows in groups.items():
        reached = " / ".join(_reached([row["reached"][str(level)] for row in rows]) for level in THRESHOLDS)
        cells = [
            *(preset, episodes or "all", "–" if method == "bc" else f"{steps:,}", method),
            *(_spread(rows, key, digits) for key, digits in COLUMNS),
            *("–" if method == "bc" else reached, _spread(rows, "wall_seconds", 0)),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _spread(rows: list[dict[str, Any]], key: str, digits: int) -> str:
    values = [row[key] for row in rows]
    return f"{statistics.mean(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def _reached(points: list[dict[str, float] | None]) -> str:
    known = [point for point in points if point is not None]
    if len(known) < len(points):
        return f"{len(known)} of {len(points)} seeds"
    steps, wall = (statistics.mean(p[key] for p in known) for key in ("env_steps", "wall_seconds"))
    return f"{steps / 1000:.0f} k, {wall:.0f} s"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+", help="PRESET or PRESET=FILE")
    parser.add_argument("--episodes", type=int, nargs="+", default=[0, 50, 20, 5], help="0: all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["bc", "bm3il"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--evaluate", type=int, default=2_000, help="fresh episodes of the judgement")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/imitation"))
    given = parser.parse_args(arguments)
    files = dict((*item.split("=", 1), "")[:2] for item in given.presets)
    trials = [
        Trial(preset, file and str(Path(file).resolve()), episodes, method, seed, given.steps)
        for seed, (preset, file), episodes, method in product(given.seeds, files.items(), given.episodes, given.methods)
        if method not in WITHOUT_DEMONSTRATIONS or not episodes
    ]
    given.folder.mkdir(parents=True, exist_ok=True)
    start, figures = time.monotonic(), []
    with ThreadPoolExecutor(given.jobs) as pool:
        for number, row in enumerate(pool.map(lambda trial: run(trial, given.folder, given.evaluate), trials), start=1):
            figures.append(row)
            name, score = trials[number - 1].name, row["normalized_return"]
            print(f"{number}/{len(trials)} {name}: {score:.3f}, {time.monotonic() - start:.0f} s", file=sys.stderr)
    (given.folder / "imitation.json").write_text(json.dumps(figures, indent=1))
    print("\n".join(table(figures)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

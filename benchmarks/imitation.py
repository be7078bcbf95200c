"""How well imitation works, and cloning beside it: `python benchmarks/imitation.py 8=expert_8.safetensors --jobs 2`.

For every number of agents (8 or 4, with a demonstrations file of each), number of demonstration episodes, method and
seed: one serial run of `bm3il train`, judged by `bm3il evaluate --paired` (from the demonstrations' own start states,
where the expert's return is known) and on fresh starts. Prints a table of means over seeds [smallest, largest] of
the normalised return (0 random, 1 expert), and when the curve first passed 0.5, 0.8 and 0.9. All figures go to
`imitation.json` in the folder of the runs.
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
METHODS = {
    "bm3il": ["--algorithm", "bm3il"],
    "bm3il+cloning": ["--algorithm", "bm3il", "--learner.cloning-weight", "2", "--reward.learning-rate", "2e-4"],
    "bc": ["--algorithm", "bc"],
}


@dataclass(frozen=True)
class Trial:
    """One run."""

    agents: str
    demonstrations: str
    episodes: int
    method: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.agents}-agents-{self.episodes or 'all'}-{self.method}-{self.steps}-seed-{self.seed}"


def run(trial: Trial, folder: Path) -> dict[str, Any]:
    """Train and judge; returns the figures of the run."""
    place = folder / trial.name
    if not (place / "evaluation.json").exists():
        train = [
            *("train", "--mode", "serial", "--preset", f"rover_tower_{trial.agents}"),
            *("--demonstrations", trial.demonstrations, "--demonstration-episodes", str(trial.episodes)),
            *("--seed", str(trial.seed), "--steps", str(trial.steps)),
            *("--run", trial.name, "--runs-folder", str(folder)),
            *METHODS[trial.method],
        ]
        for command in (train, ["evaluate", str(place), "--episodes", "2000", "--paired"]):
            done = subprocess.run(
                [sys.executable, "-m", "launch.cli", *command],
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
        "paired": rows["paired", "drawn"]["normalized_return"],
        "paired_greedy": rows["paired", "greedy"]["normalized_return"],
        "paired_return": rows["paired", "drawn"]["return_mean"],
        "fresh_return": rows["fresh", "drawn"]["return_mean"],
        "fresh_greedy_return": rows["fresh", "greedy"]["return_mean"],
        "wall_seconds": result["wall_seconds"],
        "policy_sha256": result["policy_sha256"],
        "curve": curve,
        "reached": {str(level): _first(curve, level) for level in THRESHOLDS},
    }


CURVE = ("env_steps", "wall_seconds", "normalized_return")


def _first(curve: list[dict[str, float]], level: float) -> dict[str, float] | None:
    return next((row for row in curve if row["normalized_return"] >= level), None)


def table(figures: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table: a row per setting, means over seeds."""
    lines = [
        "| agents | episodes | steps | method | paired | paired, greedy | fresh | to 0.5 / 0.8 / 0.9 | wall, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, int, int, str], list[dict[str, Any]]] = {}
    for row in figures:
        trial = row["trial"]
        groups.setdefault((trial["agents"], trial["episodes"], trial["steps"], trial["method"]), []).append(row)
    for (agents, episodes, steps, method), rows in groups.items():
        reached = " / ".join(_reached([row["reached"][str(level)] for row in rows]) for level in THRESHOLDS)
        cells = [
            *(agents, episodes or "all", "–" if method == "bc" else f"{steps:,}", method),
            *(_spread(rows, key, digits) for key, digits in (("paired", 3), ("paired_greedy", 3), ("fresh_return", 1))),
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
    parser.add_argument("demonstrations", nargs="+", help="AGENTS=FILE")
    parser.add_argument("--episodes", type=int, nargs="+", default=[0, 50, 20, 5])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/imitation"))
    given = parser.parse_args(arguments)
    files = dict(item.split("=", 1) for item in given.demonstrations)
    trials = [
        Trial(agents, str(Path(file).resolve()), episodes, method, seed, given.steps)
        for (agents, file), episodes, method, seed in product(files.items(), given.episodes, given.methods, given.seeds)
    ]
    given.folder.mkdir(parents=True, exist_ok=True)
    start, figures = time.monotonic(), []
    with ThreadPoolExecutor(given.jobs) as pool:
        for number, row in enumerate(pool.map(lambda trial: run(trial, given.folder), trials), start=1):
            figures.append(row)
            print(f"{number}/{len(trials)} {row['paired']:.3f} after {time.monotonic() - start:.0f} s", file=sys.stderr)
    (given.folder / "imitation.json").write_text(json.dumps(figures, indent=1))
    print("\n".join(table(figures)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

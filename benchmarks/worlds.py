"""Where a learned reward beats cloning: `python benchmarks/worlds.py --jobs 2`, the table of docs/when.md.

For every world, row and seed one serial run of `bm3il train` with the preset `berlin_closed`, whatever the world is.
The clone that a run starts from is evaluated as its end is; the scripted expert, planned anew in each world, plays
beside them. Prints means over seeds with their 95 % intervals (Student's t), and the difference of every row to the
first, paired over seeds. Runs that are there already are not repeated; all figures go to `worlds.json` beside
them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
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

from scipy import stats

from bm3il.actors.evaluation import evaluate
from bm3il.actors.experts.scripted import expert_for
from bm3il.protocol.registry import make_environment

TOWN = "berlin?scenario=berlin46&types=10&agents=50&sight=near"
TOWER = "rover_tower?pairs=4"
WORLDS = {
    "as demonstrated": TOWN,
    **{change: f"{TOWN}&{change}" for change in ("slip=0.02", "slip=0.05")},
    **{f"closed={roads}": f"{TOWN}&closed={roads}" for roads in ("22", "37", "22,23", "36,37")},
    "demand=1.2": f"{TOWN}&demand=1.2",
    "tight": TOWN.replace("berlin46", "berlin46-tight"),
    **{f"rover_tower_8, {change}": f"{TOWER}&{change}" for change in ("slip=0.1", "slip=0.2")},
}
OF_TOWER = ("--demonstrations", "rover_tower_8", "--actor.agent-identity", "--evaluation.final-episodes", "1000")
ROWS = {
    "bm3il": (),
    "L = 1": ("--reward.particles", "1"),
    "sees everything": ("--reward.sees", "all"),
    "no clone": ("--learner.start", "random"),
    # With the learner's settings of the preset `berlin`, which were found with this update.
    "actor": (
        *("--learner.policy", "actor", "--learner.discount", "0.95", "--learner.final-learning-rate", "0.05"),
        *("--learner.temperature", "0.3", "--learner.final-temperature", "0.1", "--learner.temperature-anneal", "1.0"),
        *("--learner.batch-size", "128", "--learner.policy-learning-rate", "3e-3"),
        *("--learner.critic-learning-rate", "3e-3"),
    ),
    "L = 2": ("--reward.particles", "2"),
    "L = 8": ("--reward.particles", "8"),
    "kernel on tensors": ("--reward.kernel-scope", "tensor"),
    "kernel on networks": ("--reward.kernel-scope", "network"),
    "no kernel": ("--reward.kernel-scope", "none"),
    # Other critics, with one particle: to be held against the row L = 1.
    **{name: ("--algorithm", name) for name in ("ma-gail", "mtmfil", "ma-daac")},
}
SHOWN = ("bm3il", "L = 1", "sees everything", "no clone", "actor")
EXPERT_EPISODES, EXPERT_SEED = 200, 1_000_003
LEVEL = 0.95


@dataclass(frozen=True)
class Trial:
    """One run."""

    world: str
    row: str
    seed: int

    @property
    def name(self) -> str:
        words = f"{self.world} {self.row} {self.seed}"
        return "-".join("".join(c if c.isalnum() or c == "." else " " for c in words).split())


def run(trial: Trial, folder: Path) -> dict[str, Any]:
    """The result of a run, which is trained unless it is there."""
    place = folder / trial.name
    done = json.loads((place / "result.json").read_text()) if (place / "result.json").exists() else {}
    if done.get("status") != "finished":
        shutil.rmtree(place, ignore_errors=True)
        environment = WORLDS[trial.world]
        command = [
            *(sys.executable, "-m", "bm3il.launch.cli", "train", "--preset", "berlin_closed", "--mode", "serial"),
            *("--environment", environment, "--seed", str(trial.seed), "--runs-folder", str(folder)),
            *("--run", trial.name, "--evaluation.interval", "1000", "--learner.checkpoint-interval", "1000"),
            *(OF_TOWER if environment.startswith(TOWER) else ()),
            *ROWS[trial.row],
        ]
        threads = os.environ | {"OMP_NUM_THREADS": "1"}
        ended = subprocess.run(command, env=threads, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise RuntimeError(f"{trial.name}: {ended.stderr[-1000:]}")
        done = json.loads((place / "result.json").read_text())
        shutil.rmtree(place / "checkpoints", ignore_errors=True)  # half a gigabyte each
    return {**trial.__dict__, "return": done["return_mean"], "clone": done["clone_return"]}


def interval(values: Sequence[float], sign: str = "") -> str:
    """The mean, half of its interval, and how many values there are if these are few."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):{sign}.1f}"
    if len(values) == 1:
        return f"{mean} (1 seed)"
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean} ± {half:.1f}"


def table(figures: Sequence[dict[str, Any]], experts: dict[str, float]) -> list[str]:
    """Lines of Markdown: worlds by rows, and below each row its difference to the first one."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for figure in figures:
        found.setdefault((figure["world"], figure["row"]), {})[figure["seed"]] = figure
    rows = [row for row in ROWS if any(key[1] == row for key in found)]
    lines = ["| world | expert | clone | " + " | ".join(rows) + " |", "|---" * (3 + len(rows)) + "|"]
    for world in dict.fromkeys(figure["world"] for figure in figures):
        runs = {row: found.get((world, row), {}) for row in rows}
        clones = {s: r["clone"] for of_row in runs.values() for s, r in of_row.items() if r["clone"] is not None}
        first = {s: r["return"] for s, r in runs[rows[0]].items()}
        gains = [first[s] - clones[s] for s in first if s in clones]
        cells = [world, f"{experts[world]:.1f}", f"{interval(list(clones.values()))} (bm3il {interval(gains, '+')})"]
        for row in rows:
            apart = [r["return"] - first[s] for s, r in runs[row].items() if s in first] if row != rows[0] else []
            beside = f" ({interval(apart, '+')})" if apart else ""
            cells.append(interval([r["return"] for r in runs[row].values()]) + beside)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def expert_return(world: str) -> float:
    """Mean true return of the scripted expert that has planned in this world."""
    environment = WORLDS[world]
    expert = expert_for(make_environment(environment, 1).spec)
    return float(evaluate(environment, expert, EXPERT_EPISODES, EXPERT_SEED).mean())


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(SHOWN))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/worlds"))
    given = parser.parse_args(arguments)
    trials = [Trial(world, row, seed) for seed, world, row in product(given.seeds, given.worlds, given.rows)]
    given.folder.mkdir(parents=True, exist_ok=True)
    start, figures = time.monotonic(), []
    with ThreadPoolExecutor(given.jobs) as pool:
        for number, figure in enumerate(pool.map(lambda trial: run(trial, given.folder), trials), start=1):
            figures.append(figure)
            left = (time.monotonic() - start) * (len(trials) / number - 1)
            print(
                f"{number}/{len(trials)} {trials[number - 1].name}: {figure['return']:.1f}, {left:.0f} s left",
                file=sys.stderr,
            )
    experts = {world: expert_return(world) for world in given.worlds}
    (given.folder / "worlds.json").write_text(json.dumps({"experts": experts, "runs": figures}, indent=1))
    print("\n".join(table(figures, experts)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

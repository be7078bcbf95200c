"""How often the intervals of `bm3il whatif` hold: `python benchmarks/closures.py runs/NAME --jobs 2`.

For every closure of roads (`8,9`): `bm3il whatif RUN` in the run's world without these roads, and whether the mean load
that the re-planned expert makes lies inside the imitator's stated interval: for every road that stays open and every
hour of the rush, and beside it the same of the clone as it is. Prints a table of how often, of how far the means are
from the expert's, and of how wide the intervals are, in agents; all figures go to `closures.json` in RUN/whatif. What
was played already is not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bm3il.launch.config import Config
from bm3il.launch.whatif.whatif import slug
from bm3il.protocol.registry import make_environment

CLOSURES = ("8,9", "14,15", "16,17", "20,21", "24,25", "26,27", "38,39", "40,41", "42,43", "44,45")
WHO = ("clone", "imitator")


def ask(run: Path, world: str, closure: str, seeds: int, steps: int, days: int, jobs: int) -> dict[str, Any]:
    """What `whatif.json` holds of this closure."""
    path = run / "whatif" / slug([f"closed={closure}"]) / "whatif.json"
    if path.exists():
        report = json.loads(path.read_text())
        if (report["seeds"], report["steps"], report["episodes"]) == (list(range(1, seeds + 1)), steps, days):
            return report
    environment = f"{world}{'&' if '?' in world else '?'}closed={closure}"
    size = {"--seeds": seeds, "--steps": steps, "--days": days, "--jobs": jobs}
    words = [word for option, value in size.items() for word in (option, str(value))]
    command = [sys.executable, "-m", "bm3il.launch.cli", "whatif", str(run), "--environment", environment, *words]
    subprocess.run(command, check=True)
    return json.loads(path.read_text())


def judged(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Who → how often the expert is inside, how far the mean is from the expert's, the interval's width, in agents."""
    loads = report["loads"]
    rush = np.isin(loads["hours"], loads["rush_hours"])
    open_roads = np.setdiff1d(np.arange(len(loads["before"]["expert"]["rush"])), loads["closed"])

    def figures(who: str, which: str) -> np.ndarray:
        return np.array(loads["after"][who]["hours"][which], float)[rush][:, open_roads]

    expert = figures("expert", "mean")
    result = {}
    for who in WHO:
        mean, low, high = (figures(who, which) for which in ("mean", "low", "high"))
        result[who] = {
            "inside": float(((low <= expert) & (expert <= high)).mean()),
            "error": float(np.abs(mean - expert).mean()),
            "width": float((high - low).mean()),
            "return": report["returns"][who]["mean"],
            "normalized": report["returns"][who]["normalized"],
        }
    return result


def table(figures: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """In Markdown; the last row is the mean over closures, which all have as many roads and hours."""
    lines = [
        "| closed | of | expert inside | mean error | mean width | return | normalised |",
        "|---|---|---|---|---|---|---|",
    ]
    names = ("inside", "error", "width", "return", "normalized")
    rows = [(closure, who, found[who]) for closure, found in figures.items() for who in WHO]
    for who in WHO:
        rows.append(
            ("all", who, {name: float(np.mean([found[who][name] for found in figures.values()])) for name in names})
        )
    for closure, who, found in rows:
        lines.append(
            f"| {closure} | {who} | {found['inside']:.1%} | {found['error']:.3f} | {found['width']:.3f} | "
            f"{found['return']:.1f} | {found['normalized']:.3f} |"
        )
    return lines


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run on Berlin; cloning (bc) is enough")
    parser.add_argument("--closures", nargs="+", default=CLOSURES, metavar="ROADS")
    for option, default in (("seeds", 5), ("steps", 40_000), ("days", 200)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args(arguments)
    if given.seeds < 2:
        parser.error("an interval over seeds needs at least two of them: --seeds 2")
    config = Config.from_yaml((given.run / "config.yaml").read_text(), str(given.run))
    world = make_environment(config.environment, 1).spec
    size = given.seeds, given.steps, given.days, given.jobs
    figures = {roads: judged(ask(given.run, world.changes or world.name, roads, *size)) for roads in given.closures}
    (given.run / "whatif" / "closures.json").write_text(json.dumps(figures, indent=1))
    print("\n".join(table(figures)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Does bm3il learn in other people's environments? `python benchmarks/adapters_learning.py [--only WORD] [--json]`

Rules of `adapters_experts.py` play through the ways that users have: entry points of the group `bm3il.experts`, and
`bm3il.Recorder`. From what they did, `bm3il train` imitates twice with each seed: with preset `own` from random
networks and, as the preset is, from the clone, which is what `bc` with these settings ends with. What counts is the
true return of each type, from `curve.csv` and `result.json`: 0 is random, 1 the expert of the recordings. It is wrong

- if from random networks a type does not end clearly above its start: with every seed, by 1.645 standard errors;
- if from the clone it does not end clearly above random, or on average further than `MAY_LOSE` below the clone;
- if a run takes more than `MOST_SECONDS` of processors, two minutes of two of them, in all its processes.

Prints a table (`--json`: figures) and returns 1 if something is wrong. Half an hour on one quiet core.
It needs the extras of `dev`, and magent2.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

HERE = Path(__file__).resolve().parent
GRID = HERE.parent / "tests" / "protocol" / "adapters" / "grid.net.xml"
SURE = 1.645
"""Standard errors: a twentieth of the normal distribution lies beyond."""
MAY_LOSE = 0.05
MOST_SECONDS = 240
RECORDING_SEED = 7
RANDOM, CLONE = "random networks", "the clone (bc)"
START = {RANDOM: ["--learner.start", "random"], CLONE: []}


@dataclass(frozen=True)
class Case:
    """An environment, how many episodes of it are recorded, and how many steps are played.

    judged: episodes that a policy is judged by.   played_by_user: whether it is recorded in a loop of PettingZoo's.
    """

    environment: str
    episodes: int
    steps: int
    judged: int = 100
    played_by_user: bool = False


MPE = "pettingzoo:mpe2"
CASES = {
    "simple_spread": Case(f"{MPE}.simple_spread_v3", 200, 16_000),
    "simple_tag": Case(f"{MPE}.simple_tag_v3", 200, 16_000, 200, played_by_user=True),
    "tictactoe (turns)": Case(
        "pettingzoo:pettingzoo.classic.tictactoe_v3?episode_length=9&types=player_1,player_2", 200, 12_000, 400
    ),
    "battle (magent2)": Case(
        "pettingzoo:magent2.environments.battle_v4?arguments=map_size:16,max_cycles:50", 50, 16_000
    ),
    "navigation (VMAS)": Case("vmas:navigation?n_agents=3", 100, 20_000),
    "grid (SUMO)": Case(f"sumo:{GRID}?vehicles=6&steps=30", 50, 6_000, 40),
}


@dataclass(frozen=True)
class Ended:
    """A run: of each type its normalised return at the start and the end, each with its standard error."""

    seconds: float
    steps: int
    types: dict[str, tuple[tuple[float, float], tuple[float, float]]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="environments with this in their names")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found: dict[str, dict[str, list[Ended]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        _install_experts(Path(folder))
        for name, case in CASES.items():
            if options.only in name:
                found[name] = learn(case, options.seeds, Path(folder, name.partition(" ")[0]))
                if not options.json:
                    print("\n".join(rows(name, found[name])), flush=True)
    if options.json:
        told = {name: {how: [vars(run) for run in runs] for how, runs in hows.items()} for name, hows in found.items()}
        print(json.dumps(told))
    wrong = [f"{name}: {what}" for name, hows in found.items() for what in faults(hows)]
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong or not found else 0


def _install_experts(folder: Path) -> None:
    """What `pip install` of a package with these entry points would leave, on the path of all that is started."""
    from adapters_experts import EXPERTS

    about = folder / "adapters_experts-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: adapters-experts\nVersion: 0\n", encoding="utf-8")
    points = [f"{name} = {rule.__module__}:{rule.__qualname__}" for name, rule in EXPERTS.items()]
    (about / "entry_points.txt").write_text("\n".join(["[bm3il.experts]", *points, ""]), encoding="utf-8")
    paths = [str(folder), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def learn(case: Case, seeds: Sequence[int], folder: Path) -> dict[str, list[Ended]]:
    """Record, and imitate in each way with each seed."""
    folder.mkdir()
    recorded = folder / "recorded.safetensors"
    if case.played_by_user:
        play_and_record(case, recorded)
    else:
        many = ["--episodes", str(case.episodes), "--seed", str(RECORDING_SEED), "--output", str(recorded)]
        _seconds(["demonstrations", "record", case.environment, *many])
    return {how: [train(case, recorded, seed, flags, folder) for seed in seeds] for how, flags in START.items()}


def play_and_record(case: Case, path: Path) -> None:
    """As a user plays in a loop of PettingZoo's parallel API."""
    from adapters_experts import Hunt
    from mpe2 import simple_tag_v3

    import bm3il

    env, hunt = bm3il.Recorder(simple_tag_v3.parallel_env(), case.environment), Hunt()
    for episode in range(case.episodes):
        seen, _ = env.reset(seed=1_000 * RECORDING_SEED + episode)
        while env.agents:
            seen, *_ = env.step({agent: hunt(agent, seen[agent]) for agent in env.agents})
    env.save(path)


def train(case: Case, recorded: Path, seed: int, flags: Sequence[str], folder: Path) -> Ended:
    """One run, in one process: many come to the same bits."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    command = ["train", "--preset", "own", "--environment", case.environment, "--demonstrations", str(recorded)]
    command += ["--seed", str(seed), "--steps", str(case.steps), "--mode", "serial"]
    command += ["--runs-folder", str(folder), "--run", run.name]
    # Curves cost more than what they show: the start and the end are judged.
    command += ["--evaluation.interval", "100000"]
    command += ["--evaluation.episodes", str(case.judged), "--evaluation.final-episodes", str(case.judged)]
    seconds = _seconds([*command, *flags])
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    with (run / "curve.csv").open(encoding="utf-8", newline="") as file:
        first = next(csv.DictReader(file))
    types = {}
    for name, told in (result["types"] or {"": result}).items():
        end, scale = f".{name}" if name else "", abs(told["expert_return"] - told["random_return"])
        start = float(first[f"normalized_return{end}"]), float(first[f"return_stderr{end}"]) / scale
        types[name or "all"] = start, (told["normalized_return"], told["return_stderr"] / scale)
    ended = Ended(seconds, result["env_steps"], types)
    print(case.environment, "seed", seed, *flags, ended, file=sys.stderr, flush=True)  # half an hour of silence is long
    return ended


def _seconds(command: Sequence[str]) -> float:
    """Run `bm3il`; the processors' seconds of it and its children."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bm3il.launch.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    told = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"bm3il {' '.join(command)}\n{told}")
    return used.ru_utime + used.ru_stime


def rows(name: str, hows: dict[str, list[Ended]]) -> list[str]:
    """Lines of a table of Markdown: means over seeds [least, most]."""
    lines = []
    for how, runs in hows.items():
        for kind in runs[0].types:
            ends = [" | ".join(_spread([run.types[kind][k][0] for run in runs]) for k in (0, 1))]
            lines.append(f"| {name} | {kind} | {how} | {ends[0]} | {max(run.seconds for run in runs):.0f} |")
    return lines


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def faults(hows: dict[str, list[Ended]]) -> list[str]:
    """What is wrong, in words."""
    wrong = []
    for how, runs in hows.items():
        if (most := max(run.seconds for run in runs)) > MOST_SECONDS:
            wrong.append(f"from {how} it took {most:.0f} seconds of processors")
        for kind in runs[0].types:
            starts, ends = zip(*(run.types[kind] for run in runs), strict=True)
            if how == RANDOM and not all(_is_above(end, start) for start, end in zip(starts, ends, strict=True)):
                wrong.append(f"from {how}, {kind}: {starts} → {ends} is not clearly better")
            if how == CLONE:
                lost = mean(start for start, _ in starts) - mean(end for end, _ in ends)
                if not all(_is_above(end, (0.0, 0.0)) for end in ends) or lost > MAY_LOSE:
                    wrong.append(
                        f"from {how}, {kind}: {starts} → {ends} is no better than random, or worse than the clone"
                    )
    return wrong


def _is_above(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether one figure is clearly larger, by the standard errors of both."""
    return one[0] - other[0] > SURE * math.hypot(one[1], other[1])


if __name__ == "__main__":
    sys.exit(main())

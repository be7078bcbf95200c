"""Hurts simulators of runs on this machine at random: `make chaos KIND=simulator SECONDS=600`, or with `MODE=async`.

Runs follow each other until the time is over. Their environment (`unsteady`) raises, shows NaN, hangs, ends its
process, starts a child and leaves it, or is a hundred times slower for a while.

Whoever is told of by the environment must be named: what ends an actor, once in its log or on the screen, and as a
restart. A lockstep run must end with the `policy_sha256` of an undisturbed one, every run as
`chaos.check_run` says. No process may be left, of the run or of its simulators.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from chaos import DEADLINE_SECONDS, check_run, undisturbed
from unsteady import KINDS, faults_of

ACTORS, STEP_SECONDS = 4, 4
STEPS = {"lockstep": 24_000, "async": 48_000}
AT_THE_END_SECONDS = STEP_SECONDS + 4
"""Before the last iteration is done: what happens then may be overtaken by the end of the run."""
OPTIONS = [
    *("--preset", "rover_tower_4", "--seed", "3", "--actors", str(ACTORS), "--actor.step-seconds", str(STEP_SECONDS)),
    *("--evaluation.starts", "fresh", "--evaluation.final-episodes", "200"),
]
NAMED = {
    "raise": r"SimulatorError: environment .* raised (TimeoutError: no answer|OSError: .*No space left)",
    "nan": r"SimulatorError: environment .*: an observation is not finite",
    "hang": r"SimulatorError: environment .* has not come back from 'step'",
}
"""What is to be found in the log of an actor that a fault has ended. One whose process was ended can say nothing; the
screen does. Of the other kinds none ends it."""
EXIT, RESTART = r"actor-\d+ ended with code 0; starting it again", r"actor-\d+ .*; starting it again"
MARK = "BM3IL_CHAOS_OF_SIMULATORS"


def storm(folder: Path, name: str, mode: str, wanted: str) -> tuple[Counter[str], Counter[str]]:
    """One run, to its end and checked; returns how often each kind was done, and how often it was named."""
    faults = folder / f"{name}-faults"
    faults.mkdir()
    mark = {MARK: str(faults)}
    command = [sys.executable, "-m", "bm3il.launch.cli", "train", "--run", name, "--runs-folder", str(folder)]
    command += ["--mode", mode, "--steps", str(STEPS[mode]), "--environment", f"unsteady?faults={faults}", *OPTIONS]
    env = installed(folder) | mark
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False)
    left = [process for process in psutil.process_iter() if is_marked(process, mark)]
    assert not left, f"left behind: {left}"
    run = folder / name
    told = ended.stdout + ended.stderr
    logs = "".join(path.read_text(errors="replace") for path in (run / "logs").glob("actor-*.log"))
    assert ended.returncode == 0, told[-3000:]
    check_run(run, json.loads((run / "result.json").read_text()), STEPS[mode], wanted)
    overtaken = (run / "log.jsonl").stat().st_mtime - AT_THE_END_SECONDS
    done, late = Counter[str](), Counter[str]()
    for seconds, kind in (fault for each in faults_of(faults).values() for fault in each):
        done[kind] += 1
        late[kind] += seconds > overtaken
    named = Counter({kind: len(re.findall(pattern, logs)) for kind, pattern in NAMED.items()})
    named["exit"] = len(re.findall(EXIT, told))
    for kind in named:
        assert done[kind] - late[kind] <= named[kind] <= done[kind], f"{kind}: {done} done, {late} late, {named} named"
    ends, late_ends = (sum(counts[kind] for kind in named) for counts in (done, late))
    restarts = len(re.findall(RESTART, told))
    assert ends - late_ends <= restarts <= ends, f"{ends} ends of actors, {late_ends} of them late, {restarts} restarts"
    return done, named


def installed(folder: Path) -> dict[str, str]:
    """Environment variables with which processes find `unsteady`, as if its package were installed."""
    info = folder / "site" / "unsteady-1.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: unsteady\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[bm3il.environments]\nunsteady = unsteady:Unsteady\n")
    path = os.pathsep.join((str(info.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    return os.environ | {"PYTHONPATH": path}


def is_marked(process: psutil.Process, mark: dict[str, str]) -> bool:
    """Whether it comes from this run."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE and mark.items() <= process.environ().items()
    except psutil.Error:
        return False


def main(given: argparse.Namespace) -> int:
    """Run after run; prints what was done and fails if anything is other than promised."""
    done, named = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="bm3il-chaos-") as name:
        folder, wanted = Path(name), ""
        if given.mode == "lockstep":
            options = [*OPTIONS, "--environment", "rover_tower?pairs=2"]
            wanted = undisturbed(folder, STEPS["lockstep"], options)
        start, runs = time.monotonic(), 0
        while not runs or time.monotonic() - start < given.seconds:
            runs, began = runs + 1, time.monotonic()
            of_run, named_of_run = storm(folder, f"storm-{runs}", given.mode, wanted)
            done, named = done + of_run, named + named_of_run
            print(f"run {runs}: {time.monotonic() - began:.0f} s, {of_run.total()} faults: as promised", flush=True)
    for kind in KINDS:
        print(f"{done[kind]:4} {kind}: " + (f"{named[kind]} named" if kind in named else "survived"))
    print(f"{runs} runs in {time.monotonic() - start:.0f} s, {done.total()} faults; nobody was left behind")
    return 0

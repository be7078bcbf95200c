"""Kills and stops processes of a run at random: `make chaos SECONDS=600 SEED=1`, or with `--mode async`.

Runs of about a minute follow each other until the time is over, each with another order of faults: SIGKILL of a worker,
SIGSTOP of one for some seconds, SIGKILL of the launcher with a resume after it. A lockstep run must end with the
`policy_sha256` of an undisturbed one; an async run must have trained on exactly its steps and end nearer to the expert
than to random. No process may be left. Prints the faults, and the time from each to the next iteration.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

STEPS, FIRST_ITERATIONS = 160_000, 10
PAUSE_SECONDS, STOP_SECONDS = (4.0, 9.0), (1.0, 6.0)
DEADLINE_SECONDS = 600.0
OPTIONS = [
    *("--preset", "rover_tower_4", "--seed", "3", "--actors", "2", "--steps", str(STEPS)),
    *("--learner.updates", "10", "--learner.batch-size", "64", "--learner.checkpoint-interval", "5"),
    *("--evaluation.starts", "fresh", "--evaluation.final-episodes", "200"),
]
WORKERS = ("actor", "learner", "reward-server", "evaluator")


@dataclass
class Storm:
    """One run and what is done to it."""

    folder: Path
    mode: str
    dice: random.Random
    faults: Counter[str] = field(default_factory=Counter)
    recoveries: list[float] = field(default_factory=list)
    largest_bytes: int = 0

    def run(self, name: str) -> dict[str, object]:
        """Start it, disturb it until it ends; returns its result."""
        self._run = self.folder / name
        self._launch("train", "--mode", self.mode, "--run", name, "--runs-folder", str(self.folder), *OPTIONS)
        deadline, due, hurt = time.monotonic() + DEADLINE_SECONDS, 0.0, None
        while (code := self._process.poll()) is None:
            assert time.monotonic() < deadline, f"{name} does not end: see {self._run}"
            time.sleep(0.05)
            done = self._iterations()
            if hurt is not None and done > hurt[1]:
                self.recoveries.append(time.monotonic() - hurt[0])
                hurt, due = None, time.monotonic() + self.dice.uniform(*PAUSE_SECONDS)
            if due == 0.0 and done >= FIRST_ITERATIONS:
                due = time.monotonic() + self.dice.uniform(0, 2)
            if hurt is None and due and time.monotonic() > due and (fault := self._fault()):
                self.faults[fault] += 1
                hurt = time.monotonic(), self._iterations()
        assert code == 0, f"{name} ended with {code}: {(self.folder / 'chaos.log').read_text()[-2000:]}"
        return dict(json.loads((self._run / "result.json").read_text()))

    def _launch(self, *arguments: str) -> None:
        with (self.folder / "chaos.log").open("a") as log:
            command = [sys.executable, "-m", "launch.cli", *arguments]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def _iterations(self) -> int:
        """Lines of the log: they shrink when the run goes back to a checkpoint."""
        log = self._run / "log.jsonl"
        return len(log.read_bytes().splitlines()) if log.exists() else 0

    def _fault(self) -> str:
        """Do something; returns its name, or "" if there was nobody to do it to."""
        workers = self._workers()
        self.largest_bytes = max([self.largest_bytes, *(w.memory_info().rss for w in workers.values())])
        if self.dice.random() < 0.1:
            self._process.kill()
            self._process.wait()
            _, left = psutil.wait_procs(list(workers.values()), timeout=10)
            assert not [p for p in left if p.status() != psutil.STATUS_ZOMBIE], "orphans"
            self._launch("resume", str(self._run))
            return "launcher killed"
        if not workers:
            return ""
        name, victim = self.dice.choice(sorted(workers.items()))
        if self.dice.random() < 0.6:
            victim.kill()
            return f"{name} killed"
        victim.send_signal(signal.SIGSTOP)
        time.sleep(self.dice.uniform(*STOP_SECONDS))
        if victim.is_running():
            victim.send_signal(signal.SIGCONT)
        return f"{name} stopped"

    def _workers(self) -> dict[str, psutil.Process]:
        found = {}
        for child in psutil.Process(self._process.pid).children(recursive=True):
            try:
                command = child.cmdline()
                if "launch.worker" in command and child.status() != psutil.STATUS_ZOMBIE:
                    found[next(w for w in WORKERS if w in command)] = child
            except psutil.Error:
                continue
        return found


def main() -> int:
    """Storm after storm; prints what was done and fails if anything is other than promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mode", choices=("lockstep", "async"), default="lockstep")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bm3il-chaos-") as name:
        folder = Path(name)
        wanted = ""
        if given.mode == "lockstep":
            serial = ["train", "--mode", "serial", "--run", "undisturbed", "--runs-folder", name, *OPTIONS]
            subprocess.run([sys.executable, "-m", "launch.cli", *serial], check=True, capture_output=True)
            wanted = json.loads((folder / "undisturbed" / "result.json").read_text())["policy_sha256"]
        start, number, faults, recoveries, largest = time.monotonic(), 0, Counter[str](), list[float](), 0
        while number == 0 or time.monotonic() - start < given.seconds:
            seed = given.seed + number
            storm = Storm(folder, given.mode, random.Random(seed))
            result = storm.run(f"storm-{seed}")
            assert result["env_steps"] == STEPS, result
            if wanted:
                assert result["policy_sha256"] == wanted, f"seed {seed}: {result['policy_sha256']} is not {wanted}"
            assert float(str(result["normalized_return"])) > 0.5, result
            faults, recoveries = faults + storm.faults, recoveries + storm.recoveries
            largest, number = max(largest, storm.largest_bytes), number + 1
            print(
                f"seed {seed}: {storm.faults.total()} faults, {result['normalized_return']:.3f}, as promised",
                flush=True,
            )
    print(json.dumps(dict(sorted(faults.items())), indent=1))
    print(
        f"{number} runs, {faults.total()} faults; back at work after {statistics.median(recoveries):.1f} s (median), "
        f"{max(recoveries):.1f} s (longest); largest process {largest / 1e6:.0f} MB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Hurts runs on four hosts at random: `make chaos SECONDS=600 SEED=1`, or with `MODE=async`.

The hosts are network namespaces of this machine, so it needs root. Runs of two minutes and more follow each other until
the time is over, each with its own order of faults:

- SIGKILL of a worker, of the supervisor of a host, of the launcher;
- SIGSTOP of a worker or of a supervisor for some seconds;
- the cable of a host is pulled for some seconds, sometimes for so long that the host counts as lost, and put in again;
- a host loses its power: its processes are gone and nobody is told. If it was the first, the run is resumed.

A lockstep run must end with the `policy_sha256` of an undisturbed one. An async run must have trained on exactly its
steps, every iteration once, end nearer to the expert than to random, and not need more memory at its end than in its
middle. No process may be left on any host. Prints the faults, and the time from the end of each to new iterations.

With `KIND=simulator` it is the environments that are hurt: see `chaos_of_simulators`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from hosts import Hosts

HOSTS, FIRST_ITERATIONS = 4, 10
STEPS = {"lockstep": 120_000, "async": 800_000}
PAUSE_SECONDS, STOP_SECONDS, CUT_SECONDS, LONG_CUT_SECONDS = (4.0, 9.0), (1.0, 6.0), (1.0, 8.0), (18.0, 24.0)
DEADLINE_SECONDS = 1800.0
MEMORY_GROWTH = 1.15
OPTIONS = [
    *("--preset", "rover_tower_4", "--seed", "3", "--actors", str(HOSTS)),
    *("--learner.updates", "10", "--learner.batch-size", "64", "--learner.checkpoint-interval", "10"),
    *("--evaluation.starts", "fresh", "--evaluation.final-episodes", "200"),
]
WORKER, SUPERVISOR = "bm3il.launch.processes.worker", "bm3il.launch.nodes.node"


@dataclass
class Storm:
    """One run on the hosts, and what is done to it.

    recoveries: seconds from the end of a fault to the second new iteration.
    memory: (seconds, largest resident bytes of a worker) while it ran.
    """

    hosts: Hosts
    folder: Path
    mode: str
    name: str
    dice: random.Random
    faults: Counter[str] = field(default_factory=Counter)
    recoveries: dict[str, list[float]] = field(default_factory=dict)
    memory: list[tuple[float, int]] = field(default_factory=list)
    restarts: int = 0

    def run(self) -> dict[str, Any]:
        """Start it, disturb it until it ends; returns its result."""
        self._run, self._without_power = self.folder / self.name, set[int]()
        steps = ("--mode", self.mode, "--steps", str(STEPS[self.mode]), "--nodes", str(HOSTS))
        files = ("--hostfile", str(self.hosts.hostfile(self.folder)), "--runs-folder", str(self.folder))
        self._launch("train", "--run", self.name, *files, *steps, *OPTIONS)
        start, due, hurt = time.monotonic(), 0.0, None
        while True:
            assert time.monotonic() - start < DEADLINE_SECONDS, f"{self.name} does not end: see {self._run}"
            time.sleep(0.05)
            if (code := self._process.poll()) is not None:
                if code == 0:
                    break
                assert self._may_end, f"{self.name} ended with {code}: {self._said()}"
                self._resume()
            done = self._iterations()
            if hurt is not None and done > hurt[2] + 1:  # one may have had all that it needed
                self.recoveries.setdefault(hurt[0], []).append(time.monotonic() - hurt[1])
                hurt, due = None, time.monotonic() + self.dice.uniform(*PAUSE_SECONDS)
            if due == 0.0 and done >= FIRST_ITERATIONS:
                due = time.monotonic() + self.dice.uniform(0, 2)
            if hurt is None and due and time.monotonic() > due and (fault := self._hurt()):
                self.faults[fault] += 1
                hurt = fault, time.monotonic(), self._iterations()
            self._measure(time.monotonic() - start)
        self._restore_power()
        self._assert_empty()
        return dict(json.loads((self._run / "result.json").read_text()))

    def _hurt(self) -> str:
        """Do something; returns its name, or "" if there was nobody to do it to."""
        kinds: list[tuple[float, Callable[[], str]]] = [
            (10, self._kill_worker),
            (5, self._stop_process),
            (6, self._cut),
            (1, self._cut_for_long),
            (1, self._kill_supervisor),
            (1, self._power_off),
            (1, self._kill_launcher),
            (1, self._power_off_first),
        ]
        weights, actions = zip(*kinds, strict=True)
        return self.dice.choices(actions, weights)[0]()

    def _kill_worker(self) -> str:
        return self._signal(WORKER, signal.SIGKILL, range(HOSTS), "killed")

    def _stop_process(self) -> str:
        module = self.dice.choice((WORKER, WORKER, SUPERVISOR))
        return self._signal(module, signal.SIGSTOP, range(HOSTS), "stopped")

    def _kill_supervisor(self) -> str:
        """Of another host than the first; mpiexec lets the others go on."""
        return self._signal(SUPERVISOR, signal.SIGKILL, range(1, HOSTS), "killed")

    def _signal(self, module: str, number: signal.Signals, hosts: range, what: str) -> str:
        found = self._processes(module, hosts)
        if not found:
            return ""
        name, victim = self.dice.choice(found)
        try:
            victim.send_signal(number)
            if number == signal.SIGSTOP:
                time.sleep(self.dice.uniform(*STOP_SECONDS))
                victim.send_signal(signal.SIGCONT)
        except psutil.NoSuchProcess:
            return ""
        return f"{name} {what}"

    def _cut(self) -> str:
        return self._cut_for(self.dice.uniform(*CUT_SECONDS), "cut")

    def _cut_for_long(self) -> str:
        return self._cut_for(self.dice.uniform(*LONG_CUT_SECONDS), "cut for long")

    def _cut_for(self, seconds: float, what: str) -> str:
        host = self.dice.randrange(HOSTS)
        if host in self._without_power:
            return ""
        self.hosts.cut(host)
        time.sleep(seconds)
        self.hosts.heal(host)
        return f"{'first' if host == 0 else 'other'} host {what}"

    def _power_off(self) -> str:
        host = self.dice.randrange(1, HOSTS)
        if host in self._without_power or not self.hosts.processes(host):
            return ""
        self.hosts.power_off(host)
        self._without_power.add(host)
        return "other host without power"

    def _power_off_first(self) -> str:
        self.hosts.power_off(0)
        self._process.wait()
        self.hosts.heal(0)
        self._resume()
        return "first host without power"

    def _kill_launcher(self) -> str:
        self._process.kill()
        self._process.wait()
        self._resume()
        return "launcher killed"

    def _resume(self) -> None:
        self._restore_power()
        self._assert_empty()
        self._launch("resume", str(self._run))

    def _restore_power(self) -> None:
        for host in self._without_power:
            self.hosts.heal(host)
        self._without_power.clear()

    def _assert_empty(self) -> None:
        """A run that ended, however, has left nobody behind."""
        deadline = time.monotonic() + 30
        while left := [pid for host in range(HOSTS) for pid in self.hosts.processes(host)]:
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.1)

    @property
    def _may_end(self) -> bool:
        """mpiexec ends all ranks when it hears that a host is gone."""
        return bool(self.faults["other host without power"] + self.faults["supervisor killed"])

    def _launch(self, *arguments: str) -> None:
        program = self.hosts.command(0, [sys.executable, "-m", "bm3il.launch.cli", *arguments])
        with (self.folder / f"{self.name}.log").open("a") as log:
            env = os.environ | self.hosts.mpiexec_environment(self.folder)
            self._process = subprocess.Popen(program, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env)

    def _said(self) -> str:
        return (self.folder / f"{self.name}.log").read_text()[-2000:]

    def _iterations(self) -> int:
        """Lines of the log: they shrink when the run goes back to a checkpoint."""
        log = self._run / "log.jsonl"
        return len(log.read_bytes().splitlines()) if log.exists() else 0

    def _measure(self, seconds: float) -> None:
        if self.memory and seconds - self.memory[-1][0] < 2:
            return
        sizes = [0]
        for _, process in self._processes(WORKER, range(HOSTS)):
            try:
                sizes.append(process.memory_info().rss)
            except psutil.Error:
                continue
        self.memory.append((seconds, max(sizes)))
        try:
            told = json.loads((self._run / "processes.json").read_text())
            self.restarts = max(self.restarts, sum(process["restarts"] for process in told.values()))
        except (OSError, ValueError):
            pass

    def _processes(self, module: str, hosts: range) -> list[tuple[str, psutil.Process]]:
        """(name, process) of the workers or supervisors on some hosts, in a fixed order."""
        found = []
        for host in hosts:
            for pid in self.hosts.processes(host):
                try:
                    command = (process := psutil.Process(pid)).cmdline()
                    ours = command[0] == sys.executable and "bm3il.launch.processes.lifeline" not in command
                    if ours and module in command and process.status() != psutil.STATUS_ZOMBIE:
                        role = command[command.index(module) + 1] if module == WORKER else "supervisor"
                        found.append((role, process))
                except (psutil.Error, IndexError):
                    continue
        return sorted(found, key=lambda pair: pair[0])


def check(storm: Storm, result: dict[str, Any], wanted: str) -> None:
    """What was promised of a run, its memory included."""
    check_run(storm.folder / storm.name, result, STEPS[storm.mode], wanted)
    third = len(storm.memory) // 3
    middle, last = (max(size for _, size in part) for part in (storm.memory[third : 2 * third], storm.memory[-third:]))
    assert last <= MEMORY_GROWTH * middle, f"{storm.name} grew from {middle} to {last} bytes"


def check_run(run: Path, result: dict[str, Any], steps: int, wanted: str) -> None:
    """What was promised of a run in this folder; wanted: its `policy_sha256`, if that is known."""
    assert (result["status"], result["env_steps"]) == ("finished", steps), result
    if wanted:
        assert result["policy_sha256"] == wanted, f"{run.name}: {result['policy_sha256']} is not {wanted}"
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, result["iterations"] + 1)), "iterations do not add up"
    share = result["env_steps"] // result["iterations"]
    assert all(line["env_steps"] == line["iteration"] * share for line in lines), "steps do not add up"
    assert float(result["normalized_return"]) > 0.5, result


def undisturbed(folder: Path, steps: int, options: list[str]) -> str:
    """The `policy_sha256` of the lockstep run in one process."""
    where = ["--mode", "serial", "--steps", str(steps), "--run", "undisturbed", "--runs-folder", str(folder)]
    command = [sys.executable, "-m", "bm3il.launch.cli", "train", *where, *options]
    subprocess.run(command, check=True, capture_output=True)
    return str(json.loads((folder / "undisturbed" / "result.json").read_text())["policy_sha256"])


def main() -> int:
    """Storm after storm; prints what was done and fails if anything is other than promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mode", choices=("lockstep", "async"), default="lockstep")
    parser.add_argument("--kind", choices=("process", "simulator"), default="process")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was made shall be taken away
    if given.kind == "simulator":
        from chaos_of_simulators import main as chaos_of_simulators

        return chaos_of_simulators(given)
    storms: list[Storm] = []
    with tempfile.TemporaryDirectory(prefix="bm3il-chaos-") as name, Hosts(HOSTS) as hosts:
        wanted = undisturbed(Path(name), STEPS["lockstep"], OPTIONS) if given.mode == "lockstep" else ""
        start = time.monotonic()
        while not storms or time.monotonic() - start < given.seconds:
            seed = given.seed + len(storms)
            storm = Storm(hosts, Path(name), given.mode, f"storm-{seed}", random.Random(seed))
            storms.append(storm)
            began = time.monotonic()
            result = storm.run()
            check(storm, result, wanted)
            print(
                f"seed {seed}: {time.monotonic() - began:.0f} s, {storm.faults.total()} faults, "
                f"{storm.restarts} restarts, {result['normalized_return']:.3f}, "
                f"{max(size for _, size in storm.memory) / 1e6:.0f} MB: as promised",
                flush=True,
            )
    report(storms)
    return 0


def report(storms: list[Storm]) -> None:
    """How often what was done, and how long it took to be back at work."""
    for kind in sorted(set().union(*(storm.faults for storm in storms))):
        seconds = [s for storm in storms for s in storm.recoveries.get(kind, [])]
        times = (
            f"{statistics.median(seconds):.1f} s (median), {max(seconds):.1f} s (longest)" if seconds else "at the end"
        )
        print(f"{sum(storm.faults[kind] for storm in storms):4} {kind}: back at work after {times}")
    everything = [s for storm in storms for values in storm.recoveries.values() for s in values]
    print(
        f"{len(storms)} runs, {sum(storm.faults.total() for storm in storms)} faults, fewest of a run "
        f"{min(storm.faults.total() for storm in storms)}, {sum(storm.restarts for storm in storms)} restarts; "
        f"back at work after {statistics.median(everything):.1f} s (median), {max(everything):.1f} s (longest)"
    )


if __name__ == "__main__":
    sys.exit(main())

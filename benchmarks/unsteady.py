"""An environment that goes wrong now and then: `unsteady?faults=FOLDER`, for `make chaos KIND=simulator`.

It is Rover Tower, and its episodes depend on the seed alone; when what goes wrong depends on the clock and on the
system's dice. Only actors are hurt. Each tells before it is, in a line of a file of its own in the folder: seconds
since 1970, and the kind.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bm3il.actors.environments.rover_tower import RoverTower
from bm3il.protocol.environment import Starts, TimeStep

KINDS = ("raise", "nan", "hang", "exit", "leak", "slow")
FIRST_SECONDS, PAUSE_SECONDS = (2.0, 12.0), (26.0, 36.0)
"""Until the first fault of an actor, and between two. A run ends after six crashes of a process within 120 s: they must
be further apart than 24 s."""
SLOW_SECONDS, TIMES_SLOWER = 4.0, 100


class Unsteady:
    """Rover Tower of two pairs, with faults."""

    def __init__(self, num_envs: int, faults: str) -> None:
        self._inner, self._faults, self._dice = RoverTower(num_envs, pairs=2), Path(faults), random.SystemRandom()
        self.spec, self.num_envs, self._slow_until = self._inner.spec, num_envs, 0.0
        self._actor = f"actor-{sys.argv[-1]}" if "actor" in sys.argv else ""
        self._due = self._next_due() if self._actor else float("inf")

    def reset(self, seed: int, starts: Starts | None = None) -> TimeStep:
        return self._inner.reset(seed, starts)

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        began = time.time()
        now = self._inner.step(actions)
        if began < self._slow_until:
            time.sleep((TIMES_SLOWER - 1) * (time.time() - began))
        if began > self._due:
            self._fail(self._drawn(), now)
        return now

    def _next_due(self) -> float:
        """As long after the last fault as there is to be, whoever had that one."""
        before = faults_of(self._faults).get(self._actor)
        return before[-1][0] + self._dice.uniform(*PAUSE_SECONDS) if before else self._first_due()

    def _first_due(self) -> float:
        return time.time() + self._dice.uniform(*FIRST_SECONDS)

    def _drawn(self) -> str:
        """One of the kinds that were seldom so far; told before it happens."""
        so_far = Counter(kind for faults in faults_of(self._faults).values() for _, kind in faults)
        kind = self._dice.choice([kind for kind in KINDS if so_far[kind] == min(so_far[k] for k in KINDS)])
        with (self._faults / self._actor).open("a") as file:
            file.write(f"{time.time()} {kind}\n")
        self._due = self._next_due()
        return kind

    def _fail(self, kind: str, now: TimeStep) -> None:
        match kind:
            case "raise":
                raise self._dice.choice((TimeoutError("no answer"), OSError(28, "No space left on device")))
            case "nan":
                assert now.columns is not None
                next(c for c in now.columns[0].values() if c.dtype == np.float32)[...] = np.nan
            case "hang":
                time.sleep(3600)
            case "exit":
                os._exit(0)
            case "leak":
                subprocess.Popen(["sleep", "3600"], start_new_session=True)
            case "slow":
                self._slow_until = time.time() + SLOW_SECONDS


def faults_of(folder: Path) -> dict[str, list[tuple[float, str]]]:
    """Actor → its faults, in their order: when, and of which kind."""
    found = {}
    for path in folder.glob("actor-*"):
        lines = [line.split() for line in path.read_text().splitlines()]
        found[path.name] = [(float(seconds), kind) for seconds, kind in lines]
    return found

"""An environment that fails as it is told to: `faulty?faults=FOLDER`, for runs of real processes.

A file `STEP.KIND` in the folder is a fault: the first actor that comes to that step, counted from its start, takes the
file away and fails in that way. `always.KIND` stays. `evaluator.KIND` stays, too, and is the evaluator's alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bm3il.actors.environments.rover_tower import RoverTower
from bm3il.protocol.environment import Starts, TimeStep


class Faulty:
    """Rover Tower of two pairs, with faults."""

    def __init__(self, num_envs: int, faults: str) -> None:
        self._inner, self._faults = RoverTower(num_envs, pairs=2), Path(faults)
        self.spec, self.num_envs, self._steps = self._inner.spec, num_envs, 0

    def reset(self, seed: int, starts: Starts | None = None) -> TimeStep:
        return self._inner.reset(seed, starts)

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        now = self._inner.step(actions)
        self._steps += 1
        kinds = self._due() if "actor" in sys.argv else []
        if "evaluator" in sys.argv:
            kinds = [path.suffix[1:] for path in self._faults.glob("evaluator.*")]
        for kind in kinds:
            self._fail(kind, now)
        return now

    def close(self) -> None:
        (self._faults / "closed").touch()

    def _due(self) -> list[str]:
        always = [path.suffix[1:] for path in self._faults.glob("always.*")]
        return always + [self._taken(path) for path in self._faults.glob(f"{self._steps}.*")]

    def _taken(self, path: Path) -> str:
        path.unlink()
        return path.suffix[1:]

    def _fail(self, kind: str, now: TimeStep) -> None:
        match kind:
            case "timeout":
                raise TimeoutError("timed out")
            case "disk":
                raise OSError(28, "No space left on device")
            case "nan":
                now.observations[0][0, 0, 0] = np.nan
                if now.columns is not None:
                    next(c for c in now.columns[0].values() if c.dtype == np.float32)[...] = np.nan
            case "hang":
                time.sleep(3600)
            case "exit":
                os._exit(0)
            case "child":
                subprocess.Popen(["sleep", "3600"], start_new_session=True)
                os.abort()


def installed(folder: Path) -> dict[str, str]:
    """Environment variables with which processes find `faulty`, as if its package were installed."""
    package = folder / "site"
    info = package / "faulty-1.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[bm3il.environments]\nfaulty = faulty:Faulty\n")
    path = os.pathsep.join((str(package), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    return os.environ | {"PYTHONPATH": path}

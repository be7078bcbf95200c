"""A traffic network of SUMO, whose vehicles choose their ways: `sumo:town.net.xml?vehicles=40`. See docs/sumo.md."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from bm3il.protocol.adapters.copies import Copies
from bm3il.protocol.environment import Starts, TimeStep
from bm3il.protocol.errors import InputError

SECONDS, START_SECONDS = 60.0, 300.0


class Sumo:
    """E copies of a network, in a child process each (`protocol.adapters.sumo_server`): SUMO holds one per process.

    target: a network, `.net.xml` or `.net.xml.gz`.   routes: trips or vehicles of a `.rou.xml`, each of them an agent
    of the type that it has there, instead of random trips.   vehicles: how many; of those in `routes` the first ones,
    and 0 are all; random ones are 20 then.   steps: of an episode.   interval: seconds of a step.
    """

    most_copies = 16  # each has a process, which takes half a second of a core to start, and tens of megabytes

    def __init__(
        self, num_envs: int, target: str = "", routes: str = "", vehicles: int = 0, steps: int = 60, interval: int = 10
    ) -> None:
        """Raises InputError for files that there are not, or without SUMO; SimulatorError for what SUMO cannot read."""
        given = {"routes": routes, "vehicles": vehicles, "steps": steps, "interval": interval}
        usual = {"routes": "", "vehicles": 0, "steps": 60, "interval": 10}
        query = "&".join(f"{option}={value}" for option, value in given.items() if value != usual[option])
        name = f"sumo:{target}" + (f"?{query}" if query else "")
        if not target:
            raise InputError("sumo: name a network, as in sumo:town.net.xml")
        for file in filter(None, (target, routes)):
            if not Path(file).is_file():
                raise InputError(f"{name}: there is no file {file}")
        for option, value, least in (("vehicles", vehicles, 0), ("steps", steps, 1), ("interval", interval, 1)):
            if value < least:
                raise InputError(f"{name}: expected {option} ≥ {least}, got {value}")
        if find_spec("libsumo") is None:
            raise InputError("sumo: libsumo is not installed: pip install 'bm3il[sumo]'")
        words = [sys.executable, "-m", "bm3il.protocol.adapters.sumo_server", target]
        words += [f"--{option}={value}" for option, value in given.items()]
        self._copies = Copies(name, shlex.join(words), num_envs, 1, SECONDS, START_SECONDS)
        self.spec, self.num_envs = self._copies.spec, num_envs

    @staticmethod
    def with_files(option: str, value: str, change: Callable[[str], str]) -> str:
        """See `protocol.registry`."""
        return change(value) if option in ("target", "routes") else value

    def reset(self, seed: int, starts: Starts | None = None) -> TimeStep:
        """As `Environment.reset`. Raises InputError for given start states."""
        return self._copies.reset(seed, starts)

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        """As `Environment.step`."""
        return self._copies.step(actions)

    def close(self) -> None:
        """End the simulations."""
        self._copies.close()

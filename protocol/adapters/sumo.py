"""A traffic network of SUMO, whose vehicles choose their ways: `sumo:town.net.xml?vehicles=40`. See docs/sumo.md."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from bm3il.protocol.adapters.copies import Copies
from bm3il.protocol.environment import Starts, TimeStep
from bm3il.protocol.errors import InputError
from bm3il.protocol.specs import EnvironmentSpec

SECONDS, START_SECONDS = 60.0, 300.0


class Sumo:
    """E copies of a network, in a child process each (`protocol.adapters.sumo_server`): SUMO holds one per process.

    target: a network, `.net.xml` or `.net.xml.gz`.   routes: trips or vehicles of a `.rou.xml`, each of them an agent
    of the type that it has there, instead of random trips.   vehicles: how many; of those in `routes` the first ones,
    and 0 are all; random ones are 20 then.   steps: of an episode.   interval: seconds of a step.   closed: names of
    edges, with commas between them, that nobody may enter.
    """

    most_copies = 16  # each has a process, which takes half a second of a core to start, and tens of megabytes

    def __init__(
        self,
        num_envs: int,
        target: str = "",
        routes: str = "",
        vehicles: int = 0,
        steps: int = 60,
        interval: int = 10,
        closed: str = "",
    ) -> None:
        """Raises InputError for files that there are not, or without SUMO; SimulatorError for what SUMO cannot read."""
        given = {"routes": routes, "vehicles": vehicles, "steps": steps, "interval": interval}
        usual = {"routes": "", "vehicles": 0, "steps": 60, "interval": 10}
        query = [f"{option}={value}" for option, value in given.items() if value != usual[option]]
        unchanged = _name(target, query)
        name = _name(target, [*query, f"closed={closed}"]) if closed else unchanged
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
        self._words = [sys.executable, "-m", "bm3il.protocol.adapters.sumo_server", target]
        self._words += [f"--{option}={value}" for option, value in {**given, "closed": closed}.items()]
        self._copies = Copies(name, shlex.join(self._words), num_envs, 1, SECONDS, START_SECONDS)
        self.spec, self.num_envs = self._copies.spec, num_envs
        if closed:
            self.spec = replace(self.spec, changes=unchanged)

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

    def drives_again(self, files: Sequence[Path]) -> DrivesAgain:
        """Episodes as they were recorded, one in each file: a `.rou.xml` of vehicles, as `--vehroute-output` writes it.

        Raises InputError for a file that there is not, SimulatorError for what cannot be driven in this network.
        """
        return DrivesAgain(self.spec, self._words, files)


def _name(target: str, query: Sequence[str]) -> str:
    return f"sumo:{target}" + (f"?{'&'.join(query)}" if query else "")


class DrivesAgain:
    """Vehicles that take recorded ways: an environment, and who acts in it."""

    def __init__(self, spec: EnvironmentSpec, words: Sequence[str], files: Sequence[Path]) -> None:
        """spec: of the network.   words: the command of its simulator.   files: see `Sumo.drives_again`."""
        if missing := next((file for file in files if not file.is_file()), None):
            raise InputError(f"there is no file {missing}")
        self.spec, self.num_envs, self._files = spec, min(len(files), Sumo.most_copies), len(files)
        command = shlex.join([*words, "--follow", *map(str, files)])
        self._copies = Copies(spec.name, command, self.num_envs, 1, SECONDS, START_SECONDS)
        self._reset_count, self.left_out = 0, 0
        self._taken: list[np.ndarray] = []

    def reset(self, seed: int, starts: Starts | None = None) -> TimeStep:
        """The next files, one for each copy; the first ones again after the last."""
        self._reset_count += 1
        return self._shown(self._copies.reset(seed, starts))

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        """All go on as recorded, whatever the actions."""
        return self._shown(self._copies.step(actions))

    def act(self, now: TimeStep, generator: torch.Generator, greedy: bool = False) -> list[np.ndarray]:
        """What they do, per type [E, X_m]."""
        return self._taken

    def _shown(self, now: TimeStep) -> TimeStep:
        """What the environment itself would show; without those who do now what is none of its actions."""
        taken = [seen[..., -1].astype(np.int64) for seen in now.observations]
        active = [there & (chosen >= 0) for there, chosen in zip(now.active, taken, strict=True)]
        # Files that come round again to fill the copies were counted before.
        again = np.arange(self.num_envs) + self.num_envs * (self._reset_count - 1) >= self._files
        for there, acting in zip(now.active, active, strict=True):
            self.left_out += int((there & ~acting)[~again].sum())
        self._taken = [np.maximum(chosen, 0) for chosen in taken]
        return replace(now, observations=[seen[..., :-1] for seen in now.observations], active=active)

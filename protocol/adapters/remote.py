"""Simulators in any language: `remote:node simulator.js`, `remote:tcp://127.0.0.1:5555`. See docs/remote.md."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence

import numpy as np

from bm3il.protocol.adapters.copies import Copies
from bm3il.protocol.adapters.session import TCP
from bm3il.protocol.environment import Starts, TimeStep

SECONDS, START_SECONDS = 30.0, 120.0


class Remote:
    """E copies of a simulator that runs elsewhere, in one process or several.

    target: the command that starts it, to be spoken to through its standard input and output, or `tcp://HOST:PORT`,
    where it listens.   processes, seconds, start_seconds: see `Copies`, which also says what is raised.
    """

    def __init__(
        self,
        num_envs: int,
        target: str = "",
        processes: int = 1,
        seconds: float = SECONDS,
        start_seconds: float = START_SECONDS,
    ) -> None:
        given = {"processes": processes, "seconds": seconds, "start_seconds": start_seconds}
        usual = {"processes": 1, "seconds": SECONDS, "start_seconds": START_SECONDS}
        query = "&".join(f"{option}={value:g}" for option, value in given.items() if value != usual[option])
        name = f"remote:{target}" + (f"?{query}" if query else "")
        self._copies = Copies(name, target, num_envs, processes, seconds, start_seconds)
        self.spec, self.num_envs = self._copies.spec, num_envs

    @staticmethod
    def with_files(option: str, value: str, change: Callable[[str], str]) -> str:
        """See `protocol.registry`: the words of the command that are files."""
        if option != "target" or value.startswith(TCP):
            return value
        try:
            words = shlex.split(value)
        except ValueError:  # an error for whoever starts it
            return value
        # A program without a folder is looked for on the PATH, whatever lies in the working folder.
        changed = [change(word) if n or os.sep in word else word for n, word in enumerate(words)]
        return value if changed == words else shlex.join(changed)

    def reset(self, seed: int, starts: Starts | None = None) -> TimeStep:
        """As `Environment.reset`. Raises InputError for given start states."""
        return self._copies.reset(seed, starts)

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        """As `Environment.step`."""
        return self._copies.step(actions)

    def close(self) -> None:
        """End the simulators that were started, and hang up on the others."""
        self._copies.close()

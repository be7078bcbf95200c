"""Recording demonstrations by playing.

The demonstrations that ship with the package were made by

    bm3il demonstrations record "rover_tower?pairs=4" --episodes 100 --seed 0 --output rover_tower_8.safetensors
    bm3il demonstrations record "rover_tower?pairs=2" --episodes 100 --seed 0 --output rover_tower_4.safetensors
    bm3il demonstrations record "berlin?types=10&agents=50&sight=near" --episodes 100 --output berlin46.safetensors
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np

from bm3il.actors.rollout import Acts, rollout
from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.environment import Environment
from bm3il.protocol.errors import InputError
from bm3il.protocol.seeds import derive_seed
from bm3il.protocol.trajectories import Trajectories


@runtime_checkable
class DrawsStarts(Protocol):
    """An environment that tells its start states, so that what is recorded can be evaluated from the same ones."""

    def draw_starts(self, seed: int) -> dict[str, np.ndarray]:
        """The start states of `reset(seed)`, each [E, …], as `reset(starts=…)` takes them."""
        ...


def record(
    environment: Environment, expert: Acts, episodes: int, seed: int, origin: str, greedy: bool = False
) -> Demonstrations:
    """Let an expert play `episodes` episodes; each starts anew, so each is a group of its own.

    Raises InputError for less than one episode.
    """
    if episodes < 1:
        raise InputError(f"expected at least 1 episode to record, got {episodes}")
    played: list[Mapping[str, np.ndarray]] = []
    starts: list[dict[str, np.ndarray]] = []
    for first in range(0, episodes, environment.num_envs):
        batch_seed = derive_seed(seed, "recording", first)
        played.append(rollout(environment, expert, batch_seed, greedy).arrays)
        starts.append(environment.draw_starts(batch_seed) if isinstance(environment, DrawsStarts) else {})
    arrays = {}
    for name in played[0]:
        axis = 0 if name == "lengths" else 1
        arrays[name] = np.concatenate([batch[name] for batch in played], axis).take(range(episodes), axis)
    return Demonstrations.from_trajectories(
        Trajectories.from_arrays(arrays, environment.spec),
        environment.spec,
        origin,
        starts={name: np.concatenate([batch[name] for batch in starts])[:episodes] for name in starts[0]},
    )

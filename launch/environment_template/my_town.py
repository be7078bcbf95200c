"""Walkers and carts on a ring go to their goals. A working environment of bm3il: replace this world by your own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bm3il.protocol.environment import Starts, TimeStep
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec

PLACES, STEPS = 12, 20
STRIDES = {"walker": 1, "cart": 2}  # the types of agents, and how far each goes in a step


class MyTown:
    """E = `num_envs` copies at once; every array has them in front. Options are given in its name: my_town?carts=4"""

    def __init__(self, num_envs: int, walkers: int = 3, carts: int = 2) -> None:
        counts = {"walker": walkers, "cart": carts}
        types = tuple(TypeSpec(name, counts[name], observation_dim=2 * PLACES, action_dim=3) for name in STRIDES)
        self.spec, self.num_envs = EnvironmentSpec("my_town", types, episode_length=STEPS), num_envs

    def reset(self, seed: int, starts: Starts | None = None) -> TimeStep:
        random = np.random.default_rng(seed)  # all chance comes from here: the same seed, the same episode
        shapes = [(self.num_envs, t.count) for t in self.spec.types]
        self._places, self._goals = ([random.integers(PLACES, size=shape) for shape in shapes] for _ in range(2))
        self._steps = 0
        return self._shown()

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        self._steps += 1
        moves = [(action - 1) * stride for action, stride in zip(actions, STRIDES.values(), strict=True)]
        if self._steps <= STEPS:  # what has ended stays as it is
            self._places = [(place + move) % PLACES for place, move in zip(self._places, moves, strict=True)]
        return self._shown()

    def _shown(self) -> TimeStep:
        pairs = list(zip(self._places, self._goals, strict=True))
        one_hot = np.eye(PLACES, dtype=np.float32)
        there = [(place == goal).astype(np.float32) for place, goal in pairs]  # the true reward, for evaluation only
        return TimeStep(
            observations=[np.concatenate([one_hot[place], one_hot[goal]], axis=-1) for place, goal in pairs],
            action_masks=[np.ones((*place.shape, 3), bool) for place, _ in pairs],  # back, wait, on: all allowed
            active=[np.full(place.shape, self._steps <= STEPS) for place, _ in pairs],
            rewards=[reward * (0 < self._steps <= STEPS) for reward in there],
            terminated=np.zeros(self.num_envs, bool),
            truncated=np.full(self.num_envs, self._steps >= STEPS),
        )

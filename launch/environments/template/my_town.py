"""Walkers and carts on a ring go to their goals. A working environment of bm3il: replace this world by your own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bm3il.protocol.environment import Starts, TimeStep
from bm3il.protocol.specs import EnvironmentSpec, Part, TypeSpec

PLACES, STEPS = 11, 20
STRIDES = {"walker": 1, "cart": 2}  # the types of agents, and how far each goes in a step
SEEN = (Part("place", PLACES), Part("goal", PLACES))  # names for the numbers of an observation, in their order


class MyTown:
    """E = `num_envs` copies at once; every array has them in front. Options are given in its name: my_town?carts=4"""

    def __init__(self, num_envs: int, walkers: int = 3, carts: int = 2) -> None:
        counts = {"walker": walkers, "cart": carts}
        types = tuple(TypeSpec(name, counts[name], 2 * PLACES, action_dim=3, parts=SEEN) for name in STRIDES)
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


class Planner:
    """Knows the way. `bm3il demonstrations record my_town` lets it play; you need none if you have recordings."""

    def __init__(self, spec: EnvironmentSpec) -> None:
        pass

    def act(self, now: TimeStep, generator: Any = None, greedy: bool = False) -> list[np.ndarray]:
        chosen = []
        for seen, stride in zip(now.observations, STRIDES.values(), strict=True):
            place, goal = seen[..., :PLACES].argmax(-1), seen[..., PLACES:].argmax(-1)
            moves = (goal - place) * pow(stride, -1, PLACES) % PLACES
            chosen.append(np.where(moves == 0, 1, np.where(moves <= PLACES // 2, 2, 0)))
        return chosen

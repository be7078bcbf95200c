"""An environment of somebody's own whose copies can be divided among processes, with observations of all kinds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bm3il.protocol.environment import Starts, TimeStep, compact_step
from bm3il.protocol.errors import InputError
from bm3il.protocol.observations import forms
from bm3il.protocol.seeds import derive_seed
from bm3il.protocol.specs import EnvironmentSpec, Part, TypeSpec

PLACES = 4
PARTS = (Part("place", PLACES, "code"), Part("fuel", 2), Part("hour", 1, "shared"), Part("camera", 3, "uint8"))
NEXT = (("place", ((0, 1), (1, 2), (2, 3), (3, 0))),)


class OwnTown:
    """Two types of cars and one of gliders, each copy with chances of its own; `reset` takes hours to start at."""

    def __init__(self, num_envs: int, cars: int = 2, first_copy: int = 0) -> None:
        self.num_envs, self.first_copy = num_envs, first_copy
        kinds = [TypeSpec(name, cars, 10, PLACES, parts=PARTS, mask="place") for name in ("red", "blue")]
        self.spec = EnvironmentSpec("own_town", (*kinds, TypeSpec("glider", 1, 1, 3, False)), 5, tables=NEXT)
        self.tables = [form.table_of(num_envs) for form in forms(self.spec)]

    def reset(self, seed: int, starts: Starts | None = None) -> TimeStep:
        if starts and "hours" not in starts:
            raise InputError(f"expected hours, got {', '.join(starts)}")
        copies = range(self.first_copy, self.first_copy + self.num_envs)
        self.random = [np.random.default_rng(derive_seed(seed, copy)) for copy in copies]
        self.hours = np.array(starts["hours"] if starts else np.zeros(self.num_envs), np.float32)
        self.steps = 0
        return self.shown([np.zeros((self.num_envs, t.count)) for t in self.spec.types])

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        self.steps += 1
        self.hours += 1
        return self.shown([np.asarray(a, np.float32).reshape(self.num_envs, -1)[:, :1] for a in actions])

    def shown(self, rewards: list[np.ndarray]) -> TimeStep:
        drawn = np.stack([random.integers(0, PLACES, 60) for random in self.random])
        columns = [
            {name: self.filled(name, np.dtype(dtype), shape, drawn) for name, (dtype, shape) in table.items()}
            for table in self.tables
        ]
        agents = [(self.num_envs, t.count) for t in self.spec.types]
        ended = np.full(self.num_envs, self.steps == self.spec.episode_length)
        active = [np.ones(shape, bool) for shape in agents]
        given = [np.broadcast_to(r, shape).astype(np.float32) for r, shape in zip(rewards, agents, strict=True)]
        return compact_step(self.spec, columns, active, given, drawn[:, 0] > PLACES, ended)

    def filled(self, name: str, dtype: np.dtype, shape: tuple[int, ...], drawn: np.ndarray) -> np.ndarray:
        if name == "shared":
            return self.hours[:, None].copy()
        if name == "masks":
            return np.ones(shape, dtype)
        size = int(np.prod(shape[1:]))
        return drawn[:, :size].reshape(shape).astype(dtype)

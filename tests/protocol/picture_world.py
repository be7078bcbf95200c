"""A parallel environment of PettingZoo's kind whose agents see pictures: `pettingzoo:picture_world`."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

Seen = dict[str, Any]


class Pictures:
    """Agents on a line of `side` places: each sees a picture with itself in it, and how often it went right."""

    def __init__(self, agents: int = 5, side: int = 84, max_cycles: int = 8, quirk: str = "") -> None:
        self.possible_agents = [f"eye_{number}" for number in range(agents)]
        self.side, self.max_cycles, self.quirk, self.unwrapped = side, max_cycles, quirk, self

    def observation_space(self, name: str) -> Any:
        picture = spaces.Box(0, 255, (self.side, self.side, 3), np.uint8)
        counts = {"moves": spaces.Box(-500, 500, (1,), np.int64), "last": spaces.Discrete(3)}
        entries = {"picture": picture, **counts, "lamps": spaces.MultiBinary(2), "speed": spaces.Box(-1, 1, (1,))}
        return spaces.Dict(entries) if self.quirk == "dict" else picture

    def action_space(self, name: str) -> Any:
        return spaces.Discrete(3)

    def reset(self, seed: int) -> tuple[Seen, Seen]:
        self.agents, self.steps = list(self.possible_agents), 0
        random = np.random.default_rng(seed)
        self.place = {name: int(random.integers(self.side)) for name in self.agents}
        return self.observed(), {}

    def step(self, actions: dict[str, int]) -> tuple[Any, ...]:
        self.steps += 1
        for name, action in actions.items():
            self.place[name] = (self.place[name] + action - 1) % self.side
        rewards = {name: -self.place[name] / self.side for name in self.agents}
        over = dict.fromkeys(self.agents, self.steps >= self.max_cycles)
        result = self.observed(), rewards, dict.fromkeys(self.agents, False), over, {}
        self.agents = [] if self.steps >= self.max_cycles else self.agents
        return result

    def observed(self) -> Seen:
        return {name: self.seen(self.place[name]) for name in self.possible_agents}

    def seen(self, place: int) -> Any:
        picture = np.zeros((self.side, self.side, 3), np.uint8)
        picture[:, place] = 255, 128, self.steps
        if self.quirk == "scaled":
            return picture / np.float32(255)
        if self.quirk != "dict":
            return picture
        return {
            "picture": picture,
            "moves": np.array([-400 + self.steps]),
            "last": self.steps % 3,
            "lamps": np.array([1, 0], np.int8),
            "speed": np.array([0.25], np.float32),
        }

    def close(self) -> None:
        self.agents = []


parallel_env = Pictures

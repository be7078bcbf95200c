"""A world of Gymnasium for the tests, which children of a pool find, too: `gymnasium:small_worlds:Small-v0`."""

from __future__ import annotations

import os
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

OBSERVED: dict[str, Any] = {
    "box": spaces.Box(-9, 9, (2,), np.float32),
    "dict": spaces.Dict({"level": spaces.Discrete(3), "place": spaces.Box(-9, 9, (2,))}),
    "words": spaces.Sequence(spaces.Discrete(3)),
}
DONE: dict[str, Any] = {
    "three": spaces.Discrete(3, start=5),
    "lever": spaces.Box(np.array([0, -1], np.float32), np.array([4, 3], np.float32)),
    "any": spaces.Box(-np.inf, np.inf, (1,)),
    "pair": spaces.MultiDiscrete([2, 2]),
}
MASKS = {"some": [1, 0, 1], "none": [0, 0, 0], "few": [1, 1]}


class Small(gymnasium.Env):
    """Walks at random, and ends in every fourth step or so. It keeps what it was told to do.

    observed, done: which spaces.   seconds: how long a step takes.   masked: what infos hold of masks.
    bad_step: the step in which it does what `fault` says.
    """

    def __init__(
        self,
        observed: str = "box",
        done: str = "three",
        seconds: float = 0,
        masked: str = "",
        bad_step: int = 0,
        fault: str = "raise",
    ) -> None:
        if fault == "make":
            raise RuntimeError("no such\nland")
        self.observation_space, self.action_space = OBSERVED[observed], DONE[done]
        self.seconds, self.masked, self.bad_step, self.fault = seconds, masked, bad_step, fault
        self.told: list[Any] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.place, self.steps = self.np_random.uniform(-1, 1, 2).astype(np.float32), 0
        return self.seen(), self.info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        time.sleep(self.seconds)
        self.told.append(action)
        self.steps += 1
        if self.steps == self.bad_step:
            self.go_wrong()
        self.place += self.np_random.uniform(-1, 1, 2).astype(np.float32) * float(np.mean(action))
        return self.seen(), float(self.place[0]), bool(self.np_random.random() < 0.25), False, self.info()

    def seen(self) -> Any:
        named = isinstance(self.observation_space, spaces.Dict)
        return {"level": self.steps % 3, "place": self.place} if named else self.place

    def info(self) -> dict[str, Any]:
        return {"action_mask": np.array(MASKS[self.masked], np.int8)} if self.masked else {}

    def go_wrong(self) -> None:
        if self.fault == "exit":
            os._exit(3)
        if self.fault == "hang":
            time.sleep(1e3)
        raise ValueError("the land has no such place")


gymnasium.register("Small-v0", entry_point=Small, max_episode_steps=6)
gymnasium.register("Endless-v0", entry_point=Small)

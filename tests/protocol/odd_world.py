"""Parallel environments of PettingZoo's kind that are odd in one way: `pettingzoo:odd_world?arguments=quirk:NAME`."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

LENGTH, HALF = 8, 3
ALLOWED = np.array([0, 1, 1], np.int8)


class Odd:
    """Ants and bees count the steps of an episode; what else is odd about them follows `quirk`."""

    def __init__(self, quirk: str = "", max_cycles: int = 0) -> None:
        if quirk == "no licence":
            raise RuntimeError("no licence\nfor this simulator")
        if quirk == "no answer":
            raise TimeoutError("no answer")
        if quirk == "hidden need":
            raise ModuleNotFoundError("No module named 'ancient'", name="ancient")
        self.quirk, self.unwrapped, self.played = quirk, self, 0
        self.everybody: list[Any] = ["ant_0", "ant_1", "bee_0"]
        if quirk == "numbers":
            self.everybody = [0, 1, 2]
        if quirk != "silent":
            self.possible_agents = self.everybody
        self.length = max_cycles or LENGTH
        if quirk != "endless":
            self.max_cycles = LENGTH

    def observation_space(self, name: Any) -> Any:
        box = spaces.Box(-np.inf, np.inf, (2,))
        if self.quirk == "no space":
            return {"ant_0": box}[name]
        if self.quirk == "wrapped":
            more = {"where": box, "what": spaces.Discrete(3)}
            return spaces.Dict({**more, "action_mask": spaces.MultiBinary(3)})
        odd = {"graph": spaces.Sequence(box), "dictionary": spaces.Dict({"where": box, "what": spaces.Discrete(3)})}
        return odd.get(self.quirk, box)

    def action_space(self, name: Any) -> Any:
        return spaces.Discrete(3)

    def seen(self, name: Any) -> Any:
        value = np.array([self.steps, self.start], np.float32)
        match self.quirk:
            case "remembers":
                value[0] += self.played
            case "heedless":
                value[1] = np.random.default_rng().random()
            case "grows" if self.steps == HALF:
                value = np.append(value, value)
            case "shrinks" if self.steps == HALF:
                value = value[:1]
            case "words" if self.steps == HALF:
                return np.array(["north", "west"])
            case "dictionary":
                return {"where": value} if self.steps == HALF else {"where": value, "what": 1}
            case "wrapped":
                return {"where": value, "what": 1, "action_mask": ALLOWED}
        return value

    def infos(self) -> dict[Any, Any]:
        width = 2 if self.quirk == "narrow mask" else 3
        masked = self.quirk in ("masks in infos", "narrow mask")
        return {name: {"action_mask": ALLOWED[:width]} if masked else {} for name in self.agents}

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        self.start, self.steps = (seed or 0) % 97, 0
        self.agents = list(self.everybody)
        if self.quirk == "relay":
            self.agents = ["ant_0", "ant_1"]
        if self.quirk == "nobody at first":
            self.agents = []
        observations = {name: self.seen(name) for name in self.agents}
        return observations if self.quirk == "old reset" else (observations, self.infos())

    def step(self, actions: dict[Any, Any]) -> tuple[Any, ...]:
        assert set(actions) == set(self.agents)
        self.steps += 1
        self.played += 1
        before = list(self.agents)
        over = self.steps == self.length and self.quirk != "endless"
        terminated, truncated = dict.fromkeys(before, False), dict.fromkeys(before, over)
        rewards = {name: float(actions[name]) for name in before}
        half = self.steps == HALF
        if self.quirk == "relay" and half:
            terminated = dict.fromkeys(before, True)
        if self.quirk == "mixed end" and half:
            terminated["ant_0"], truncated = True, {"ant_1": True, "bee_0": True}
        if self.quirk == "dies and stays" and self.steps >= HALF:
            terminated["ant_0"] = True
        self.agents = [name for name in before if not (terminated.get(name) or truncated.get(name))]
        if self.quirk == "dies and stays" and self.agents:
            self.agents = before
        if self.quirk == "relay" and half:
            self.agents = ["bee_0"]
        if self.quirk == "nobody at first" and half:
            self.agents = list(self.everybody)
        if self.quirk == "stranger" and half:
            self.agents.append("cat_0")
        observations = {name: self.seen(name) for name in {*before, *self.agents}}
        if half and self.quirk == "unseen":
            del observations["ant_1"]
        if self.quirk == "no last words" and over:
            observations, terminated, truncated = {}, dict.fromkeys(before, True), {}
        if self.quirk == "few keys":
            del rewards["ant_1"], terminated["ant_1"], truncated["bee_0"]
        if self.quirk == "old step":
            return observations, rewards, truncated, self.infos()
        return observations, rewards, terminated, truncated, self.infos()

    def close(self) -> None:
        self.agents = []


class Unseeded(Odd):
    """Of the time before seeds came with `reset`."""

    def reset(self) -> Any:  # type: ignore[override]
        return super().reset()


def parallel_env(quirk: str = "", **options: Any) -> Any:
    return (Unseeded if quirk == "unseeded" else Odd)(quirk, **options)

"""A turn-based game of PettingZoo's kind that has its masks in the infos: `pettingzoo:turn_world`."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from pettingzoo import AECEnv


class Counting(AECEnv[str, Any, Any]):
    """Players count in turn, and may only do 1. A move is `fatal` to who does it, or all stop after `max_cycles`."""

    def __init__(self, players: int = 2, max_cycles: int = 6, fatal: int = 0, continuous: bool = False) -> None:
        super().__init__()
        self.metadata = {"name": "turn_world"}
        self.possible_agents = [f"player_{number}" for number in range(players)]
        self.max_cycles, self.fatal, self.continuous = max_cycles, fatal, continuous

    def observation_space(self, agent: str) -> Any:
        return spaces.Box(0, 100, (1,))

    def action_space(self, agent: str) -> Any:
        return spaces.Box(-1, 1, (1,)) if self.continuous else spaces.Discrete(2)

    def observe(self, agent: str) -> Any:
        return np.array([self.moves], np.float32)

    def reset(self, seed: int | None = None, options: Any = None) -> None:
        self.agents, self.moves = list(self.possible_agents), 0
        self.rewards, self._cumulative_rewards = dict.fromkeys(self.agents, 0.0), dict.fromkeys(self.agents, 0.0)
        self.terminations, self.truncations = dict.fromkeys(self.agents, False), dict.fromkeys(self.agents, False)
        self.infos = {name: {"action_mask": np.array([0, 1], np.int8)} for name in self.agents}
        self.agent_selection = self.agents[0]

    def step(self, action: Any) -> None:
        if self.terminations[self.agent_selection] or self.truncations[self.agent_selection]:
            self._was_dead_step(action)
            return
        if action != 1:
            raise ValueError(f"{self.agent_selection} did {action}, which its mask forbids")
        name, self.moves = self.agent_selection, self.moves + 1
        self.rewards = dict.fromkeys(self.agents, 0.0) | {name: 1.0}
        if self.fatal:
            self.terminations[name] = True
        elif self.moves == self.max_cycles * len(self.possible_agents):
            self.truncations = dict.fromkeys(self.agents, True)
        self.agent_selection = self.agents[(self.agents.index(name) + 1) % len(self.agents)]
        self._deads_step_first()


env = Counting

"""Games in which one agent moves after the other (PettingZoo's AEC API), in joint steps."""

from __future__ import annotations

from typing import Any

import numpy as np

from bm3il.protocol.adapters.spaces import MASK, parted, unmasked
from bm3il.protocol.errors import InputError


class Turns:
    """An AEC environment behind the parallel API: one joint step is one turn, and those who do not move wait.

    To wait is an action of its own, the last one, and the only one that their masks allow; who moves may not wait, and
    may do what the game's mask allows. So nobody can move out of turn or against the rules, what is recorded is what
    was done, and a reward that comes in another's turn (the loser's) is still that agent's. Were those who wait
    inactive instead, each turn would look like the end of an agent's life: nothing is bootstrapped through that.
    PettingZoo's `turn_based_aec_to_parallel` takes moves of all agents and drops all but one, which would be imitated.

    Masks come in the infos, also if the game has them in its observations.
    """

    def __init__(self, env: Any, whose: str) -> None:
        """Raises InputError, naming `whose`, for actions that are not discrete: these have no masks."""
        from gymnasium import spaces

        self._env, self.unwrapped = env, env.unwrapped
        self.possible_agents = list(env.possible_agents)
        self.agents: list[Any] = []
        self._acts: dict[Any, Any] = {}
        for name in self.possible_agents:
            if not isinstance(acts := env.action_space(name), spaces.Discrete):
                raise InputError(f"{whose}: {name} moves in its turn, so its actions must be discrete, got {acts}")
            self._acts[name] = spaces.Discrete(int(acts.n) + 1, start=int(acts.start))

    @property
    def turns(self) -> int:
        """Joint steps in which each agent moves once."""
        return len(self.possible_agents)

    def observation_space(self, name: Any) -> Any:
        """Without the mask."""
        return unmasked(self._env.observation_space(name))

    def action_space(self, name: Any) -> Any:
        """With one more, to wait."""
        return self._acts[name]

    def reset(self, seed: int) -> tuple[dict[Any, Any], dict[Any, Any]]:
        """As of the parallel API."""
        self._env.reset(seed=seed)
        self.agents = list(self._env.agents)
        return self._seen(self.agents)

    def step(self, actions: dict[Any, Any]) -> tuple[dict[Any, Any], ...]:
        """The move of the one whose turn it is; then those who are dead leave, as the API wants it."""
        env = self._env
        env.step(actions[env.agent_selection])
        rewards, terminated, truncated = dict(env.rewards), dict(env.terminations), dict(env.truncations)
        last, infos = self._seen([name for name in env.agents if terminated[name] or truncated[name]])
        while env.agents and (env.terminations[env.agent_selection] or env.truncations[env.agent_selection]):
            env.step(None)
        self.agents = list(env.agents)
        observations, masks = self._seen(self.agents)
        return last | observations, rewards, terminated, truncated, infos | masks

    def close(self) -> None:
        """Free what the environment holds."""
        self._env.close()

    def _seen(self, agents: list[Any]) -> tuple[dict[Any, Any], dict[Any, Any]]:
        observations, infos = {}, {}
        for name in agents:
            observations[name], mask = parted(self._env.observe(name))
            infos[name] = {MASK: self._mask(name, mask)}
        return observations, infos

    def _mask(self, name: Any, of_game: Any) -> np.ndarray:
        mask = np.zeros(int(self._acts[name].n), bool)
        if name != self._env.agent_selection:
            mask[-1] = True
            return mask
        of_game = self._env.infos[name].get(MASK) if of_game is None else of_game
        mask[:-1] = True if of_game is None or not np.any(of_game) else np.asarray(of_game, bool)
        return mask

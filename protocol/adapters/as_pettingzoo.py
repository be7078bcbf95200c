"""An environment of ours behind PettingZoo's parallel API."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from gymnasium import spaces
from pettingzoo import ParallelEnv

from bm3il.protocol.adapters.spaces import MASK, OBSERVATION
from bm3il.protocol.environment import Environment, TimeStep
from bm3il.protocol.errors import InputError
from bm3il.protocol.specs import FREE, TypeSpec

NOT_DONE = "an action that its mask forbids is not done: the agent does the first one that is allowed"


class AsParallel(ParallelEnv[str, Any, Any]):
    """The one copy of an environment (E = 1). Agents are `TYPE_0`, `TYPE_1`, …

    Observations are float32 boxes, [O_m]; those of agents with action masks are dictionaries of such an `observation`
    and an `action_mask`, [A_m] int8, as in PettingZoo's games: whoever samples there finds the mask. An action that it
    forbids does what the first allowed one does, with a warning. Continuous actions lie in [-1, 1].
    An agent that becomes inactive has terminated; all of its observation is 0 then. Steps in which nobody is active are
    passed over, since a loop of PettingZoo ends where nobody is left: the next that is shown has all rewards since.
    """

    def __init__(self, environment: Environment) -> None:
        """places: of each agent by its name, the number of its type, and its own there."""
        self.inner, self.spec = environment, environment.spec
        self.metadata = {"name": self.spec.name, "is_parallelizable": True, "render_modes": []}
        self.render_mode = None
        self.max_cycles = self.spec.episode_length
        self.places = {f"{t.name}_{x}": (m, x) for m, t in enumerate(self.spec.types) for x in range(t.count)}
        self.possible_agents, self.agents = list(self.places), list[str]()
        self.observation_spaces = {name: _seen_by(self.spec.types[m]) for name, (m, _) in self.places.items()}
        self.action_spaces = {name: _done_by(self.spec.types[m]) for name, (m, _) in self.places.items()}
        self._random = np.random.default_rng()

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        """What this agent observes."""
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Space[Any]:
        """What this agent may do, mask aside."""
        return self.action_spaces[agent]

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode. Without a seed it is the next one after that of the last seed; options say nothing."""
        if seed is None:
            seed = int(self._random.integers(1 << 62))
        else:
            self._random = np.random.default_rng(seed)
        self._show(self._passed_over(self.inner.reset(seed))[0])
        self.agents = self._active
        return self._observed(self.agents), {name: {} for name in self.agents}

    def step(self, actions: dict[str, Any]) -> tuple[dict[str, Any], ...]:
        """One joint step, with an action of each living agent. Those who have come are among the observations.

        Raises InputError for what is no action.
        """
        before = self.agents
        now, gained = self._passed_over(self.inner.step(self._joint(actions)))
        self._show(now)
        terminated, truncated = bool(now.terminated[0]), bool(now.truncated[0])
        here = [*before, *(name for name in self._active if name not in before)]
        rewards = {name: float(gained[m][x]) for name in here for m, x in (self.places[name],)}
        died = {name: terminated or name not in self._active for name in here}
        cut = {name: truncated and not died[name] for name in here}
        self.agents = [name for name in here if not (died[name] or cut[name])]
        return self._observed(here), rewards, died, cut, {name: {} for name in here}

    def close(self) -> None:
        """Free what the environment holds, if it can."""
        if (close := getattr(self.inner, "close", None)) is not None:
            close()

    def _passed_over(self, now: TimeStep) -> tuple[TimeStep, list[np.ndarray]]:
        """The first step from this one on in which somebody is there or the episode has ended; rewards [X_m] so far."""
        gained = [rewards[0].copy() for rewards in now.rewards]  # the next step may be written over them
        for _ in range(self.spec.episode_length):  # and not for ever in one that does not end as it should
            if any(active[0].any() for active in now.active) or now.terminated[0] or now.truncated[0]:
                break
            self._show(now)  # the masks, for actions that are allowed
            now = self.inner.step(self._joint({}))
            gained = [so_far + rewards[0] for so_far, rewards in zip(gained, now.rewards, strict=True)]
        return now, gained

    def _show(self, now: TimeStep) -> None:
        self._seen, self._masks = (
            [np.array(part[0]) for part in parts] for parts in (now.observations, now.action_masks)
        )
        self._active = [name for name, (m, x) in self.places.items() if now.active[m][0, x]]

    def _observed(self, agents: list[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in agents:
            m, x = self.places[name]
            seen = self._seen[m][x] if name in self._active else np.zeros_like(self._seen[m][x])
            found[name] = (
                {OBSERVATION: seen, MASK: self._masks[m][x].astype(np.int8)} if _has_masks(self.spec.types[m]) else seen
            )
        return found

    def _joint(self, actions: dict[str, Any]) -> list[np.ndarray]:
        """[1, X_m] or [1, X_m, A_m] per type; of those who do nothing the first that is allowed, which nobody reads."""
        joint = [
            mask.argmax(axis=-1) if t.discrete else np.zeros(mask.shape, np.float32)
            for t, mask in zip(self.spec.types, self._masks, strict=True)
        ]
        for name, action in actions.items():
            m, x = self.places[name]
            if not self.spec.types[m].discrete:
                joint[m][x] = action
                continue
            if not 0 <= int(action) < self.spec.types[m].action_dim:  # below 0 it would be counted from the last
                raise InputError(f"{name}: expected an action in 0..{self.spec.types[m].action_dim - 1}, got {action}")
            if self._masks[m][x, int(action)]:
                joint[m][x] = int(action)
            else:
                warnings.warn(NOT_DONE, stacklevel=3)
        return [array[None] for array in joint]


def _has_masks(kind: TypeSpec) -> bool:
    return kind.discrete and kind.mask != FREE


def _seen_by(kind: TypeSpec) -> spaces.Space[Any]:
    seen = spaces.Box(-np.inf, np.inf, (kind.observation_dim,), np.float32)
    if not _has_masks(kind):
        return seen
    return spaces.Dict({OBSERVATION: seen, MASK: spaces.Box(0, 1, (kind.action_dim,), np.int8)})


def _done_by(kind: TypeSpec) -> spaces.Space[Any]:
    return spaces.Discrete(kind.action_dim) if kind.discrete else spaces.Box(-1.0, 1.0, (kind.action_dim,), np.float32)

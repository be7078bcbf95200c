"""Recording whoever plays in a loop of PettingZoo's parallel API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bm3il.protocol.adapters.pettingzoo import PettingZooParallel
from bm3il.protocol.adapters.spaces import MASK, parted, reader, unmasked
from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.errors import InputError
from bm3il.protocol.perturbation import unperturbed
from bm3il.protocol.recordings.recording import Recording
from bm3il.protocol.recordings.spaces import unit
from bm3il.protocol.registry import make_environment
from bm3il.protocol.specs import EnvironmentSpec


@dataclass
class _Moment:
    """What an agent saw, might do (None: all) and did in a step, and what it got for that."""

    observation: np.ndarray
    mask: np.ndarray | None
    action: np.ndarray
    reward: float = 0.0


class Recorder:
    """A parallel environment of PettingZoo, or `bm3il.as_parallel_env(NAME)`, that remembers the episodes that anybody
    plays in it:

        env = bm3il.Recorder(simple_tag_v3.parallel_env(), "pettingzoo:mpe2.simple_tag_v3")
        observations, infos = env.reset(seed=1)
        while env.agents:
            observations, *_ = env.step({agent: my_rule(observations[agent]) for agent in env.agents})
        env.save("mine.safetensors")

    name: what `bm3il train --environment` calls the same environment, with its arguments.
    Whatever else the environment has, the recorder has, too. An episode that is left before its end is kept so far.
    """

    def __init__(self, env: Any, name: str) -> None:
        """Raises InputError if `env` is neither of them, or `name` one of other agents."""
        world = unperturbed(make_environment(name, 1))
        # What is played tells whom its names mean: as_parallel_env has its own, also of an environment of PettingZoo.
        if is_ours := isinstance(getattr(env, "spec", None), EnvironmentSpec):
            places = env.places
        else:
            places = world.places if isinstance(world, PettingZooParallel) else None
        if places is None:
            raise InputError(
                "a recorder is for environments of PettingZoo, pettingzoo:MODULE, and for bm3il.as_parallel_env(NAME), "
                f"got another, and '{name}'"
            )
        self.env, self._spec, self._places = env, world.spec, places
        if unknown := [str(agent) for agent in env.possible_agents if agent not in self._places]:
            known = ", ".join(map(str, self._places))
            raise InputError(f"'{name}' has the agents {known}, and not {', '.join(unknown)}: name what is recorded")
        if is_ours and (difference := world.spec.difference(env.spec)):
            raise InputError(f"'{name}' is another environment than is played ({difference}): name what is recorded")
        self._episodes: list[list[dict[Any, _Moment]]] = []
        self._observations: Mapping[Any, Any] = {}
        self._infos: Mapping[Any, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "env":  # it is not there while a copy is made
            raise AttributeError(name)
        return getattr(self.env, name)

    def reset(self, *args: Any, **kwargs: Any) -> Any:
        """As the environment's; a new episode begins."""
        came = self.env.reset(*args, **kwargs)
        self._observations, self._infos = came if isinstance(came, tuple) else (came, {})
        self._episodes.append([])
        return came

    def step(self, actions: Mapping[Any, Any]) -> Any:
        """As the environment's. Raises InputError for observations and actions of another environment's widths."""
        acting = [agent for agent in self.env.agents if agent in actions and agent in self._observations]
        # Before the step, in which an environment may write over what it has shown.
        moments = {agent: self._moment(agent, actions[agent]) for agent in acting}
        came = self.env.step(actions)
        self._observations, rewards, _, _, self._infos = came
        for agent, moment in moments.items():
            moment.reward = float(rewards.get(agent, 0.0))
        self._episodes[-1].append(moments)
        return came

    def demonstrations(self, origin: str = "recorded") -> Demonstrations:
        """All episodes so far. Raises InputError, naming episode, step and agent, for what cannot be meant."""
        episodes = [episode for episode in self._episodes if episode]
        if not episodes:
            raise InputError(
                "nothing is recorded yet: call reset and step of the recorder, in place of the environment's"
            )
        return self._recording(episodes).demonstrations(self._spec, origin)

    def save(self, path: str | Path) -> None:
        """Write all episodes so far, for `bm3il train --demonstrations`. Raises InputError as `demonstrations`, and for
        a file that cannot be written."""
        self.demonstrations().save(path)

    def _moment(self, agent: Any, action: Any) -> _Moment:
        seen, mask = parted(self._observations[agent])
        mask = (self._infos.get(agent) or {}).get(MASK) if mask is None else mask
        observation = np.array(reader(str(agent), unmasked(self.env.observation_space(agent)))(seen), np.float32)
        space, kind = self.env.action_space(agent), self._spec.types[self._places[agent][0]]
        done = np.asarray(int(action) - int(space.start)) if kind.discrete else unit(space, np.asarray(action))
        if len(observation) != kind.observation_dim or done.shape != (() if kind.discrete else (kind.action_dim,)):
            raise InputError(
                f"{agent} observes {len(observation)} numbers and does {list(done.shape)}, in '{self._spec.name}' "
                f"{kind.observation_dim} and {kind.action_dim}: name what is recorded, with its arguments"
            )
        return _Moment(observation, _some(agent, mask, kind.action_dim) if kind.discrete else None, done)

    def _recording(self, episodes: list[list[dict[Any, _Moment]]]) -> Recording:
        lengths = np.array([len(episode) for episode in episodes])
        steps, agents = [step for episode in episodes for step in episode], [t.count for t in self._spec.types]
        kinds, rows = self._spec.types, len(steps)
        observations = [np.zeros((rows, t.count, t.observation_dim), np.float32) for t in kinds]
        actions = [
            np.zeros((rows, t.count), np.int64) if t.discrete else np.zeros((rows, t.count, t.action_dim), np.float32)
            for t in kinds
        ]
        masks = [np.ones((rows, t.count, t.action_dim), bool) for t in kinds]
        active = [np.zeros((rows, count), bool) for count in agents]
        returns = np.zeros((len(episodes), self._spec.num_agents))
        episode_of = np.repeat(np.arange(len(episodes)), lengths)
        for row, step in enumerate(steps):
            for agent, moment in step.items():
                m, x = self._places[agent]
                observations[m][row, x], actions[m][row, x], active[m][row, x] = moment.observation, moment.action, True
                if moment.mask is not None:
                    masks[m][row, x] = moment.mask
                returns[episode_of[row], self._spec.offsets[m] + x] += moment.reward
        names = {place: agent for agent, place in self._places.items()}

        def place(m: int, row: int, x: int) -> str:
            episode = int(episode_of[row])
            return f"episode {episode}, step {row - int(lengths[:episode].sum())}, {names[m, x]}"

        return Recording(
            observations=observations,
            actions=actions,
            active=active,
            action_masks=masks,
            episode_lengths=lengths,
            returns=returns,
            place=place,
        )


def _some(agent: Any, mask: Any, actions: int) -> np.ndarray | None:
    """The actions that are allowed, copied; None where it allows all, or none at all."""
    allowed = np.ones(actions, bool) if mask is None else np.array(mask, bool).reshape(-1)
    if len(allowed) != actions:
        raise InputError(f"{agent}: expected a mask of {actions} actions, got one of {len(allowed)}")
    return allowed if allowed.any() and not allowed.all() else None

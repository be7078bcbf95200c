"""Environments of PettingZoo, e.g. `pettingzoo:mpe2.simple_spread_v3?arguments=N:5,max_cycles:50`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from bm3il.protocol.adapters import spaces
from bm3il.protocol.adapters.options import agents_by_type, arguments_of
from bm3il.protocol.adapters.pettingzoo_modules import maker, steps_of
from bm3il.protocol.environment import Starts, TimeStep, compact_step
from bm3il.protocol.errors import InputError
from bm3il.protocol.observations import Run, forms
from bm3il.protocol.seeds import small_seed
from bm3il.protocol.specs import EnvironmentSpec, Part, TypeSpec


class _Agent(NamedTuple):
    """Where an agent stands in our arrays, and how it observes.

    m, x: type and number in it.   b, place: block and number in that.   runs: of its block's observations; None if all
    of it is one run of numbers of its own.   allowed: how many actions its mask is of; 0 if they are continuous.
    """

    name: str
    m: int
    x: int
    b: int
    place: int
    read: Callable[[Any], np.ndarray]
    runs: tuple[Run, ...] | None
    allowed: int


class PettingZooParallel:
    """E copies of an environment of PettingZoo, stepped one after the other.

    target: a module that offers `parallel_env`, or `env` of a turn-based game (`protocol.adapters.turns`).
    arguments: what it is called with, `NAME:VALUE,…`, values as JSON (text without quotes is text).
    types: groups of agents, `agent_0+agent_1,adversary_0`; without it, agents whose names differ by a trailing number
    are of one type.
    episode_length: after as many steps an episode is cut off; without it, the `max_cycles` given in the arguments, or
    the environment's own.
    anew: copies are made anew for every episode, for an environment that is not as new after `reset`.

    Box actions are scaled from [-1, 1] to the box. Masks are the `action_mask` of an observation, or of the infos.
    Entries of a dictionary are named parts of the observation (`--reward.sees`). Those of spaces of integers (images,
    counts, one-hots) are kept as integers, where these are small; their values go into networks as they are.
    An agent that dies is inactive from then on, and sees zeros; one of whose reward nothing is said gets 0. An episode
    ends when nobody is left of those who were there: terminated if all who lived to see it terminated, else truncated,
    with those active who did not terminate.
    """

    def __init__(
        self,
        num_envs: int,
        target: str = "",
        arguments: str = "",
        types: str = "",
        episode_length: int = 0,
        anew: bool = False,
        first_copy: int = 0,
        drawn: bool = False,
    ) -> None:
        """first_copy: number of the first copy (`protocol.pool`).   drawn: whether `render` will be called, which most
        environments must know beforehand.

        Raises InputError for a module that is missing or offers no environment, one that cannot be made, and for
        agents of one type with different spaces, or spaces that are neither discrete nor boxes."""
        if num_envs < 1:
            raise InputError(f"pettingzoo: expected num_envs ≥ 1, got {num_envs}")
        self._whose = f"pettingzoo:{target}"
        self._make = maker(target, arguments, drawn)
        self._envs = [self._make() for _ in range(num_envs)]
        self.num_envs, self._anew, self._used = num_envs, anew, False
        self._first_copy = first_copy
        first = self._envs[0]
        names = _announced(first)
        if not names:
            raise InputError(f"{self._whose} does not tell its agents: name them in possible_agents")
        groups = agents_by_type(names, types)
        steps = episode_length or steps_of(first, arguments_of(arguments))
        if steps < 1:
            raise InputError(f"{self._whose} does not tell how long an episode is: give ?episode_length=")
        seen, acts = ({name: self._space(first, of, name) for name in names} for of in ("observation", "action"))
        kinds = tuple(self._type(kind, group, seen, acts) for kind, group in groups.items())
        given = {"arguments": arguments, "types": types, "episode_length": episode_length, "anew": "true" * anew}
        query = "&".join(f"{option}={value}" for option, value in given.items() if value)
        view = self._whose + (f"?arguments={arguments}" if arguments else "")
        self.spec = EnvironmentSpec(self._whose + (f"?{query}" if query else ""), kinds, steps, view)
        self._agents = self._places(list(groups.values()), seen)
        self._takers = [spaces.taker([acts[name] for name in group]) for group in groups.values()]
        self._now, self._columns = self._empty()
        self._alive: list[list[Any]] = [[] for _ in self._envs]
        self._ended, self._lived = np.ones(num_envs, bool), np.zeros(num_envs, bool)
        self._steps = 0

    @property
    def places(self) -> dict[Any, tuple[int, int]]:
        """Name of each agent → the number of its type, and its own among those of the type."""
        return {name: (agent.m, agent.x) for name, agent in self._agents.items()}

    def reset(self, seed: int, starts: Starts | None = None) -> TimeStep:
        """Start E new episodes; each copy has a seed of its own. Raises InputError for given start states."""
        if starts:
            raise InputError(f"{self.spec.name} cannot start from given states: choose --evaluation.starts fresh")
        if self._anew and self._used:
            self.close()  # all of them first: some close what they share
            self._envs = [self._make() for _ in self._envs]
        self._clear()
        self._used, self._steps = True, 0
        for flags in (self._ended, self._lived, self._now.terminated, self._now.truncated):
            flags[:] = False
        for e, env in enumerate(self._envs):
            first = env.reset(seed=small_seed(seed, "pettingzoo", self._first_copy + e))
            observations, infos = first if isinstance(first, tuple) else (first, {})
            self._show(e, observations, infos, list(env.agents))
        return self._now

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        """Advance all copies that have not ended. actions: per type [E, X_m] integers, or [E, X_m, A_m] in [-1, 1].

        Raises InputError for what PettingZoo's API does not allow.
        """
        chosen = [take(action) for take, action in zip(self._takers, actions, strict=True)]
        self._clear()
        self._steps += 1
        for e, env in enumerate(self._envs):
            if not self._ended[e]:
                self._step(e, env, [of_type[e] for of_type in chosen])
        return self._now

    def render(self) -> np.ndarray | None:
        """A picture of the first copy, [H, W, 3] uint8; None if it draws none."""
        picture = self._envs[0].render() if hasattr(self._envs[0], "render") else None
        return picture if isinstance(picture, np.ndarray) else None

    def close(self) -> None:
        """Free what the copies hold."""
        for env in self._envs:
            env.close()

    def _step(self, e: int, env: Any, chosen: list[Any]) -> None:
        agents, alive = self._agents, self._alive[e]
        came = env.step({name: chosen[agent.m][agent.x] for name in env.agents for agent in (agents[name],)})
        if len(came) != 5:
            raise InputError(
                f"{self._whose}: step must return observations, rewards, terminations, truncations and infos, got "
                f"{len(came)} things, as of an older API"
            )
        observations, rewards, terminated, truncated, infos = came
        for name in alive:
            agent = agents[name]
            self._now.rewards[agent.m][e, agent.x] = rewards.get(name, 0.0)
        left = [name for name in env.agents if not (terminated.get(name) or truncated.get(name))]
        # An episode may begin with nobody: it is not over before somebody has been there.
        over = not left and self._lived[e]
        if not over and self._steps < self.spec.episode_length:
            self._show(e, observations, infos, left)
            return
        self._ended[e] = True
        if over and alive and all(terminated.get(name) for name in alive):
            self._now.terminated[e] = True
            self._show(e, observations, infos, alive, last=True)
        else:
            self._now.truncated[e] = True
            self._show(e, observations, infos, left or [name for name in alive if not terminated.get(name)])

    def _show(self, e: int, observations: Any, infos: Any, alive: list[Any], last: bool = False) -> None:
        """Write what they see; after the `last` step nobody needs that, and some environments leave it out."""
        active = self._now.active
        for name in alive:
            agent = self._agents.get(name)
            if agent is None:
                known = ", ".join(map(str, self._agents))
                raise InputError(f"{self._whose}: agent {name} is not announced in possible_agents ({known})")
            active[agent.m][e, agent.x] = True
            if name not in observations:
                if last:
                    continue
                raise InputError(f"{self._whose}: {name} lives and observes nothing in step {self._steps}")
            seen, mask = spaces.parted(observations[name])
            columns = self._columns[e][agent.b]
            numbers = agent.read(seen)
            if agent.runs is None:
                columns["own"][agent.place] = numbers
            else:
                for run in agent.runs:
                    columns[run.kind][agent.place, run.stored] = spaces.kept(agent.name, numbers[run.columns], run.kind)
            if mask is None and infos and (info := infos.get(name)):
                mask = info.get(spaces.MASK)
            if mask is not None and agent.allowed:
                columns["masks"][agent.place] = self._allowed(agent, mask)
        self._alive[e] = alive
        self._lived[e] |= bool(alive)

    def _allowed(self, agent: _Agent, mask: Any) -> np.ndarray:
        """[A] bool; all actions, if it allows none."""
        allowed = np.asarray(mask, bool).reshape(-1)
        if allowed.size != agent.allowed:
            raise InputError(f"{agent.name}: expected a mask of {agent.allowed} actions, got one of {allowed.size}")
        return allowed if allowed.any() else ~allowed

    def _clear(self) -> None:
        for columns in self._now.columns or []:
            for name, column in columns.items():
                column.fill(name == "masks")
        for array in (*self._now.active, *self._now.rewards):
            array.fill(0)

    def _empty(self) -> tuple[TimeStep, list[list[dict[str, np.ndarray]]]]:
        """A time step, and the columns of each of its copies and blocks, which are views of it."""
        columns = [
            {name: np.zeros(shape, dtype) for name, (dtype, shape) in form.table_of(self.num_envs).items()}
            for form in forms(self.spec)
        ]
        shapes = [(self.num_envs, kind.count) for kind in self.spec.types]
        now = compact_step(
            self.spec,
            columns,
            active=[np.zeros(shape, bool) for shape in shapes],
            rewards=[np.zeros(shape, np.float32) for shape in shapes],
            terminated=np.zeros(self.num_envs, bool),
            truncated=np.zeros(self.num_envs, bool),
        )
        return now, [
            [{name: column[e] for name, column in block.items()} for block in columns] for e in range(self.num_envs)
        ]

    def _places(self, groups: list[list[Any]], seen: dict[Any, Any]) -> dict[Any, _Agent]:
        numbers = {name: (m, x) for m, group in enumerate(groups) for x, name in enumerate(group)}
        found = {}
        for b, (form, types) in enumerate(zip(forms(self.spec), self.spec.blocks, strict=True)):
            for place, name in enumerate(name for m in types for name in groups[m]):
                whose = f"{self._whose}: {name}"
                runs = None if form.own == form.observation_dim else form.runs
                allowed = form.action_dim if self.spec.types[types[0]].discrete else 0
                read = spaces.reader(whose, seen[name])
                found[name] = _Agent(whose, *numbers[name], b, place, read, runs, allowed)
        return found

    def _space(self, env: Any, of: str, name: Any) -> Any:
        try:
            return spaces.unmasked(getattr(env, f"{of}_space")(name))
        except (LookupError, AttributeError, TypeError) as error:
            raise InputError(f"{self._whose} tells no {of}_space of {name}: {error!r}") from error

    def _type(self, kind: str, names: list[Any], seen: dict[Any, Any], acts: dict[Any, Any]) -> TypeSpec:
        widths = {name: spaces.widths(f"{self._whose}: {name}", seen[name], acts[name]) for name in names}
        for name in names:
            if widths[name] != widths[names[0]]:
                raise InputError(
                    f"{names[0]} and {name} differ (observation width, actions, discrete: {widths[names[0]]} and "
                    f"{widths[name]}) and cannot be of one type '{kind}': give ?types="
                )
        observation_dim, action_dim, discrete = widths[names[0]]
        parts, *others = (spaces.parts_of(seen[name]) for name in names)
        if any(other != parts for other in others):  # what is an integer to one of them may be none to another
            parts = tuple(Part(part.name, part.width) for part in parts)
        return TypeSpec(kind, len(names), observation_dim, action_dim, discrete, parts)


def _announced(env: Any) -> list[Any]:
    """All agents that there may be; of an environment that does not tell, those with whom an episode begins."""
    names = getattr(env, "possible_agents", None)
    if names is None:
        env.reset(seed=0)
        names = env.agents
    return list(names)

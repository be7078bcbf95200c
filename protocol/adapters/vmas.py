"""Scenarios of VMAS, e.g. `vmas:simple_spread?n_agents=3`: all copies in one batch of torch, on the CPU.

VMAS is under the GPL 3: it is an optional extra, `bm3il[vmas]`, and nothing but this module imports it, and only when a
scenario is made.
"""

from __future__ import annotations

import io
import random
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bm3il.protocol.adapters.options import agents_by_type, one_line, value_of
from bm3il.protocol.adapters.vmas_picture import picture
from bm3il.protocol.environment import Starts, TimeStep
from bm3il.protocol.errors import InputError, unknown_name
from bm3il.protocol.seeds import small_seed
from bm3il.protocol.specs import EnvironmentSpec, Part, TypeSpec

MAX_STEPS = 100
UNUSED = re.compile(r"Scenario kwargs: \{'(\w+)'")
"""How VMAS warns of an argument that a scenario does not take."""
TAKEN = re.compile(r"kwargs\.(?:pop|get)\(\s*[\"'](\w+)[\"']")
"""How a scenario takes one."""


class Vmas:
    """E copies of a scenario, stepped together.

    target: its name.   types: groups of agents, `agent_0+agent_1,adversary_0`; without it, agents whose names differ by
    a trailing number are of one type.   continuous_actions: if false, one discrete action is all that an agent does.
    max_steps: after which an episode is cut off.   arguments: the scenario's own, values as JSON (text without quotes
    is text).

    Actions are scaled from [-1, 1] to their ranges. Entries of a dictionary are named parts of the observation
    (`--reward.sees`). What has ended shows zeros.
    """

    def __init__(
        self,
        num_envs: int,
        target: str = "",
        types: str = "",
        continuous_actions: bool = True,
        max_steps: int = MAX_STEPS,
        **arguments: str,
    ) -> None:
        """Raises InputError for a scenario that cannot be made, an argument that it does not take, and agents of one
        type that observe or do different things."""
        if num_envs < 1 or max_steps < 1:
            raise InputError(f"vmas: expected num_envs and max_steps ≥ 1, got {num_envs} and {max_steps}")
        self._streams, self.num_envs = _Streams(), num_envs
        with self._streams.in_use():
            self._env = _made(
                target,
                {name: value_of(text) for name, text in arguments.items()},
                num_envs=num_envs,
                continuous_actions=continuous_actions,
                max_steps=max_steps,
                terminated_truncated=True,
            )
            seen = self._env.reset(seed=0)
        names, spaces = [agent.name for agent in self._env.agents], list(self._env.action_space)
        groups = agents_by_type(names, types)
        self._agents = [[names.index(name) for name in group] for group in groups.values()]
        kinds = [_type(kind, group, names, seen, spaces) for kind, group in groups.items()]
        given = {"types": types, "continuous_actions": "" if continuous_actions else "false"}
        given |= {"max_steps": "" if max_steps == MAX_STEPS else str(max_steps)}
        self.spec = EnvironmentSpec(_name(target, arguments | given), tuple(kinds), max_steps, _name(target, arguments))
        self._bounds = [
            None if kind.discrete else _bounds([spaces[i] for i in agents])
            for kind, agents in zip(kinds, self._agents, strict=True)
        ]
        self._masks = [np.ones((num_envs, kind.count, kind.action_dim), bool) for kind in kinds]
        self._terminated, self._truncated = np.zeros((2, num_envs), bool)

    def reset(self, seed: int, starts: Starts | None = None) -> TimeStep:
        """Start E new episodes, all from one seed. Raises InputError for given start states."""
        if starts:
            raise InputError(f"{self.spec.name} cannot start from given states: choose --evaluation.starts fresh")
        with self._streams.in_use():
            seen = self._env.reset(seed=small_seed(seed, "vmas"))
        self._terminated, self._truncated = np.zeros((2, self.num_envs), bool)
        return self._step(seen, [torch.zeros(self.num_envs)] * len(seen), np.zeros(self.num_envs, bool))

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        """Advance all copies; what has ended goes on unseen. actions: per type [E, X_m] integers, or [E, X_m, A_m] in
        [-1, 1]."""
        with self._streams.in_use():
            seen, rewards, terminated, truncated, _ = self._env.step(self._taken(actions))
        ended = self._terminated | self._truncated
        self._terminated = self._terminated | (terminated.numpy() & ~ended)
        self._truncated = self._truncated | (truncated.numpy() & ~terminated.numpy() & ~ended)
        return self._step(seen, rewards, ended)

    def render(self) -> np.ndarray:
        """The first copy from above, [H, W, 3] uint8."""
        return picture(self._env.scenario)

    def _taken(self, actions: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """As VMAS takes them: of each agent [E, 1] integers, or [E, A] in its range."""
        taken = [torch.empty(0)] * self._env.n_agents
        for agents, bounds, action in zip(self._agents, self._bounds, actions, strict=True):
            done = action[..., None] if bounds is None else _scaled(action, *bounds)
            for x, agent in enumerate(agents):
                taken[agent] = torch.from_numpy(done[:, x])
        return taken

    def _step(self, seen: Sequence[Any], rewards: Sequence[torch.Tensor], ended: np.ndarray) -> TimeStep:
        """What the agents of each type see and get, where the episode had not ended before."""
        step = TimeStep([], self._masks, [], [], self._terminated.copy(), self._truncated.copy())
        observations: list[np.ndarray] = []
        for agents in self._agents:
            observations.append(torch.stack([_flat(seen[i]) for i in agents], dim=1).numpy())
            step.rewards.append(torch.stack([rewards[i].reshape(-1) for i in agents], dim=1).numpy())
            step.active.append(np.tile(~ended[:, None], (1, len(agents))))
        if ended.any():
            for array in (*observations, *step.rewards):
                array[ended] = 0
        step.observations = observations
        return step


class _Streams:
    """The random streams of one environment. VMAS keeps one state for all environments of a process together."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._shared = _imported().simulator.environment.Environment.vmas_random_state
        self._state = [generator.get_state(), np.random.RandomState(0).get_state(), random.Random(0).getstate()]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        self._shared[:] = self._state
        yield
        self._state = list(self._shared)


def _imported() -> Any:
    try:
        # Gym, on which it rests, says at every start that nobody looks after it any more.
        with redirect_stderr(io.StringIO()):
            import vmas
    except ImportError as error:
        raise InputError(f"vmas: needs VMAS ({error}): pip install 'bm3il[vmas]'") from error
    return vmas


def _made(target: str, arguments: dict[str, Any], **options: Any) -> Any:
    vmas = _imported()
    folder = Path(vmas.__file__).parent / "scenarios"
    known = {file.stem: file for file in folder.rglob("*.py") if file.stem != "__init__"}
    if target not in known:
        raise unknown_name("scenario of VMAS", target, known)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            made = vmas.make_env(target, **options, **arguments)
        except Exception as error:  # a scenario may raise anything
            raise InputError(f"vmas:{target} cannot be made: {one_line(error)}") from error
    for warning in told:
        if unused := UNUSED.match(str(warning.message)):
            taken = TAKEN.findall(known[target].read_text(encoding="utf-8"))
            raise unknown_name(f"argument of the scenario {target}", unused[1], taken)
    return made


def _name(target: str, options: Mapping[str, str]) -> str:
    query = "&".join(f"{name}={value}" for name, value in options.items() if value)
    return f"vmas:{target}" + (f"?{query}" if query else "")


def _type(kind: str, group: list[str], names: list[str], seen: Sequence[Any], spaces: Sequence[Any]) -> TypeSpec:
    found = {}
    for name in group:
        observation, space = seen[names.index(name)], spaces[names.index(name)]
        actions = (int(space.n), True) if hasattr(space, "n") else (int(np.prod(space.shape)), False)
        found[name] = (_flat(observation).shape[1], *actions, _parts(observation))
        if found[name] != found[group[0]]:
            raise InputError(
                f"{group[0]} and {name} differ (observation width, actions, discrete: {found[group[0]][:3]} and "
                f"{found[name][:3]}) and cannot be of one type '{kind}': give ?types="
            )
    return TypeSpec(kind, len(group), *found[group[0]])


def _bounds(spaces: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """The least and the most that each agent of a type may do, [X_m, A_m]."""
    return np.stack([space.low for space in spaces]), np.stack([space.high for space in spaces])


def _scaled(actions: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Of actions in [-1, 1] their place between the bounds, which rounding does not leave."""
    return np.clip(low + (actions + 1) / 2 * (high - low), low, high)


def _flat(seen: Any) -> torch.Tensor:
    """[E, O], the entries of a dictionary side by side."""
    if isinstance(seen, Mapping):
        return torch.cat([_flat(entry) for entry in seen.values()], dim=1)
    return seen.reshape(len(seen), -1)


def _parts(seen: Any, outer: str = "") -> tuple[Part, ...]:
    """What of an observation has a name: the entries of a dictionary."""
    if isinstance(seen, Mapping):
        dot = outer and f"{outer}."
        return tuple(part for name, entry in seen.items() for part in _parts(entry, f"{dot}{name}"))
    return (Part(outer, _flat(seen).shape[1]),) if outer else ()

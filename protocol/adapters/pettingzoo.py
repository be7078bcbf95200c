"""Environments of PettingZoo's parallel API, e.g. `pettingzoo:mpe2.simple_spread_v3?arguments=N:5,max_cycles:50`."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from bm3il.protocol.environment import Starts, TimeStep, compact_step
from bm3il.protocol.errors import InputError
from bm3il.protocol.observations import OWN_NUMBERS, forms
from bm3il.protocol.seeds import derive_seed
from bm3il.protocol.specs import EnvironmentSpec, Part, PartKind, TypeSpec

MAX_SEED = 2**31
"""Some environments hand seeds on to libraries that take signed 32-bit integers."""
OBSERVATION = "observation"
"""Name of the one part of what is no dictionary."""


class PettingZooParallel:
    """E copies of a parallel environment, stepped one after the other.

    target: a module that offers `parallel_env`.   arguments: what it is called with, `NAME:VALUE,…`, values as JSON
    (text without quotes is text).   types: groups of agents, `agent_0+agent_1,adversary_0`; without it, agents whose
    names differ by a trailing number are of one type.   episode_length: needed if the environment has no `max_cycles`.

    Box actions are scaled from [-1, 1] to the box. An observation `{"observation": …, "action_mask": …}` gives masks.
    Entries of a dictionary are named parts of the observation (`--reward.sees`). Those of spaces of integers (images,
    counts, one-hots) are kept as integers, where these are small; their values go into networks as they are.
    An agent that dies is inactive from then on, and sees zeros. An episode ends when nobody is left: terminated if all
    who lived to see it terminated, else truncated.
    """

    def __init__(
        self, num_envs: int, target: str = "", arguments: str = "", types: str = "", episode_length: int = 0
    ) -> None:
        """Raises InputError for a module that is missing or offers no environment, and for agents of one type with
        different spaces, or spaces that are neither discrete nor boxes."""
        if num_envs < 1:
            raise InputError(f"pettingzoo: expected num_envs ≥ 1, got {num_envs}")
        make, options = _factory(target), _arguments(arguments)
        try:
            self._envs = [make(**options) for _ in range(num_envs)]
        except TypeError as error:
            raise InputError(f"pettingzoo:{target} does not take these arguments: {error}") from error
        self.num_envs = num_envs
        first = self._envs[0]
        self._names = _grouped(list(first.possible_agents), types)
        self._columns = {name: (m, x) for m, names in enumerate(self._names.values()) for x, name in enumerate(names)}
        self._spaces = {name: _spaces(first, name) for name in self._columns}
        steps = episode_length or _max_cycles(first)
        if steps < 1:
            raise InputError(f"pettingzoo:{target} does not tell how long an episode is: give ?episode_length=")
        given = {"arguments": arguments, "types": types, "episode_length": episode_length}
        query = "&".join(f"{option}={value}" for option, value in given.items() if value)
        name = f"pettingzoo:{target}" + (f"?{query}" if query else "")
        kinds = tuple(self._type(kind, names) for kind, names in self._names.items())
        view = f"pettingzoo:{target}" + (f"?arguments={arguments}" if arguments else "")
        self.spec = EnvironmentSpec(name, kinds, steps, view)
        agents = list(self._names.values())
        of_blocks = ((b, [name for m in types for name in agents[m]]) for b, types in enumerate(self.spec.blocks))
        self._places = {name: (b, place) for b, names in of_blocks for place, name in enumerate(names)}
        self._ended = np.ones(num_envs, bool)
        self._now = self._empty()

    def reset(self, seed: int, starts: Starts | None = None) -> TimeStep:
        """Start E new episodes; each copy has a seed of its own. Raises InputError for given start states."""
        if starts:
            raise InputError(f"{self.spec.name} cannot start from given states: choose --evaluation.starts fresh")
        self._now = self._empty()
        self._ended[:] = False
        for e, env in enumerate(self._envs):
            observations, _ = env.reset(seed=derive_seed(seed, "pettingzoo", e) % MAX_SEED)
            self._show(e, observations, list(env.agents))
        return self._now

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        """Advance all copies that have not ended. actions: per type [E, X_m] integers, or [E, X_m, A_m] in [-1, 1]."""
        before, self._now = self._now, self._empty()
        for e, env in enumerate(self._envs):
            if self._ended[e]:
                self._now.terminated[e], self._now.truncated[e] = before.terminated[e], before.truncated[e]
                continue
            alive = list(env.agents)
            chosen = {name: self._action(name, actions[m][e, x]) for name in alive for m, x in [self._columns[name]]}
            observations, rewards, terminated, truncated, _ = env.step(chosen)
            for name in alive:
                m, x = self._columns[name]
                self._now.rewards[m][e, x] = rewards[name]
            if env.agents and not all(terminated[name] or truncated[name] for name in alive):
                self._show(e, observations, list(env.agents))
                continue
            self._ended[e] = True
            self._now.terminated[e] = all(terminated[name] for name in alive)
            self._now.truncated[e] = not self._now.terminated[e]
            self._show(e, observations, alive)
        return self._now

    def close(self) -> None:
        """Free what the copies hold."""
        for env in self._envs:
            env.close()

    def _show(self, e: int, observations: dict[str, Any], alive: list[str]) -> None:
        for name in alive:
            (m, x), (b, place) = self._columns[name], self._places[name]
            columns, seen = (self._now.columns or [])[b], observations[name]
            if isinstance(seen, dict) and "action_mask" in seen:
                mask = np.asarray(seen["action_mask"], bool)
                columns["masks"][e, place] = mask if mask.any() else True
                seen = seen["observation"]
            numbers = _flat(name, self._spaces[name][0], seen)
            for run in forms(self.spec)[b].runs:
                columns[run.kind][e, place, run.stored] = _kept(name, numbers[run.columns], run.kind)
            self._now.active[m][e, x] = True

    def _action(self, name: str, action: np.ndarray) -> Any:
        space = self._spaces[name][1]
        if self.spec.types[self._columns[name][0]].discrete:
            return int(action) + int(space.start)
        part = (np.clip(action, -1, 1).reshape(space.shape) + 1) / 2
        return (space.low + part * (space.high - space.low)).astype(space.dtype)

    def _empty(self) -> TimeStep:
        columns = [
            {name: np.zeros(shape, dtype) for name, (dtype, shape) in form.table_of(self.num_envs).items()}
            for form in forms(self.spec)
        ]
        for each in columns:
            each["masks"][:] = True
        shapes = [(self.num_envs, kind.count) for kind in self.spec.types]
        return compact_step(
            self.spec,
            columns,
            active=[np.zeros(shape, bool) for shape in shapes],
            rewards=[np.zeros(shape, np.float32) for shape in shapes],
            terminated=np.zeros(self.num_envs, bool),
            truncated=np.zeros(self.num_envs, bool),
        )

    def _type(self, kind: str, names: list[str]) -> TypeSpec:
        from gymnasium import spaces

        widths = {}
        for name in names:
            seen, acts = self._spaces[name]
            if isinstance(acts, spaces.Discrete):
                widths[name] = (spaces.utils.flatdim(seen), int(acts.n), True)
            elif isinstance(acts, spaces.Box) and acts.is_bounded():
                widths[name] = (spaces.utils.flatdim(seen), int(np.prod(acts.shape)), False)
            else:
                raise InputError(f"{name}: actions must be discrete or a bounded box, got {acts}")
            if widths[name] != widths[names[0]]:
                raise InputError(
                    f"{names[0]} and {name} differ (observation width, actions, discrete: {widths[names[0]]} and "
                    f"{widths[name]}) and cannot be of one type '{kind}': give ?types="
                )
        observation_dim, action_dim, discrete = widths[names[0]]
        parts, *others = (_parts(self._spaces[name][0]) for name in names)
        if any(other != parts for other in others):  # what is an integer to one of them may be none to another
            parts = tuple(Part(part.name, part.width) for part in parts)
        return TypeSpec(kind, len(names), observation_dim, action_dim, discrete, parts)


def _parts(space: Any) -> tuple[Part, ...]:
    """What of an observation has a name, or is kept as integers; nothing if it is a box of real numbers, say.

    A dictionary's entries are named parts, those of one within it `outer.inner`, in the order in which `flatten` puts
    them side by side.
    """
    from gymnasium import spaces

    if not isinstance(space, spaces.Dict):
        width, kind = spaces.utils.flatdim(space), _kind(space)
        return (Part(OBSERVATION, width, kind),) if width and kind != "own" else ()
    parts: list[Part] = []
    for name, entry in space.spaces.items():
        if isinstance(entry, spaces.Dict):
            parts += [Part(f"{name}.{part.name}", part.width, part.kind) for part in _parts(entry)]
        elif width := spaces.utils.flatdim(entry):
            parts.append(Part(str(name), width, _kind(entry)))
    return tuple(parts)


def _kind(space: Any) -> PartKind:
    """The kind that keeps the numbers of a space in the fewest bytes."""
    from gymnasium.spaces.utils import flatten_space

    box: Any = flatten_space(space)
    if box.dtype is not None and box.dtype.kind in "biu":
        low, high = int(box.low.min(initial=0)), int(box.high.max(initial=0))
        kinds: tuple[PartKind, ...] = ("uint8", "int16")
        for kind in kinds:
            if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
                return kind
    return "own"


def _factory(target: str) -> Any:
    try:
        module = importlib.import_module(target) if target else None
    except ImportError as error:
        raise InputError(
            f"pettingzoo:{target} cannot be imported ({error}): pip install 'bm3il[pettingzoo]'"
        ) from error
    if not hasattr(module, "parallel_env"):
        raise InputError(f"'{target}' offers no parallel_env: name a module, as in pettingzoo:mpe2.simple_spread_v3")
    return module.parallel_env  # type: ignore[union-attr]


def _arguments(text: str) -> dict[str, Any]:
    options = {}
    for part in filter(None, text.split(",")):
        name, colon, value = part.partition(":")
        if not colon:
            raise InputError(f"arguments: expected NAME:VALUE, got '{part}'")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def _grouped(names: list[str], types: str) -> dict[str, list[str]]:
    """Type → its agents, in the order of the environment or of the table."""
    if not types:
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(re.sub(r"_?\d+$", "", name) or name, []).append(name)
        return groups
    table = [part.split("+") for part in types.split(",")]
    listed = [name for group in table for name in group]
    if sorted(listed) != sorted(names):
        raise InputError(f"types must name each agent once ({', '.join(names)}), got {', '.join(listed)}")
    return {f"type{m}" if len(group) > 1 else group[0]: group for m, group in enumerate(table)}


def _spaces(env: Any, name: str) -> tuple[Any, Any]:
    """Of observations without their mask, and of actions."""
    from gymnasium import spaces

    seen = env.observation_space(name)
    if isinstance(seen, spaces.Dict) and "action_mask" in seen.spaces:
        seen = seen["observation"]
    return seen, env.action_space(name)


def _max_cycles(env: Any) -> int:
    for part in (env, env.unwrapped, getattr(env, "aec_env", None)):
        part = getattr(part, "unwrapped", part)
        for name in ("max_cycles", "max_steps"):
            if isinstance(value := getattr(part, name, None), int):
                return value
    return 0


def _flat(name: str, space: Any, value: Any) -> np.ndarray:
    """The numbers of an observation side by side."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        return np.concatenate([_flat(name, entry, value[key]) for key, entry in space.spaces.items()])
    flat = np.asarray(spaces.utils.flatten(space, value))
    if isinstance(space, spaces.Box) and flat.dtype.kind in "iu":  # numbers between integers would be cut off
        _check_exact(name, np.ravel(value), flat)
    return flat


def _kept(name: str, numbers: np.ndarray, kind: str) -> np.ndarray:
    """The numbers in the dtype that their column has."""
    kept = numbers.astype(OWN_NUMBERS[kind])
    if kind != "own":
        _check_exact(name, numbers, kept)
    return kept


def _check_exact(name: str, numbers: np.ndarray, kept: np.ndarray) -> None:
    if not np.can_cast(numbers.dtype, kept.dtype) and (wrong := numbers[kept != numbers]).size:
        raise InputError(f"{name} observes {wrong[0]}, which is none of the integers of its observation space")

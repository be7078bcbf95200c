"""Expert demonstrations: whole episodes in one safetensors file, checked when they are read, and mapped, not copied.

Metadata of the file: `format` and `version`, and `header`, JSON with the environment's spec, the origin in words, the
counts of episodes and rows, and the mean return with its standard error (true return per agent and episode).

Tensors, for the type number m of the spec; a row is one joint step, episodes follow each other without a gap:

- `m.observations` [rows, X_m, O_m] float32, seen before the action.
- `m.actions` [rows, X_m] integers, or [rows, X_m, A_m] float32 if continuous.
- `m.action_masks` [rows, X_m, A_m] and `m.active` [rows, X_m] bool; a tensor that is all true is left out.
- `episode_lengths` [episodes] int64, `returns` [episodes, N] float32 (NaN where unknown), `groups` [episodes] int64.
- `starts.<name>` [episodes, …]: start states, as `Environment.reset` takes them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from protocol.errors import InputError
from protocol.job import Job
from protocol.specs import EnvironmentSpec, TypeSpec
from protocol.trajectories import Trajectories

FORMAT, VERSION = "bm3il-demonstrations", "1"
RETURNS_UNIT = "true return per agent and episode"
SHIPPED_IN, SUFFIX = "actors.experts", ".safetensors"
ROWS_AT_ONCE = 8_192
START_NAME = re.compile(r"starts\.[a-z][a-z0-9_]{0,63}")
INTEGERS = ("I8", "U8", "I16", "I32", "I64")


@dataclass(frozen=True)
class Rows:
    """All joint steps, one array per type in each list, nothing left out.

    observations [rows, X_m, O_m] float32.   actions [rows, X_m] int64, or [rows, X_m, A_m] float32.
    active [rows, X_m] bool.   action_masks [rows, X_m, A_m] bool.
    """

    observations: list[np.ndarray]
    actions: list[np.ndarray]
    active: list[np.ndarray]
    action_masks: list[np.ndarray]


@dataclass(frozen=True)
class Demonstrations:
    """Episodes of an expert; the fields are the tensors of the file, actions always int64 or float32.

    `action_masks` and `active` hold None for a type whose values are all true.
    groups: the unit of independence, e.g. the number of the start state that several episodes share.

    Raises InputError, also from the constructor, if shapes do not fit the spec, episodes do not add up to the rows,
    observations are not finite, or an action is out of range or forbidden by its mask.
    """

    spec: EnvironmentSpec
    origin: str
    observations: Sequence[np.ndarray]
    actions: Sequence[np.ndarray]
    action_masks: Sequence[np.ndarray | None]
    active: Sequence[np.ndarray | None]
    episode_lengths: np.ndarray
    returns: np.ndarray
    groups: np.ndarray
    starts: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_episodes(self)
        columns = zip(self.spec.types, self.observations, self.actions, self.action_masks, self.active, strict=True)
        for agent_type, observations, actions, masks, active in columns:
            _check_shapes(agent_type, self.num_rows, observations, actions, masks, active)
            for first in range(0, self.num_rows, ROWS_AT_ONCE):
                part = slice(first, first + ROWS_AT_ONCE)
                _check_values(
                    agent_type,
                    first,
                    observations[part],
                    actions[part],
                    None if masks is None else masks[part],
                    None if active is None else active[part],
                )

    @property
    def num_episodes(self) -> int:
        return len(self.episode_lengths)

    @property
    def num_rows(self) -> int:
        """Joint steps of all episodes."""
        return int(self.episode_lengths.sum())

    def return_estimate(self) -> tuple[float, float]:
        """Mean over episodes of the true return per agent, and its standard error over groups; NaN if unknown."""
        values = self.returns.mean(axis=1, dtype=np.float64)
        known = np.isfinite(values)
        if not known.any():
            return float("nan"), float("nan")
        values, (_, index) = values[known], np.unique(self.groups[known], return_inverse=True)
        residuals = np.bincount(index, weights=values - values.mean())
        variance = (residuals**2).sum() * len(residuals) / max(len(residuals) - 1, 1)
        return float(values.mean()), float(np.sqrt(variance) / len(values))

    def rows(self) -> Rows:
        """All joint steps; observations and actions are not copied."""
        shapes = [(self.num_rows, t.count) for t in self.spec.types]
        active = [np.ones(shape, bool) if a is None else a for a, shape in zip(self.active, shapes, strict=True)]
        masks = [
            np.ones((*shape, t.action_dim), bool) if mask is None else mask
            for mask, shape, t in zip(self.action_masks, shapes, self.spec.types, strict=True)
        ]
        return Rows(list(self.observations), list(self.actions), active, masks)

    def check_against(self, spec: EnvironmentSpec) -> None:
        """Raise InputError if these are not demonstrations for an environment of this spec."""
        if difference := spec.difference(self.spec):
            raise InputError(
                f"demonstrations of '{self.spec.name}' do not fit the environment '{spec.name}': {difference}; "
                "choose the environment they were recorded in, or record others with `bm3il demonstrations record`"
            )

    def select(self, episodes: int, seed: int) -> Demonstrations:
        """Some of the episodes, as independent as they come: one of every group, then a second of every group, …

        The groups and the episodes within them are drawn from `seed`; with the same seed, the choice of fewer
        episodes is part of the choice of more. Raises InputError if there are not so many.
        """
        if not 1 <= episodes <= self.num_episodes:
            raise InputError(f"expected 1..{self.num_episodes} demonstration episodes, got {episodes}")
        random = np.random.default_rng(seed)
        shuffled = random.permutation(self.num_episodes)
        names, index = np.unique(self.groups[shuffled], return_inverse=True)
        by_group = np.argsort(index, kind="stable")
        place_in_group = np.empty(self.num_episodes, np.int64)
        place_in_group[by_group] = np.arange(self.num_episodes) - np.searchsorted(index[by_group], index[by_group])
        turn = random.permutation(len(names))[index]
        return self._take(np.sort(shuffled[np.lexsort((turn, place_in_group))[:episodes]]))

    def split(self, part: float, seed: int) -> tuple[Demonstrations, Demonstrations | None]:
        """Hold out about `part` of the groups (at least one, if there are two): the rest, and what is held out."""
        names = np.random.default_rng(seed).permutation(np.unique(self.groups))
        count = min(max(1, round(part * len(names))), len(names) - 1) if part > 0 else 0
        held_out = np.isin(self.groups, names[:count])
        if not held_out.any():
            return self, None
        return self._take(np.flatnonzero(~held_out)), self._take(np.flatnonzero(held_out))

    def save(self, path: str | Path) -> None:
        """Write the file under a temporary name, then rename it: nobody ever sees a part of it.

        Raises InputError if the folder is not writable or full; nothing is left behind then.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file(self._tensors(), temporary, self._metadata())
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise InputError(f"cannot write the demonstrations {path}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Demonstrations:
        """Map a file into memory and check all of it. It must not change while it is in use.

        Raises InputError, naming the file and what is wrong, for anything that `save` would not have written.
        """
        try:
            with safe_open(path, framework="pt") as file:
                return _read(file)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: expected a safetensors file of demonstrations: {error}") from error
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    @classmethod
    def from_trajectories(
        cls,
        trajectories: Trajectories,
        spec: EnvironmentSpec,
        origin: str,
        groups: np.ndarray | None = None,
        starts: Mapping[str, np.ndarray] | None = None,
    ) -> Demonstrations:
        """Whole episodes as they come from a rollout; without `groups`, each episode is independent of the others."""
        steps, episodes = trajectories.terminated.shape
        played = np.arange(steps) < trajectories.lengths[:, None]

        def rows(array: np.ndarray) -> np.ndarray:
            return array[:steps].swapaxes(0, 1)[played]

        masks, active = ([rows(a) for a in part] for part in (trajectories.action_masks, trajectories.active))
        return cls(
            spec=spec,
            origin=origin,
            observations=[rows(array) for array in trajectories.observations],
            actions=[rows(array) for array in trajectories.actions],
            action_masks=[None if array.all() else array for array in masks],
            active=[None if array.all() else array for array in active],
            episode_lengths=trajectories.lengths.astype(np.int64),
            returns=trajectories.returns(),
            groups=np.arange(episodes) if groups is None else groups,
            starts=starts or {},
        )

    def _take(self, episodes: np.ndarray) -> Demonstrations:
        chosen = np.zeros(self.num_episodes, bool)
        chosen[episodes] = True
        rows = np.repeat(chosen, self.episode_lengths)

        def part(arrays: Sequence[Any]) -> list[Any]:
            return [None if array is None else array[rows] for array in arrays]

        return Demonstrations(
            self.spec,
            self.origin,
            *(part(arrays) for arrays in (self.observations, self.actions, self.action_masks, self.active)),
            episode_lengths=self.episode_lengths[chosen],
            returns=self.returns[chosen],
            groups=self.groups[chosen],
            starts={name: array[chosen] for name, array in self.starts.items()},
        )

    def _tensors(self) -> dict[str, np.ndarray]:
        tensors = {"episode_lengths": self.episode_lengths, "returns": self.returns, "groups": self.groups}
        tensors |= {f"starts.{name}": array for name, array in self.starts.items()}
        for m, agent_type in enumerate(self.spec.types):
            small = np.int8 if agent_type.action_dim <= 128 else np.int64
            tensors[f"{m}.observations"] = self.observations[m]
            tensors[f"{m}.actions"] = self.actions[m].astype(small) if agent_type.discrete else self.actions[m]
            optional = {f"{m}.action_masks": self.action_masks[m], f"{m}.active": self.active[m]}
            tensors |= {name: array for name, array in optional.items() if array is not None}
        return {name: np.ascontiguousarray(array) for name, array in tensors.items()}

    def _metadata(self) -> dict[str, str]:
        mean, stderr = (None if np.isnan(value) else value for value in self.return_estimate())
        header = {
            "spec": self.spec.to_json(),
            "origin": self.origin,
            "episodes": self.num_episodes,
            "rows": self.num_rows,
            "returns_unit": RETURNS_UNIT,
            "return_mean": mean,
            "return_stderr": stderr,
        }
        return {"format": FORMAT, "version": VERSION, "header": json.dumps(header, sort_keys=True)}


def resolve(name_or_path: str | Path) -> Path:
    """The file that is meant: a path, or the name of demonstrations that ship with the package.

    Raises InputError if there is neither.
    """
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    folder = resources.files(SHIPPED_IN)
    shipped = sorted(entry.name.removesuffix(SUFFIX) for entry in folder.iterdir() if entry.name.endswith(SUFFIX))
    name = str(name_or_path).removesuffix(SUFFIX)
    if name not in shipped:
        raise InputError(
            f"no demonstrations '{name_or_path}': neither a file nor one of those that ship ({', '.join(shipped)}); "
            "record some with `bm3il demonstrations record`"
        )
    return Path(str(folder / (name + SUFFIX)))


def load_demonstrations(job: Job, spec: EnvironmentSpec) -> Demonstrations | None:
    """The demonstrations of the job, checked against its environment; None if it names none.

    Raises InputError if they cannot be used.
    """
    if not job.demonstrations:
        return None
    demonstrations = Demonstrations.load(resolve(job.demonstrations))
    demonstrations.check_against(spec)
    if job.demonstration_episodes:
        return demonstrations.select(job.demonstration_episodes, seed=0)
    return demonstrations


def _read(file: Any) -> Demonstrations:
    header = _header(file.metadata() or {})
    spec = EnvironmentSpec.from_json(header.get("spec"))
    names = set(file.keys())
    starts = {name for name in names if START_NAME.fullmatch(name)}
    _check_names(spec, names - starts)

    def read(name: str, *dtypes: str) -> np.ndarray:
        found = file.get_slice(name).get_dtype()
        if found not in dtypes:
            raise InputError(f"tensor '{name}': expected {' or '.join(dtypes)}, found {found}")
        return file.get_tensor(name).numpy()

    def optional(name: str) -> np.ndarray | None:
        return read(name, "BOOL") if name in names else None

    types = list(enumerate(spec.types))
    demonstrations = Demonstrations(
        spec=spec,
        origin=str(header.get("origin", "")),
        observations=[read(f"{m}.observations", "F32") for m, _ in types],
        actions=[
            read(f"{m}.actions", *INTEGERS).astype(np.int64) if t.discrete else read(f"{m}.actions", "F32")
            for m, t in types
        ],
        action_masks=[optional(f"{m}.action_masks") for m, _ in types],
        active=[optional(f"{m}.active") for m, _ in types],
        episode_lengths=read("episode_lengths", "I64"),
        returns=read("returns", "F32"),
        groups=read("groups", "I64"),
        starts={name.removeprefix("starts."): read(name, "F32", "F64", "BOOL", *INTEGERS) for name in sorted(starts)},
    )
    for key, found in (("episodes", demonstrations.num_episodes), ("rows", demonstrations.num_rows)):
        if header.get(key) != found:
            raise InputError(f"the header says {header.get(key)!r} {key}, the tensors hold {found}")
    return demonstrations


def _header(metadata: Mapping[str, str]) -> dict[str, Any]:
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"expected format '{FORMAT}', found {metadata.get('format')!r}; convert it with "
            "`bm3il demonstrations import`"
        )
    if metadata.get("version") != VERSION:
        raise InputError(f"expected version {VERSION} of the format, found {metadata.get('version')!r}")
    try:
        header = json.loads(metadata.get("header", ""))
    except (ValueError, RecursionError) as error:
        raise InputError(f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise InputError(f"expected a header of names and values, found {type(header).__name__}")
    return header


def _check_names(spec: EnvironmentSpec, names: set[str]) -> None:
    numbers = range(spec.num_types)
    required = {"episode_lengths", "returns", "groups"}
    required |= {f"{m}.{name}" for m in numbers for name in ("observations", "actions")}
    allowed = required | {f"{m}.{name}" for m in numbers for name in ("action_masks", "active")}
    if missing := sorted(required - names):
        raise InputError(f"tensors are missing: {', '.join(missing)}")
    if extra := sorted(names - allowed):
        raise InputError(f"unexpected tensors: {', '.join(extra[:5])}")


def _check_episodes(demonstrations: Demonstrations) -> None:
    spec, lengths, returns = demonstrations.spec, demonstrations.episode_lengths, demonstrations.returns
    if lengths.ndim != 1 or not lengths.size:
        raise InputError("expected at least one episode, found none")
    if not 1 <= lengths.min() <= lengths.max() <= spec.episode_length:
        raise InputError(f"expected episodes of 1..{spec.episode_length} steps, found {lengths.min()}..{lengths.max()}")
    _expect_shape("returns", returns, (len(lengths), spec.num_agents))
    _expect_shape("groups", demonstrations.groups, (len(lengths),))
    if np.isinf(returns).any():
        raise InputError("a return is infinite (NaN stands for an unknown one)")
    for name, array in demonstrations.starts.items():
        _expect_shape(f"starts.{name}", array, (len(lengths), *array.shape[1:]))
        if not np.isfinite(array).all():
            raise InputError(f"starts.{name}: a value is not finite")


def _check_shapes(
    agent_type: TypeSpec,
    rows: int,
    observations: np.ndarray,
    actions: np.ndarray,
    masks: np.ndarray | None,
    active: np.ndarray | None,
) -> None:
    name, agents, widths = agent_type.name, (rows, agent_type.count), (agent_type.action_dim,)
    _expect_shape(f"observations of type '{name}'", observations, (*agents, agent_type.observation_dim))
    _expect_shape(f"actions of type '{name}'", actions, agents if agent_type.discrete else agents + widths)
    if masks is not None:
        _expect_shape(f"action masks of type '{name}'", masks, agents + widths)
    if active is not None:
        _expect_shape(f"active of type '{name}'", active, agents)


def _check_values(
    agent_type: TypeSpec,
    first_row: int,
    observations: np.ndarray,
    actions: np.ndarray,
    masks: np.ndarray | None,
    active: np.ndarray | None,
) -> None:
    """Check some rows; `first_row` is the number of their first."""

    def refuse(wrong: np.ndarray, what: str) -> None:
        if wrong.any():
            row, agent = np.argwhere(wrong)[0][:2]
            raise InputError(
                f"type '{agent_type.name}': {int(wrong.sum())} {what}, the first in row {first_row + row}, agent {agent}"
            )

    refuse(~np.isfinite(observations), "observed values are not finite")
    if not agent_type.discrete:
        refuse(~(np.abs(actions) <= 1), "action values are not within −1..1")
        return
    refuse((actions < 0) | (actions >= agent_type.action_dim), f"actions are not in 0..{agent_type.action_dim - 1}")
    if masks is not None:
        forbidden = ~np.take_along_axis(masks, actions[..., None], axis=2)[..., 0]
        refuse(forbidden if active is None else forbidden & active, "actions are forbidden by their masks")


def _expect_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise InputError(f"{name}: expected {list(shape)}, found {list(array.shape)}")

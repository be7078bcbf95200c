"""Expert demonstrations: whole episodes in one safetensors file, checked when they are read, and mapped, not copied.

Metadata of the file: `format` and `version`, and `header`, JSON with the environment's spec, the origin in words, the
counts of episodes and rows, and the mean return with its standard error (true return per agent and episode).

Tensors, for the type number m of the spec; a row is one joint step, episodes follow each other without a gap:

- `m.observations` [rows, X_m, O_m] float32, seen before the action.
- `m.actions` [rows, X_m] integers, or [rows, X_m, A_m] float32 if continuous.
- `m.action_masks` [rows, X_m, A_m] and `m.active` [rows, X_m] bool; a tensor that is all true is left out.
- `NAME.xz` [bytes] uint8 in place of observations or masks NAME that xz makes much smaller: the bytes of the array.
- `episode_lengths` [episodes] int64, `returns` [episodes, N] float32 (NaN where unknown), `groups` [episodes] int64.
- `starts.<name>` [episodes, …]: start states, as `Environment.reset` takes them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise

from protocol.demonstration_checks import allowed_by, check_episodes, check_type
from protocol.errors import InputError
from protocol.job import Job
from protocol.packing import MAX_UNPACKED_BYTES, PACKED, Tensors, packed
from protocol.specs import EnvironmentSpec
from protocol.trajectories import Trajectories

FORMAT, VERSION = "bm3il-demonstrations", "1"
RETURNS_UNIT = "true return per agent and episode"
SHIPPED_IN, SUFFIX = "actors.experts", ".safetensors"
START_NAME = re.compile(r"starts\.[a-z][a-z0-9_]{0,63}")
INTEGERS = ("I8", "U8", "I16", "I32", "I64")
NUMBERS = (*INTEGERS, "F32", "F64", "BOOL")


@dataclass(frozen=True)
class Demonstrations:
    """Episodes of an expert: the tensors of a file, one array per type in each of the first four fields.

    observations: [rows, X_m, O_m] float32.   actions: [rows, X_m] int64, or [rows, X_m, A_m] float32.
    action_masks: [rows, X_m, A_m] bool.   active: [rows, X_m] bool.
    groups: [episodes] int64, the unit of independence, e.g. the number of a start state that several episodes share.

    Raises InputError, also from the constructor, if shapes do not fit the spec, episodes do not add up to the rows,
    observations are not finite, or an action is out of range or forbidden by its mask.
    """

    spec: EnvironmentSpec
    origin: str
    observations: Sequence[np.ndarray]
    actions: Sequence[np.ndarray]
    action_masks: Sequence[np.ndarray]
    active: Sequence[np.ndarray]
    episode_lengths: np.ndarray
    returns: np.ndarray
    groups: np.ndarray
    starts: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_episodes(self.spec, self.episode_lengths, self.returns, self.groups, self.starts)
        columns = zip(self.spec.types, self.observations, self.actions, self.action_masks, self.active, strict=True)
        for agent_type, *arrays in columns:
            check_type(agent_type, self.num_rows, *arrays)

    @property
    def num_episodes(self) -> int:
        return len(self.episode_lengths)

    @property
    def num_rows(self) -> int:
        """Joint steps of all episodes."""
        return int(self.episode_lengths.sum())

    @property
    def return_mean(self) -> float | None:
        """Mean over episodes of the true return per agent; None if no episode's is known."""
        values = self._known_returns()[0]
        return float(values.mean()) if values.size else None

    @property
    def return_stderr(self) -> float | None:
        """Standard error of `return_mean` over groups, since the episodes of one group are not independent."""
        values, groups = self._known_returns()
        _, index = np.unique(groups, return_inverse=True)
        sums = np.bincount(index, weights=values - values.mean()) if values.size else values
        if len(sums) < 2:
            return None
        return float(np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / len(values))

    def check_against(self, spec: EnvironmentSpec) -> None:
        """Raise InputError if these are not demonstrations for an environment of this spec.

        Those of another number of agents fit a changed world, by `for_crowd`.
        """
        if difference := spec.difference(self.spec, counts=not spec.changes):
            raise InputError(
                f"demonstrations of '{self.spec.name}' do not fit the environment '{spec.name}': {difference}; "
                "choose the environment they were recorded in, or record others with `bm3il demonstrations record`"
            )

    def for_crowd(self, spec: EnvironmentSpec) -> Demonstrations:
        """These demonstrations as if there had been as many agents of each type as `spec` has.

        In row b, agent x of a type is the recorded agent (x + b) mod X_m: each recorded one is shown equally often.
        Every agent returns the mean of the recorded ones. Start states, which are those of the recorded agents, are
        left out. Itself if there were as many.
        """
        if all(mine.count == t.count for mine, t in zip(self.spec.types, spec.types, strict=True)):
            return self
        row = np.arange(self.num_rows)[:, None]
        types = [replace(mine, count=t.count) for mine, t in zip(self.spec.types, spec.types, strict=True)]
        recorded = [(np.arange(t.count) + row) % mine.count for mine, t in zip(self.spec.types, types, strict=True)]

        def shown(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
            return [array[row, agents] for array, agents in zip(arrays, recorded, strict=True)]

        return replace(
            self,
            spec=replace(self.spec, types=tuple(types)),
            observations=shown(self.observations),
            actions=shown(self.actions),
            action_masks=shown(self.action_masks),
            active=shown(self.active),
            returns=self.returns.mean(axis=1, keepdims=True).repeat(sum(t.count for t in types), axis=1),
            starts={},
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
        chosen = np.zeros(self.num_episodes, bool)
        chosen[shuffled[np.lexsort((turn, place_in_group))[:episodes]]] = True
        return self._take(chosen)

    def split(self, held_out: float, seed: int) -> tuple[Demonstrations, Demonstrations | None]:
        """Part of the groups, `held_out` of 1 (rounded down), apart from the others; None if that is no group."""
        names = np.unique(self.groups)
        count = int(held_out * len(names) + 1e-9)
        if not count:
            return self, None
        chosen = np.isin(self.groups, np.random.default_rng(seed).permutation(names)[:count])
        return self._take(~chosen), self._take(chosen)

    def save(self, path: str | Path) -> None:
        """Write the file under a temporary name, then rename it: nobody ever sees a part of it.

        Raises InputError if the folder is not writable or full; nothing is left behind then.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(serialise(self._tensors(), self._metadata()))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise InputError(f"cannot write the demonstrations {path}: {error}") from error

    @classmethod
    def load(cls, path: str | Path, ignore_forbidden: bool = False) -> Demonstrations:
        """Map a file into memory and check all of it. It must not change while it is in use.

        ignore_forbidden: agents are taken as inactive where they do what their masks forbid, instead of refusing them.
        Raises InputError, naming the file and what is wrong, for anything that `save` would not have written.
        """
        try:
            with safe_open(path, framework="pt") as file:
                return _read(file, ignore_forbidden)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except (OSError, SafetensorError, ValueError) as error:
            raise InputError(f"{path}: expected a safetensors file of demonstrations: {error}") from error

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

        return cls(
            spec=spec,
            origin=origin,
            observations=[rows(array) for array in trajectories.observations],
            actions=[rows(array) for array in trajectories.actions],
            action_masks=[rows(array) for array in trajectories.action_masks],
            active=[rows(array) for array in trajectories.active],
            episode_lengths=trajectories.lengths.astype(np.int64),
            returns=trajectories.returns(),
            groups=np.arange(episodes) if groups is None else groups,
            starts=starts or {},
        )

    def _known_returns(self) -> tuple[np.ndarray, np.ndarray]:
        values = self.returns.mean(axis=1, dtype=np.float64)
        known = np.isfinite(values)
        return values[known], self.groups[known]

    def _take(self, chosen: np.ndarray) -> Demonstrations:
        """The episodes for which `chosen` [episodes] is true, copied."""
        rows = np.repeat(chosen, self.episode_lengths)
        return Demonstrations(
            spec=self.spec,
            origin=self.origin,
            observations=[array[rows] for array in self.observations],
            actions=[array[rows] for array in self.actions],
            action_masks=[array[rows] for array in self.action_masks],
            active=[array[rows] for array in self.active],
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
            tensors |= {name: array for name, array in optional.items() if not array.all()}
            for name in (f"{m}.observations", f"{m}.action_masks"):
                if name in tensors and (compressed := packed(tensors[name])) is not None:
                    del tensors[name]
                    tensors[name + PACKED] = compressed
        return {name: np.ascontiguousarray(array) for name, array in tensors.items()}

    def _metadata(self) -> dict[str, str]:
        header = {
            "spec": self.spec.to_json(),
            "origin": self.origin,
            "episodes": self.num_episodes,
            "rows": self.num_rows,
            "returns_unit": RETURNS_UNIT,
            "return_mean": self.return_mean,
            "return_stderr": self.return_stderr,
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
    """The demonstrations of the job, checked against its environment, for as many agents; None if it names none.

    Raises InputError if they cannot be used.
    """
    if not job.demonstrations:
        return None
    demonstrations = Demonstrations.load(resolve(job.demonstrations))
    demonstrations.check_against(spec)
    if job.demonstration_episodes:
        demonstrations = demonstrations.select(job.demonstration_episodes, seed=0)
    return demonstrations.for_crowd(spec)


def _read(file: Any, ignore_forbidden: bool) -> Demonstrations:
    header = _header(file.metadata() or {})
    spec = EnvironmentSpec.from_json(header.get("spec"))
    tensors = Tensors(file)
    start_names = sorted(name for name in tensors.names if START_NAME.fullmatch(name))
    _check_names(spec, [name.removesuffix(PACKED) for name in tensors.names - set(start_names)])
    lengths = tensors.read("episode_lengths", "I64")
    observations, actions, masks, active = _columns(tensors, spec, lengths, ignore_forbidden)
    demonstrations = Demonstrations(
        spec=spec,
        origin=str(header.get("origin", "")),
        observations=observations,
        actions=actions,
        action_masks=masks,
        active=active,
        episode_lengths=lengths,
        returns=tensors.read("returns", "F32"),
        groups=tensors.read("groups", "I64"),
        starts={name.removeprefix("starts."): tensors.read(name, *NUMBERS) for name in start_names},
    )
    for key, found in (("episodes", demonstrations.num_episodes), ("rows", demonstrations.num_rows)):
        if header.get(key) != found:
            raise InputError(f"the header says {header.get(key)!r} {key}, the tensors hold {found}")
    return demonstrations


def _columns(
    tensors: Tensors, spec: EnvironmentSpec, lengths: np.ndarray, ignore_forbidden: bool
) -> tuple[list[np.ndarray], ...]:
    """Observations, actions, masks and active, one array per type each."""
    rows = int(lengths.clip(0, MAX_UNPACKED_BYTES).sum())
    columns: tuple[list[np.ndarray], ...] = ([], [], [], [])
    for m, t in enumerate(spec.types):
        seen = tensors.unpack(f"{m}.observations", "F32", (rows, t.count, t.observation_dim))
        action = tensors.read(f"{m}.actions", *(INTEGERS if t.discrete else ("F32",)))
        action = action.astype(np.int64) if t.discrete else action
        mask, active = (
            tensors.unpack(f"{m}.{name}", "BOOL", (rows, t.count, *width))
            if tensors.has(f"{m}.{name}")
            # No memory until it is copied: the width may be a lie, which only the comparison with an environment shows.
            else np.broadcast_to(np.ones((), bool), (*seen.shape[:2], *width))
            for name, width in (("action_masks", (t.action_dim,)), ("active", ()))
        )
        if ignore_forbidden and t.discrete:
            active = active & allowed_by(mask, action)
        for column, array in zip(columns, (seen, action, mask, active), strict=True):
            column.append(array)
    return columns


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


def _check_names(spec: EnvironmentSpec, found: Sequence[str]) -> None:
    names = set(found)
    numbers = range(spec.num_types)
    required = {"episode_lengths", "returns", "groups"}
    required |= {f"{m}.{name}" for m in numbers for name in ("observations", "actions")}
    allowed = required | {f"{m}.{name}" for m in numbers for name in ("action_masks", "active")}
    if missing := sorted(required - names):
        raise InputError(f"tensors are missing: {', '.join(missing)}")
    if extra := sorted(names - allowed):
        raise InputError(f"unexpected tensors: {', '.join(extra[:5])}")
    if len(names) < len(found):
        raise InputError("a tensor is there twice, packed and unpacked")

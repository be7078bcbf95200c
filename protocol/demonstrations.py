"""Expert demonstrations: whole episodes, compact (`protocol.observations`), checked whoever made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from bm3il.protocol import demonstration_file
from bm3il.protocol.demonstration_checks import check_block, check_episodes, without_forbidden
from bm3il.protocol.errors import InputError
from bm3il.protocol.job import Job
from bm3il.protocol.layout import JointRows, Layout
from bm3il.protocol.observations import Form, Observations, compacted, forms, integers, tensor_of
from bm3il.protocol.specs import ArrayTable, EnvironmentSpec, TypeSpec
from bm3il.protocol.trajectories import Trajectories, actions_entry, columns_of

RETURNS_UNIT = "true return per agent and episode"
SHIPPED_IN, SUFFIX = "bm3il.actors.experts", ".safetensors"


@dataclass(frozen=True)
class Demonstrations:
    """Episodes of an expert. A row is one joint step; episodes follow each other without a gap.

    arrays: for the block number b of the spec, as `array_table` says: `b.own`, `b.codes`, `b.shared`, `b.masks`, the
        columns of what was seen before the action; `b.actions` [rows, N_b, …]; `b.active` [rows, N_b] bool.
    episode_lengths: [episodes] int64.   returns: [episodes, N] float32, NaN where unknown.
    groups: [episodes] int64, the unit of independence, e.g. the number of a start state that several episodes share.
    starts: start states by name, [episodes, …], as `Environment.reset` takes them.

    Raises InputError, also from the constructor, if shapes do not fit the spec, episodes do not add up to the rows,
    observations are not finite, a code is out of range, or an action is, or is forbidden by its mask.
    """

    spec: EnvironmentSpec
    origin: str
    arrays: Mapping[str, np.ndarray]
    episode_lengths: np.ndarray
    returns: np.ndarray
    groups: np.ndarray
    starts: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_episodes(self.spec, self.episode_lengths, self.returns, self.groups, self.starts)
        table = self.array_table(self.spec, self.num_rows)
        for b, types in enumerate(self.spec.blocks):
            check_block([self.spec.types[m] for m in types], forms(self.spec)[b], b, self.arrays, table)

    @classmethod
    def of_types(
        cls,
        spec: EnvironmentSpec,
        origin: str,
        observations: Sequence[np.ndarray],
        actions: Sequence[np.ndarray],
        action_masks: Sequence[np.ndarray],
        active: Sequence[np.ndarray],
        episode_lengths: np.ndarray,
        returns: np.ndarray,
        groups: np.ndarray,
        starts: Mapping[str, np.ndarray] | None = None,
    ) -> Demonstrations:
        """From arrays of each type, expanded: observations [rows, X_m, O_m], actions [rows, X_m] or [rows, X_m, A_m],
        action masks [rows, X_m, A_m], active [rows, X_m]; of a spec that does not say what observations are made of."""
        arrays: dict[str, np.ndarray] = {}
        actions = [_narrowed(kind, action) for kind, action in zip(spec.types, actions, strict=True)]
        for b, types in enumerate(spec.blocks):
            columns = {"own": observations, "masks": action_masks, "actions": actions, "active": active}
            arrays |= {f"{b}.{name}": _side_by_side([part[m] for m in types]) for name, part in columns.items()}
        return cls(spec, origin, arrays, episode_lengths, returns, groups, starts or {})

    @property
    def observations(self) -> list[np.ndarray]:
        """Per type [rows, X_m, O_m] float32, expanded."""
        return self.spec.by_type([seen.dense().numpy() for seen in self._seen()], axis=1)

    @property
    def action_masks(self) -> list[np.ndarray]:
        """Per type [rows, X_m, A_m] bool, expanded."""
        return self.spec.by_type([seen.masks().numpy() for seen in self._seen()], axis=1)

    def observed(self, rows: np.ndarray) -> list[np.ndarray]:
        """What was observed in these rows: per type [len(rows), X_m, O_m] float32, expanded."""
        index = torch.from_numpy(rows)
        return self.spec.by_type([seen.select(index).dense().numpy() for seen in self._seen()], axis=1)

    def allowed(self, rows: np.ndarray) -> list[np.ndarray]:
        """What was allowed in these rows: per type [len(rows), X_m, A_m] bool, expanded."""
        index = torch.from_numpy(rows)
        return self.spec.by_type([seen.select(index).masks().numpy() for seen in self._seen()], axis=1)

    @property
    def actions(self) -> list[np.ndarray]:
        """Per type [rows, X_m] integers, or [rows, X_m, A_m] float32: views."""
        return self._column("actions")

    @property
    def active(self) -> list[np.ndarray]:
        """Per type [rows, X_m] bool: views."""
        return self._column("active")

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
    def returns_of_agents(self) -> np.ndarray | None:
        """Mean over episodes of each agent's true return, [N] float64; None if no episode's are known."""
        known = self.returns[np.isfinite(self.returns).all(axis=1)]
        return known.mean(axis=0, dtype=np.float64) if len(known) else None

    @property
    def return_stderr(self) -> float | None:
        """Standard error of `return_mean` over groups, since the episodes of one group are not independent."""
        values, groups = self._known_returns()
        _, index = np.unique(groups, return_inverse=True)
        sums = np.bincount(index, weights=values - values.mean()) if values.size else values
        if len(sums) < 2:
            return None
        return float(np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / len(values))

    def rows(self, layout: Layout) -> JointRows:
        """All rows for the networks of this layout, without copying if they have the form of its environment."""
        if self.spec.blocks == layout.spec.blocks:
            seen = self._seen()
            actions, active = (
                [tensor_of(self.arrays[f"{b}.{name}"]) for b in range(len(seen))] for name in ("actions", "active")
            )
            return JointRows(seen, actions, active)
        columns = {"own": self.observations, "masks": self.action_masks, "actions": self.actions, "active": self.active}
        blocks = [
            {name: tensor_of(_side_by_side([part[m] for m in block.types])) for name, part in columns.items()}
            for block in layout.blocks
        ]
        seen = [
            Observations(
                Form.plain(block.num_agents, block.observation_dim, block.action_dim),
                {name: arrays[name] for name in ("own", "masks")},
            )
            for block, arrays in zip(layout.blocks, blocks, strict=True)
        ]
        return JointRows(seen, *([arrays[name] for arrays in blocks] for name in ("actions", "active")))

    def check_against(self, spec: EnvironmentSpec) -> None:
        """Raise InputError if these are not demonstrations for an environment of this spec.

        Those of another number of agents fit a changed world, by `for_crowd`.
        """
        if difference := spec.difference(self.spec, counts=not spec.changes):
            raise InputError(
                f"demonstrations of '{self.spec.name}' do not fit the environment '{spec.name}': {difference}; "
                "choose the environment they were recorded in, or record or import others (`bm3il demonstrations`)"
            )

    def in_form_of(self, spec: EnvironmentSpec) -> Demonstrations:
        """Themselves as compact as an environment of this spec describes its observations, if their file (of a release
        that did not describe them) holds nothing that would be lost; else themselves."""
        plain = all(form.is_plain for form in forms(self.spec))
        found = compacted(self.spec, spec, self.observations, self.action_masks) if plain else None
        if found is None:
            return self
        described, columns = found
        arrays = {f"{b}.{name}": array for b, block in enumerate(columns) for name, array in block.items()}
        actions = [_narrowed(kind, action) for kind, action in zip(self.spec.types, self.actions, strict=True)]
        for name, per_type in (("actions", actions), ("active", self.active)):
            for b, types in enumerate(described.blocks):
                arrays[f"{b}.{name}"] = _side_by_side([per_type[m] for m in types])
        return replace(self, spec=described, arrays=arrays)

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
        arrays = dict(self.arrays)
        for b, block in enumerate(self.spec.blocks):
            counts = [self.spec.types[m].count for m in block]
            firsts = np.cumsum([0, *counts])
            shown = [
                first + (np.arange(types[m].count) + row) % count
                for m, first, count in zip(block, firsts, counts, strict=False)
            ]
            agents = np.concatenate(shown, axis=1)
            per_agent = (name for name in self.arrays if name.startswith(f"{b}.") and name != f"{b}.shared")
            arrays |= {name: self.arrays[name][row, agents] for name in per_agent}
        return replace(
            self,
            spec=replace(self.spec, types=tuple(types)),
            arrays=arrays,
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
        # 0.29 · 100 is 28.999…96 in floating point.
        count = int(held_out * len(names) + 1e-9)
        if not count:
            return self, None
        chosen = np.isin(self.groups, np.random.default_rng(seed).permutation(names)[:count])
        return self._take(~chosen), self._take(chosen)

    def save(self, path: str | Path) -> None:
        """Write the file of `protocol.demonstration_file`, whole or not at all.

        Raises InputError if the folder is not writable or full; nothing is left behind then.
        """
        counts = {"episodes": self.num_episodes, "rows": self.num_rows}
        per_episode = self.episode_lengths, self.returns, self.groups, dict(self.starts)
        contents = demonstration_file.Contents(self.spec, self.origin, dict(self.arrays), *per_episode, counts)
        figures = {
            "returns_unit": RETURNS_UNIT,
            "return_mean": self.return_mean,
            "return_stderr": self.return_stderr,
        }
        demonstration_file.write(path, contents, figures)

    @classmethod
    def load(cls, path: str | Path, ignore_forbidden: bool = False) -> Demonstrations:
        """Map a file into memory and check all of it. It must not change while it is in use.

        path: or the name of demonstrations that come with the package.
        ignore_forbidden: agents are taken as inactive where they do what their masks forbid, instead of refusing them.
        Raises InputError, naming the file and what is wrong, for anything that `save` would not have written.
        """
        found = demonstration_file.read(resolve(path))
        try:
            arrays = without_forbidden(found.spec, found.arrays) if ignore_forbidden else found.arrays
            per_episode = found.episode_lengths, found.returns, found.groups, found.starts
            demonstrations = cls(found.spec, found.origin, arrays, *per_episode)
            for key, count in (("episodes", demonstrations.num_episodes), ("rows", demonstrations.num_rows)):
                if found.counts[key] != count:
                    raise InputError(f"the header says {found.counts[key]!r} {key}, the tensors hold {count}")
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        return demonstrations

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
        names = cls.array_table(spec, 0)
        return cls(
            spec=spec,
            origin=origin,
            arrays={name: trajectories.arrays[name][:steps].swapaxes(0, 1)[played] for name in names},
            episode_lengths=trajectories.lengths.astype(np.int64),
            returns=trajectories.returns(),
            groups=np.arange(episodes) if groups is None else groups,
            starts=starts or {},
        )

    @staticmethod
    def array_table(spec: EnvironmentSpec, rows: int) -> ArrayTable:
        """Name → (dtype, shape) of `arrays`; discrete actions may be of any integers."""
        table: ArrayTable = {}
        for b, form in enumerate(forms(spec)):
            shape = (rows, form.agents)
            table |= {f"{b}.{name}": entry for name, entry in form.table_of(rows).items()}
            table[f"{b}.actions"] = actions_entry(spec.types[spec.blocks[b][0]], shape)
            table[f"{b}.active"] = ("bool", shape)
        return table

    def _seen(self) -> list[Observations]:
        return [Observations.of_arrays(form, columns_of(self.arrays, b)) for b, form in enumerate(forms(self.spec))]

    def _column(self, name: str) -> list[np.ndarray]:
        return self.spec.by_type([self.arrays[f"{b}.{name}"] for b in range(len(self.spec.blocks))], axis=1)

    def _known_returns(self) -> tuple[np.ndarray, np.ndarray]:
        values = self.returns.mean(axis=1, dtype=np.float64)
        known = np.isfinite(values)
        return values[known], self.groups[known]

    def _take(self, chosen: np.ndarray) -> Demonstrations:
        """The episodes for which `chosen` [episodes] is true, copied."""
        rows = np.repeat(chosen, self.episode_lengths)
        return replace(
            self,
            arrays={name: array[rows] for name, array in self.arrays.items()},
            episode_lengths=self.episode_lengths[chosen],
            returns=self.returns[chosen],
            groups=self.groups[chosen],
            starts={name: array[chosen] for name, array in self.starts.items()},
        )


def shipped_demonstrations() -> list[str]:
    """The names of those that come with the package."""
    files = resources.files(SHIPPED_IN).iterdir()
    return sorted(file.name.removesuffix(SUFFIX) for file in files if file.name.endswith(SUFFIX))


def resolve(name_or_path: str | Path, world: str = "", episodes: int = 0) -> Path:
    """The file that is meant: a path, or the name of demonstrations that ship with the package.

    A name as `shipped_demonstrations` has it means that one, whatever files there are.
    Raises InputError if there is neither, with the command that makes the file if `world` is known.
    """
    shipped = shipped_demonstrations()
    if Path(name_or_path).is_file() and str(name_or_path) not in shipped:
        return Path(name_or_path)
    name = str(name_or_path).removesuffix(SUFFIX)
    if name not in shipped:
        how = f' "{world}" --output {name}{SUFFIX}' if world else ""
        how += f" --episodes {episodes}" if episodes else ""
        raise InputError(
            f"no demonstrations '{name_or_path}': neither a file nor one of those that ship ({', '.join(shipped)}); "
            f"record some: bm3il demonstrations record{how}"
        )
    return Path(str(resources.files(SHIPPED_IN) / (name + SUFFIX)))


def load_demonstrations(job: Job) -> Demonstrations | None:
    """The demonstrations of the job, checked against its environment, in its form and for as many agents; None if it
    names none.

    Raises InputError if they cannot be used.
    """
    if not job.demonstrations:
        return None
    demonstrations = Demonstrations.load(job.demonstrations)
    demonstrations.check_against(job.spec)
    # First the few that are wanted: what follows may expand all rows that there are.
    if job.demonstration_episodes:
        demonstrations = demonstrations.select(job.demonstration_episodes, seed=0)
    return demonstrations.in_form_of(job.spec).for_crowd(job.spec)


def _narrowed(kind: TypeSpec, actions: np.ndarray) -> np.ndarray:
    """The actions as the smallest integers, if they are integers that fit."""
    if not kind.discrete or actions.dtype.kind not in "iu":
        return actions
    small = actions.astype(integers(kind.action_dim))
    return small if np.array_equal(small, actions) else actions


def _side_by_side(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """[rows, X_m, …] of all types of a block → [rows, N_b, …]; one is not copied."""
    return np.concatenate(arrays, axis=1) if len(arrays) > 1 else arrays[0]

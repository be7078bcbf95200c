"""The one form in which experience travels: from the rollout over the wire into the replay, and into demonstrations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from protocol.errors import ProtocolError
from protocol.specs import EnvironmentSpec

ArrayTable = dict[str, tuple[str, tuple[int, ...]]]


@dataclass
class Trajectories:
    """E whole episodes, padded to T steps; one array per type in each list.

    Action t was chosen on observation t and mask t; reward t, terminated t and truncated t came with observation
    t + 1. This is the only off-by-one of the data path.

    observations: [T+1, E, X_m, O_m] float32.   action_masks: [T+1, E, X_m, A_m] bool.   active: [T+1, E, X_m] bool.
    actions: [T, E, X_m] int64, or [T, E, X_m, A_m] float32 if continuous.
    log_probabilities: [T, E, X_m] float32, log μ(a|s) of the policy that acted (of continuous actions the density's).
    rewards: [T, E, X_m] float32, true rewards; imitation never reads them.
    terminated, truncated: [T, E] bool.   lengths: [E] int64, the steps of each episode; what lies beyond is padding.
    arrays: the memory of all these by name, as it travels: the types of a block lie side by side, [T+1, E, N_b, …].
    """

    arrays: Mapping[str, np.ndarray]
    observations: list[np.ndarray]
    action_masks: list[np.ndarray]
    active: list[np.ndarray]
    actions: list[np.ndarray]
    log_probabilities: list[np.ndarray]
    rewards: list[np.ndarray]
    terminated: np.ndarray
    truncated: np.ndarray
    lengths: np.ndarray

    @property
    def num_steps(self) -> int:
        """Joint environment steps, padding excluded."""
        return int(self.lengths.sum())

    @property
    def num_episodes(self) -> int:
        return len(self.lengths)

    def returns(self) -> np.ndarray:
        """True return of each episode and agent, [E, N]."""
        return np.concatenate([reward.sum(axis=0) for reward in self.rewards], axis=-1)

    @classmethod
    def zeros(cls, spec: EnvironmentSpec, episodes: int) -> Trajectories:
        """Room for episodes of full length."""
        table = cls.array_table(spec, spec.episode_length, episodes)
        arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in table.items()}
        arrays["lengths"][:] = spec.episode_length
        return cls._views(arrays, spec)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], spec: EnvironmentSpec) -> Trajectories:
        """Views of `arrays`, after checking the values that an index or a mask will rely on.

        Shapes and dtypes must have been checked against `array_table`.
        Raises ProtocolError (cause `bad_value`) for actions or lengths out of range, or values that are not finite.
        """
        steps, lengths = arrays["terminated"].shape[0], arrays["lengths"]
        if lengths.size and not (lengths.min() >= 1 and lengths.max() <= steps):
            raise ProtocolError("bad_value", f"episode lengths must lie in 1..{steps}")
        for b, types in enumerate(spec.blocks):
            first = spec.types[types[0]]
            whose = f"type '{first.name}'" + (" or one like it" if len(types) > 1 else "")
            if not np.isfinite(arrays[f"{b}.observations"]).all():
                raise ProtocolError("bad_value", f"{whose}: an observation is not finite")
            actions = arrays[f"{b}.actions"]
            least, most = (0, first.action_dim - 1) if first.discrete else (-1, 1)
            if actions.size and not (least <= actions.min() and actions.max() <= most):  # NaN is not either
                raise ProtocolError("bad_value", f"{whose}: actions must lie in {least}..{most}")
            if not np.isfinite(arrays[f"{b}.log_probabilities"]).all():
                raise ProtocolError("bad_value", f"{whose}: a log-probability is not finite")
        return cls._views(arrays, spec)

    @staticmethod
    def array_table(spec: EnvironmentSpec, steps: int, episodes: int) -> ArrayTable:
        """Name → (dtype, shape) of the arrays of `episodes` episodes of `steps` steps: the schema of a chunk."""
        table: ArrayTable = {
            "terminated": ("bool", (steps, episodes)),
            "truncated": ("bool", (steps, episodes)),
            "lengths": ("int64", (episodes,)),
        }
        for b, types in enumerate(spec.blocks):
            t, agents = spec.types[types[0]], sum(spec.types[m].count for m in types)
            rows, next_rows = (steps, episodes, agents), (steps + 1, episodes, agents)
            table[f"{b}.observations"] = ("float32", (*next_rows, t.observation_dim))
            table[f"{b}.action_masks"] = ("bool", (*next_rows, t.action_dim))
            table[f"{b}.active"] = ("bool", next_rows)
            table[f"{b}.actions"] = ("int64", rows) if t.discrete else ("float32", (*rows, t.action_dim))
            table[f"{b}.log_probabilities"] = ("float32", rows)
            table[f"{b}.rewards"] = ("float32", rows)
        return table

    @classmethod
    def _views(cls, arrays: Mapping[str, np.ndarray], spec: EnvironmentSpec) -> Trajectories:
        columns: dict[str, list[np.ndarray]] = {}
        for field in ("observations", "action_masks", "active", "actions", "log_probabilities", "rewards"):
            parts: dict[int, np.ndarray] = {}
            for b, types in enumerate(spec.blocks):
                ends = np.cumsum([spec.types[m].count for m in types])
                parts |= dict(zip(types, np.split(arrays[f"{b}.{field}"], ends[:-1], axis=2), strict=True))
            columns[field] = [parts[m] for m in range(spec.num_types)]
        return cls(
            arrays, terminated=arrays["terminated"], truncated=arrays["truncated"], lengths=arrays["lengths"], **columns
        )

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
    rewards: [T, E, X_m] float32, true rewards; imitation never reads them.
    terminated, truncated: [T, E] bool.   lengths: [E] int64, the steps of each episode; what lies beyond is padding.
    """

    observations: list[np.ndarray]
    action_masks: list[np.ndarray]
    active: list[np.ndarray]
    actions: list[np.ndarray]
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

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Named arrays for a message; `from_arrays` is the inverse."""
        arrays = {"terminated": self.terminated, "truncated": self.truncated, "lengths": self.lengths}
        for field in ("observations", "action_masks", "active", "actions", "rewards"):
            arrays |= {f"{m}.{field}": array for m, array in enumerate(getattr(self, field))}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], spec: EnvironmentSpec) -> Trajectories:
        """Rebuild from named arrays and check the values that an index or a mask will rely on.

        Shapes and dtypes must have been checked against `array_table`.
        Raises ProtocolError (cause `bad_value`) for actions or lengths out of range, or values that are not finite.
        """
        fields = ("observations", "action_masks", "active", "actions", "rewards")
        columns = {field: [arrays[f"{m}.{field}"] for m in range(spec.num_types)] for field in fields}
        value = cls(
            terminated=arrays["terminated"], truncated=arrays["truncated"], lengths=arrays["lengths"], **columns
        )
        value.check_values(spec)
        return value

    def check_values(self, spec: EnvironmentSpec) -> None:
        """Raise ProtocolError (cause `bad_value`) if an action, a length or an observation is out of range."""
        steps = self.terminated.shape[0]
        if self.lengths.size and not (self.lengths.min() >= 1 and self.lengths.max() <= steps):
            raise ProtocolError("bad_value", f"episode lengths must lie in 1..{steps}")
        for agent_type, actions, observations in zip(spec.types, self.actions, self.observations, strict=True):
            if not np.isfinite(observations).all():
                raise ProtocolError("bad_value", f"type '{agent_type.name}': an observation is not finite")
            least, most = (0, agent_type.action_dim - 1) if agent_type.discrete else (-1, 1)
            if actions.size and not (least <= actions.min() and actions.max() <= most):  # NaN is not either
                raise ProtocolError("bad_value", f"type '{agent_type.name}': actions must lie in {least}..{most}")

    @staticmethod
    def array_table(spec: EnvironmentSpec, steps: int, episodes: int) -> ArrayTable:
        """Name → (dtype, shape) of the arrays of `episodes` episodes of `steps` steps: the schema of a chunk."""
        table: ArrayTable = {
            "terminated": ("bool", (steps, episodes)),
            "truncated": ("bool", (steps, episodes)),
            "lengths": ("int64", (episodes,)),
        }
        for m, t in enumerate(spec.types):
            rows, next_rows = (steps, episodes, t.count), (steps + 1, episodes, t.count)
            table[f"{m}.observations"] = ("float32", (*next_rows, t.observation_dim))
            table[f"{m}.action_masks"] = ("bool", (*next_rows, t.action_dim))
            table[f"{m}.active"] = ("bool", next_rows)
            table[f"{m}.actions"] = ("int64", rows) if t.discrete else ("float32", (*rows, t.action_dim))
            table[f"{m}.rewards"] = ("float32", rows)
        return table

"""The one form in which experience travels: from the rollout over the wire into the replay, and into demonstrations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from bm3il.protocol.errors import ProtocolError
from bm3il.protocol.observations import COLUMNS, Observations, forms, integers
from bm3il.protocol.specs import ArrayTable, EnvironmentSpec, TypeSpec


@dataclass
class Trajectories:
    """E whole episodes, padded to T steps: the arrays of `array_table` by name, as they travel.

    Action t was chosen on observation t and mask t; reward t, terminated t and truncated t came with observation
    t + 1. This is the only off-by-one of the data path. For the block number b of the spec:

    b.own, b.codes, b.shared, b.masks: what its N_b agents observe and may do, the columns of `protocol.observations`
        with the leading axes [T+1, E].   b.active: [T+1, E, N_b] bool.
    b.actions: [T, E, N_b], the smallest integers that hold them, or [T, E, N_b, A_b] float32 if continuous.
    b.log_probabilities: [T, E, N_b] float32, log μ(a|s) of the policy that acted (of continuous actions the density's).
    b.rewards: [T, E, N_b] float32, true rewards; imitation never reads them.
    terminated, truncated: [T, E] bool.   lengths: [E] int64, the steps of each episode; what lies beyond is padding.

    The properties show them type by type, [T or T+1, E, X_m, …]: observations and masks are expanded, the others views.
    """

    spec: EnvironmentSpec
    arrays: Mapping[str, np.ndarray]

    @property
    def terminated(self) -> np.ndarray:
        return self.arrays["terminated"]

    @property
    def truncated(self) -> np.ndarray:
        return self.arrays["truncated"]

    @property
    def lengths(self) -> np.ndarray:
        return self.arrays["lengths"]

    @property
    def observations(self) -> list[np.ndarray]:
        return self.spec.by_type([seen.dense().numpy() for seen in self.seen()], axis=2)

    @property
    def action_masks(self) -> list[np.ndarray]:
        return self.spec.by_type([seen.masks().numpy() for seen in self.seen()], axis=2)

    @property
    def active(self) -> list[np.ndarray]:
        return self._column("active")

    @property
    def actions(self) -> list[np.ndarray]:
        return self._column("actions")

    @property
    def log_probabilities(self) -> list[np.ndarray]:
        return self._column("log_probabilities")

    @property
    def rewards(self) -> list[np.ndarray]:
        return self._column("rewards")

    @property
    def num_steps(self) -> int:
        """Joint environment steps, padding excluded."""
        return int(self.lengths.sum())

    @property
    def num_episodes(self) -> int:
        return len(self.lengths)

    @property
    def num_bytes(self) -> int:
        """Of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def seen(self) -> list[Observations]:
        """What the agents of each block observe and may do, compact, [T+1, E] in front; without copying."""
        return [Observations.of_arrays(form, columns_of(self.arrays, b)) for b, form in enumerate(forms(self.spec))]

    def returns(self) -> np.ndarray:
        """True return of each episode and agent, [E, N]."""
        return np.concatenate([reward.sum(axis=0) for reward in self.rewards], axis=-1)

    @classmethod
    def zeros(cls, spec: EnvironmentSpec, episodes: int) -> Trajectories:
        """Room for episodes of full length."""
        table = cls.array_table(spec, spec.episode_length, episodes)
        arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in table.items()}
        arrays["lengths"][:] = spec.episode_length
        return cls(spec, arrays)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], spec: EnvironmentSpec) -> Trajectories:
        """Take over `arrays`, after checking the values that an index or a mask will rely on.

        Shapes and dtypes must have been checked against `array_table`.
        Raises ProtocolError (cause `bad_value`) for actions, codes or lengths out of range, or values that are not
        finite.
        """
        found = cls(spec, arrays)
        found.check()
        return found

    def check(self) -> None:
        """Raise ProtocolError (cause `bad_value`) for what `from_arrays` names."""
        steps, lengths = len(self.terminated), self.lengths
        if lengths.size and not (lengths.min() >= 1 and lengths.max() <= steps):
            raise ProtocolError("bad_value", f"episode lengths must lie in 1..{steps}")
        # Not the rewards: imitation never reads them, and a test puts NaN in their place to prove it.
        for b, (types, seen) in enumerate(zip(self.spec.blocks, self.seen(), strict=True)):
            first = self.spec.types[types[0]]
            whose = f"type '{first.name}'" + (" or one like it" if len(types) > 1 else "")
            seen.check(whose)
            check_actions(first, torch.from_numpy(self.arrays[f"{b}.actions"]), whose)
            if not np.isfinite(self.arrays[f"{b}.log_probabilities"]).all():
                raise ProtocolError("bad_value", f"{whose}: a log-probability is not finite")

    @staticmethod
    def array_table(spec: EnvironmentSpec, steps: int, episodes: int) -> ArrayTable:
        """Name → (dtype, shape) of the arrays of `episodes` episodes of `steps` steps: the schema of a chunk."""
        table: ArrayTable = {
            "terminated": ("bool", (steps, episodes)),
            "truncated": ("bool", (steps, episodes)),
            "lengths": ("int64", (episodes,)),
        }
        for b, form in enumerate(forms(spec)):
            rows = (steps, episodes, form.agents)
            table |= {f"{b}.{name}": entry for name, entry in form.table_of(steps + 1, episodes).items()}
            table[f"{b}.active"] = ("bool", (steps + 1, episodes, form.agents))
            table[f"{b}.actions"] = actions_entry(spec.types[spec.blocks[b][0]], rows)
            table[f"{b}.log_probabilities"] = ("float32", rows)
            table[f"{b}.rewards"] = ("float32", rows)
        return table

    def _column(self, name: str) -> list[np.ndarray]:
        return self.spec.by_type([self.arrays[f"{b}.{name}"] for b in range(len(self.spec.blocks))], axis=2)


def columns_of(arrays: Mapping[str, np.ndarray], b: int) -> dict[str, np.ndarray]:
    """The columns of the observations of a block that there are, under their own names."""
    return {name: arrays[f"{b}.{name}"] for name in COLUMNS if f"{b}.{name}" in arrays}


def actions_entry(kind: TypeSpec, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of what the agents of a type did, of so many agents: the entry of a table."""
    return (integers(kind.action_dim), shape) if kind.discrete else ("float32", (*shape, kind.action_dim))


def check_actions(kind: TypeSpec, actions: torch.Tensor, whose: str) -> None:
    """Raise ProtocolError (cause `bad_value`) for actions that there are not."""
    least, most = (0, kind.action_dim - 1) if kind.discrete else (-1, 1)
    if actions.numel() and not (least <= actions.min() and actions.max() <= most):  # NaN is not either
        raise ProtocolError("bad_value", f"{whose}: actions must lie in {least}..{most}")

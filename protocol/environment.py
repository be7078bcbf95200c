"""The contract between an environment and everything else: batched over E environments, grouped by type."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, overload, runtime_checkable

import numpy as np
import torch

from bm3il.protocol.errors import InputError
from bm3il.protocol.observations import Observations, forms
from bm3il.protocol.specs import EnvironmentSpec

Starts = Mapping[str, np.ndarray]

IMPOSSIBLE, AMBIGUOUS = -1, -2
"""In place of an action, where none leads to what was recorded, or more than one could have."""


@dataclass
class TimeStep:
    """What E environments show after `reset` or `step`; one array per type in each list.

    observations: [E, X_m, O_m] float32.
    action_masks: [E, X_m, A_m] bool, the actions allowed *now* (all true for continuous actions).
    active: [E, X_m] bool; false for an agent that died or has not spawned. On the step that ends an episode the agents
        that lived to see its end are still active (a truncated episode is bootstrapped from there).
    rewards: [E, X_m] float32, true rewards of the step just taken (zero after `reset`); read only for evaluation
        and for training experts, never by imitation.
    terminated: [E] bool, the episode has ended and nothing follows (no bootstrap).
    truncated: [E] bool, the episode was cut off by a time limit (bootstrap through it).
    columns: per block of the spec the columns of `protocol.observations`, with [E] in front, where the spec says what
        observations are made of (see `compact_step`); None where it says nothing.

    Stepping an environment that has ended changes nothing until `reset`: its agents are inactive, its rewards 0, its
    flags stay set.
    The arrays may be overwritten by the next call: copy what must stay.
    """

    observations: Sequence[np.ndarray]
    action_masks: Sequence[np.ndarray]
    active: list[np.ndarray]
    rewards: list[np.ndarray]
    terminated: np.ndarray
    truncated: np.ndarray
    columns: list[dict[str, np.ndarray]] | None = None

    def seen(self, spec: EnvironmentSpec) -> list[Observations]:
        """What the agents of each block observe and may do, compact, [E] in front; where they can, views.

        Raises InputError if the spec says what observations are made of, and this holds none of it.
        """
        if self.columns is not None:
            return [Observations.of_arrays(form, c) for form, c in zip(forms(spec), self.columns, strict=True)]
        found = []
        for form, types in zip(forms(spec), spec.blocks, strict=True):
            if not form.is_plain:
                raise InputError(
                    f"the spec of '{spec.name}' says what observations are made of, so its time steps must hold "
                    "`columns`: make them by protocol.environment.compact_step, or leave the kinds of its parts out"
                )
            parts = {"own": self.observations, "masks": self.action_masks}
            columns = {name: np.concatenate([part[m] for m in types], axis=1) for name, part in parts.items()}
            found.append(Observations.of_arrays(form, columns))
        return found


def compact_step(
    spec: EnvironmentSpec,
    columns: list[dict[str, np.ndarray]],
    active: list[np.ndarray],
    rewards: list[np.ndarray],
    terminated: np.ndarray,
    truncated: np.ndarray,
) -> TimeStep:
    """A time step of an environment whose spec says what observations are made of.

    columns: per block (`spec.blocks`: types that see and do alike things) what its agents have, [E, X, …] with those of
    all its types side by side: `own` [E, X, D] float32, all parts of kind own; `uint8` and `int16`, the same of theirs;
    `codes` [E, X, C], of each code its number, or its width for "none", in the smallest of uint8, int16 and int32 that
    holds them; `shared` [E, S] float32; `masks` [E, X, A] bool, unless the type's `mask` says them. The arrays may be
    overwritten by the next step. Observations and masks are expanded from them when somebody looks at those of the
    step, each time anew.
    """
    observations = _Expanded(spec, columns, Observations.dense)
    action_masks = _Expanded(spec, columns, Observations.masks)
    return TimeStep(observations, action_masks, active, rewards, terminated, truncated, columns)


class _Expanded(Sequence[np.ndarray]):
    """Observations or masks of all types, [E, X_m, …]."""

    def __init__(
        self,
        spec: EnvironmentSpec,
        columns: list[dict[str, np.ndarray]],
        expand: Callable[[Observations], torch.Tensor],
    ) -> None:
        self._spec, self._columns, self._expand = spec, columns, expand

    def __len__(self) -> int:
        return self._spec.num_types

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self._all())

    @overload
    def __getitem__(self, which: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, which: slice) -> list[np.ndarray]: ...

    def __getitem__(self, which: int | slice) -> np.ndarray | list[np.ndarray]:
        return self._all()[which]

    def _all(self) -> list[np.ndarray]:
        blocks = zip(forms(self._spec), self._columns, strict=True)
        expanded = [self._expand(Observations.of_arrays(form, columns)).numpy() for form, columns in blocks]
        return self._spec.by_type(expanded, axis=1)


@runtime_checkable
class Environment(Protocol):
    """E independent copies of one multi-agent environment, stepped together.

    One that can draw itself also has `render() -> np.ndarray | None`: a picture of the first copy as it is now,
    [H, W, 3] uint8, for `bm3il play`; None where there is nothing to see.
    """

    spec: EnvironmentSpec
    num_envs: int

    def reset(self, seed: int, starts: Starts | None = None) -> TimeStep:
        """Start E new episodes. The same seed gives the same episodes under the same actions.

        starts: start states by name, each [E, ...], as `Demonstrations.starts` holds them, for paired evaluation;
            an environment that cannot start from given states raises InputError.
        """
        ...

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        """Advance all E environments by one joint step.

        actions: per type [E, X_m] int64 if discrete, else [E, X_m, A_m] float32 in [-1, 1]; those of inactive
            agents are ignored.
        """
        ...


@runtime_checkable
class TellsActions(Protocol):
    """An environment that can tell from where its agents were what they saw, and what they did to get there.

    With it, recordings of positions alone become demonstrations (`protocol.recordings.positions`). Optional.
    positions: per type, the names of the D_m numbers that say where an agent is; columns of a recorded table.
    """

    positions: Sequence[tuple[str, ...]]

    def show_at(self, positions: Sequence[np.ndarray], step: int) -> TimeStep:
        """What all see and may do at `step` 0, 1, … of E episodes, and the rewards of having got there. After `reset`.

        positions: per type [E, X_m, D_m] float64; NaN for an agent that is not there.
        Raises InputError, naming the agent, for a place where it cannot be.
        """
        ...

    def actions_to(self, positions: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What leads from where all were shown last to these positions: per type [E, X_m] int64, an action, IMPOSSIBLE
        or AMBIGUOUS. Of agents that are not there before and after, anything."""
        ...

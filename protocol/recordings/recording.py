"""Episodes as somebody else wrote them down, checked while they become demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bm3il.protocol.demonstration_checks import allowed_by
from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.errors import InputError
from bm3il.protocol.observations import Form, Observations, compact, forms
from bm3il.protocol.recordings.columns import observation_columns
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec
from bm3il.protocol.trajectories import actions_entry

ROUNDED = 1e-4
"""What all agents see alike, or always, may be written down with fewer digits than it has."""

Place = Callable[[int, int, int], str]
"""Type, row, agent of that type → where it is written down, for people."""


@dataclass
class Recording:
    """Whole episodes, one after the other; a row is one joint step. Arrays are expanded, and of each type.

    observations: [rows, X_m, O_m].   actions: [rows, X_m] integers, or [rows, X_m, A_m] in −1..1.
    active: [rows, X_m] bool; of those that are not, the rest may be anything.
    action_masks: [rows, X_m, A_m] bool, or None where nobody wrote any down: what the environment's spec allows.
    episode_lengths: [episodes].   returns: [episodes, N], NaN where unknown.
    place: says where the row of an active agent is written.
    """

    observations: Sequence[np.ndarray]
    actions: Sequence[np.ndarray]
    active: Sequence[np.ndarray]
    action_masks: Sequence[np.ndarray | None]
    episode_lengths: np.ndarray
    returns: np.ndarray
    place: Place

    def demonstrations(self, spec: EnvironmentSpec, origin: str, groups: np.ndarray | None = None) -> Demonstrations:
        """As an environment of this spec keeps them; without `groups`, each episode is independent of the others.

        Raises InputError with the place of the first thing that cannot have happened there: an episode that is too
        long, a number that is not finite, an action that there is not or that is forbidden, and what no agent of this
        environment observes.
        """
        lengths = np.asarray(self.episode_lengths, np.int64)
        self._check_lengths(spec, lengths)
        for m, kind in enumerate(spec.types):
            self._check_numbers(kind, m)
        blocks = [self._columns(form, types) for form, types in zip(forms(spec), spec.blocks, strict=True)]
        seen = [Observations.of_arrays(form, columns) for form, columns in zip(forms(spec), blocks, strict=True)]
        dense = spec.by_type([block.dense().numpy() for block in seen], axis=1)
        masks = spec.by_type([block.masks().numpy() for block in seen], axis=1)
        for m in range(spec.num_types):
            self._check_seen(spec, m, dense[m], masks[m])
        arrays = {f"{b}.{name}": column for b, columns in enumerate(blocks) for name, column in columns.items()}
        for b, types in enumerate(spec.blocks):
            dtype, _ = actions_entry(spec.types[types[0]], ())
            actions = [np.where(_as_wide(self.active[m], self.actions[m]), self.actions[m], 0) for m in types]
            arrays[f"{b}.actions"] = np.concatenate(actions, axis=1).astype(dtype)
            arrays[f"{b}.active"] = np.concatenate([self.active[m] for m in types], axis=1)
        groups = np.arange(len(lengths)) if groups is None else groups
        return Demonstrations(spec, origin, arrays, lengths, self.returns.astype(np.float32), groups)

    def _check_lengths(self, spec: EnvironmentSpec, lengths: np.ndarray) -> None:
        if not lengths.size or lengths.max() <= spec.episode_length:
            return
        first = int(np.argmax(lengths > spec.episode_length))
        row = int(lengths[:first].sum()) + spec.episode_length
        # Where somebody is active: of the others, nothing may be written.
        last = next(((m, row, int(a[row].argmax())) for m, a in enumerate(self.active) if a[row].any()), (0, row, 0))
        raise InputError(
            f"{self.place(*last)}: expected episodes of at most {spec.episode_length} steps, as '{spec.name}' has "
            f"them, got one of {lengths[first]}"
        )

    def _check_numbers(self, kind: TypeSpec, m: int) -> None:
        seen, actions, active = self.observations[m], self.actions[m], self.active[m]
        if (at := _first(active[..., None] & ~np.isfinite(seen))) is not None:
            column = observation_columns(kind)[at[2]]
            raise InputError(f"{self.place(m, *at[:2])}: expected a finite number in '{column}', got {seen[at]}")
        low, high = (0, kind.action_dim - 1) if kind.discrete else (-1, 1)
        inside = (actions >= low) & (actions <= high)  # NaN is not
        if (at := _first(_as_wide(active, actions) & ~inside)) is not None:
            expected = f"an action of '{kind.name}' in {low}..{high}"
            raise InputError(f"{self.place(m, *at[:2])}: expected {expected}, got {actions[at]}")

    def _columns(self, form: Form, types: Sequence[int]) -> dict[str, np.ndarray]:
        """What the agents of a block observe and may do, as the environment keeps it."""
        there = np.concatenate([self.active[m] for m in types], axis=1)[..., None]
        seen = np.concatenate([self.observations[m] for m in types], axis=1)
        seen = np.where(there, seen, 0).astype(np.float32)
        somebody = there.argmax(axis=1, keepdims=True)
        for run in form.runs:
            if run.kind == "shared":  # it is kept once for all, of whom some see nothing
                part = seen[..., run.columns]
                seen[..., run.columns] = np.where(there, part, np.take_along_axis(part, somebody, axis=1))
        allowed = np.ones((*seen.shape[:2], form.action_dim), bool)
        if form.own_masks:
            first = 0
            for m in types:
                agents = slice(first, first := first + self.active[m].shape[1])
                if (written := self.action_masks[m]) is not None:
                    allowed[:, agents] = written
            allowed |= ~there
        else:
            allowed = Observations.of_arrays(form, compact(form, seen, allowed)).masks().numpy()
        columns = compact(form, seen, allowed & there)
        return columns | ({"masks": allowed} if form.own_masks else {})

    def _check_seen(self, spec: EnvironmentSpec, m: int, dense: np.ndarray, masks: np.ndarray) -> None:
        """Whether what is kept is what was written down, and allows what was done."""
        kind, active, written = spec.types[m], self.active[m], self.action_masks[m]
        differs = ~np.isclose(dense, self.observations[m], rtol=ROUNDED, atol=ROUNDED) & active[..., None]
        if (at := _first(differs)) is not None:
            column, found = observation_columns(kind)[at[2]], self.observations[m][at]
            what = f"'{column}' of '{kind.name}' in '{spec.name}'"
            raise InputError(f"{self.place(m, *at[:2])}: expected {dense[at]:g} as {what}, got {found:g}")
        if written is not None and (at := _first(active[..., None] & (masks != written))) is not None:
            may = "allows" if masks[at] else "forbids"
            raise InputError(
                f"{self.place(m, *at[:2])}: '{spec.name}' {may} action {at[2]} there, and its mask does not"
            )
        if kind.discrete and (at := _first(active & ~allowed_by(masks, self.actions[m]))) is not None:
            allowed = ", ".join(map(str, np.flatnonzero(masks[at])[:10])) or "none at all"
            raise InputError(f"{self.place(m, *at)}: expected an allowed action ({allowed}), got {self.actions[m][at]}")


def _as_wide(active: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """active [rows, X_m] with as many axes as actions."""
    return active.reshape(active.shape + (1,) * (actions.ndim - active.ndim))


def _first(wrong: np.ndarray) -> tuple[int, ...] | None:
    """The first place that is true; None if there is none."""
    return tuple(map(int, np.unravel_index(wrong.argmax(), wrong.shape))) if wrong.any() else None

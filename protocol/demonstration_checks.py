"""What must hold of demonstrations, whoever made them: shapes that fit the spec, values that an index may rely on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from bm3il.protocol.errors import InputError
from bm3il.protocol.observations import Form, Observations, forms
from bm3il.protocol.specs import ArrayTable, EnvironmentSpec, TypeSpec
from bm3il.protocol.trajectories import columns_of

NUMBERS_AT_ONCE = 1 << 25
"""Observed numbers and action masks that are looked at together: those of a day of thousands of agents are billions."""
OWN, SHARED = "observed values are not finite", "values that all observe are not finite"
FORBIDDEN = "actions are forbidden by their masks"


def check_episodes(
    spec: EnvironmentSpec,
    lengths: np.ndarray,
    returns: np.ndarray,
    groups: np.ndarray,
    starts: Mapping[str, np.ndarray],
) -> None:
    """Check what exists once per episode. Raises InputError."""
    _expect_shape("episode_lengths", lengths, (lengths.size,))
    if not lengths.size:
        raise InputError("expected at least one episode, found none")
    if not 1 <= lengths.min() <= lengths.max() <= spec.episode_length:
        raise InputError(f"expected episodes of 1..{spec.episode_length} steps, found {lengths.min()}..{lengths.max()}")
    _expect_shape("returns", returns, (len(lengths), spec.num_agents))
    _expect_shape("groups", groups, (len(lengths),))
    if np.isinf(returns).any():
        raise InputError("a return is infinite (NaN stands for an unknown one)")
    for name, array in starts.items():
        _expect_shape(f"starts.{name}", array, (len(lengths), *array.shape[1:]))
        if not np.isfinite(array).all():
            raise InputError(f"starts.{name}: a value is not finite")


def check_block(
    kinds: Sequence[TypeSpec], form: Form, b: int, arrays: Mapping[str, np.ndarray], table: ArrayTable
) -> None:
    """Check what exists once per row, for the block number b of these types; bounded memory, whatever the rows.

    Raises InputError.
    """
    whose = f"type '{kinds[0].name}'" + (" or one like it" if len(kinds) > 1 else "")
    mine = {name: entry for name, entry in table.items() if name.startswith(f"{b}.")}
    if missing := sorted(set(mine) - set(arrays)):
        raise InputError(f"{whose}: {', '.join(missing)} is missing")
    for name, (dtype, shape) in mine.items():
        _expect_shape(f"{name.partition('.')[2]} of {whose}", arrays[name], shape)
        integers = name.endswith(".actions") and kinds[0].discrete
        if arrays[name].dtype != np.dtype(dtype) and not (integers and arrays[name].dtype.kind in "iu"):
            raise InputError(f"{name.partition('.')[2]} of {whose}: expected {dtype}, found {arrays[name].dtype}")
    columns = columns_of(arrays, b)
    rows = len(arrays[f"{b}.active"])
    wrong_values: dict[str, tuple[int, str]] = {}
    for part in _parts(form, rows):
        seen = Observations.of_arrays(form, {name: column[part] for name, column in columns.items()})
        for what, wrong in _wrong(kinds[0], seen, arrays[f"{b}.actions"][part], arrays[f"{b}.active"][part]).items():
            if wrong.any():
                row, *agent = np.argwhere(wrong)[0]
                at = f"row {part.start + row}" + f", agent {agent[0]}" * (what != SHARED)
                count, where = wrong_values.get(what, (0, at))
                wrong_values[what] = count + int(wrong.sum()), where
    for what, (count, where) in wrong_values.items():
        advice = "; `bm3il demonstrations clean` leaves them out" if what == FORBIDDEN else ""
        raise InputError(f"{whose}: {count} {what}, the first in {where}{advice}")


def without_forbidden(spec: EnvironmentSpec, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays, with agents inactive where they do what their masks forbid."""
    cleaned = dict(arrays)
    for b, (types, form) in enumerate(zip(spec.blocks, forms(spec), strict=True)):
        if spec.types[types[0]].discrete:
            seen, actions = Observations.of_arrays(form, columns_of(arrays, b)), arrays[f"{b}.actions"]
            parts = _parts(form, len(actions))
            allowed = [allowed_by(seen[part].masks().numpy(), actions[part]) for part in parts]
            cleaned[f"{b}.active"] = arrays[f"{b}.active"] & np.concatenate(allowed)
    return cleaned


def _parts(form: Form, rows: int) -> Iterator[slice]:
    """Rows that are looked at together."""
    own = form.own + form.uint8 + form.int16
    height = max(1, NUMBERS_AT_ONCE // (form.agents * (own + form.action_dim) + form.shared))
    for first in range(0, rows, height):
        yield slice(first, first + height)


def _wrong(kind: TypeSpec, seen: Observations, actions: np.ndarray, active: np.ndarray) -> dict[str, np.ndarray]:
    """What can be wrong → where it is, [rows, N_b, …] (or [rows, S] of what all agents share) bool."""
    columns = {name: column.numpy() for name, column in seen.columns.items()}
    wrong = {what: ~np.isfinite(columns[name]) for name, what in (("own", OWN), ("shared", SHARED)) if name in columns}
    if "codes" in columns:
        sizes = np.array(seen.form.code_sizes)
        wrong["codes are out of their range"] = (columns["codes"] < 0) | (columns["codes"] > sizes)
    if not kind.discrete:
        return wrong | {"action values are not within −1..1": ~(np.abs(actions) <= 1)}
    last = kind.action_dim - 1
    wrong[f"actions are not in 0..{last}"] = (actions < 0) | (actions > last)
    if not any(each.any() for each in wrong.values()):  # masks are found by codes
        wrong[FORBIDDEN] = active & ~allowed_by(seen.masks().numpy(), actions)
    return wrong


def allowed_by(masks: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Whether each action [rows, N_b] is one that its mask [rows, N_b, A_b] allows (the nearest, if out of range)."""
    known = np.clip(actions.astype(np.int64), 0, masks.shape[2] - 1)
    return np.take_along_axis(masks, known[..., None], axis=2)[..., 0]


def _expect_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise InputError(f"{name}: expected {list(shape)}, found {list(array.shape)}")

"""What must hold of demonstrations, whoever made them: shapes that fit the spec, values that an index may rely on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from protocol.errors import InputError
from protocol.specs import EnvironmentSpec, TypeSpec

ROWS_AT_ONCE = 8_192
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


def check_type(
    agent_type: TypeSpec,
    rows: int,
    observations: np.ndarray,
    actions: np.ndarray,
    masks: np.ndarray,
    active: np.ndarray,
) -> None:
    """Check what exists once per row, for one type; bounded memory, whatever the number of rows. Raises InputError."""
    name, agents, width = agent_type.name, (rows, agent_type.count), agent_type.action_dim
    _expect_shape(f"observations of type '{name}'", observations, (*agents, agent_type.observation_dim))
    _expect_shape(f"actions of type '{name}'", actions, agents if agent_type.discrete else (*agents, width))
    _expect_shape(f"action masks of type '{name}'", masks, (*agents, width))
    _expect_shape(f"active of type '{name}'", active, agents)
    wrong_values: dict[str, tuple[int, str]] = {}
    for first in range(0, rows, ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        for what, wrong in _wrong(agent_type, observations[part], actions[part], masks[part], active[part]).items():
            if wrong.any():
                row, agent = np.argwhere(wrong)[0][:2]
                count, where = wrong_values.get(what, (0, f"row {first + row}, agent {agent}"))
                wrong_values[what] = count + int(wrong.sum()), where
    for what, (count, where) in wrong_values.items():
        advice = "; `bm3il demonstrations clean` leaves them out" if what == FORBIDDEN else ""
        raise InputError(f"type '{name}': {count} {what}, the first in {where}{advice}")


def _wrong(
    agent_type: TypeSpec, observations: np.ndarray, actions: np.ndarray, masks: np.ndarray, active: np.ndarray
) -> dict[str, np.ndarray]:
    """What can be wrong → where it is, [rows, X_m, …] bool."""
    wrong = {"observed values are not finite": ~np.isfinite(observations)}
    if not agent_type.discrete:
        return wrong | {"action values are not within −1..1": ~(np.abs(actions) <= 1)}
    last = agent_type.action_dim - 1
    return wrong | {
        f"actions are not in 0..{last}": (actions < 0) | (actions > last),
        FORBIDDEN: active & ~allowed_by(masks, actions),
    }


def allowed_by(masks: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Whether each action [rows, X_m] is one that its mask [rows, X_m, A_m] allows (the nearest, if out of range)."""
    known = np.clip(actions, 0, masks.shape[2] - 1)
    return np.take_along_axis(masks, known[..., None], axis=2)[..., 0]


def _expect_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise InputError(f"{name}: expected {list(shape)}, found {list(array.shape)}")

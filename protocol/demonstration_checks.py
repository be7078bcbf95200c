"""What must hold of demonstrations, whoever made them: shapes that fit the spec, values that an index may rely on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from protocol.errors import InputError
from protocol.specs import EnvironmentSpec, TypeSpec

ROWS_AT_ONCE = 8_192


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
    for first in range(0, rows, ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        _check_values(agent_type, first, observations[part], actions[part], masks[part], active[part])


def _check_values(
    agent_type: TypeSpec,
    first_row: int,
    observations: np.ndarray,
    actions: np.ndarray,
    masks: np.ndarray,
    active: np.ndarray,
) -> None:
    """Check some rows; `first_row` is the number of their first."""

    def refuse(wrong: np.ndarray, what: str) -> None:
        if wrong.any():
            row, agent = np.argwhere(wrong)[0][:2]
            where = f"the first in row {first_row + row}, agent {agent}"
            raise InputError(f"type '{agent_type.name}': {int(wrong.sum())} {what}, {where}")

    refuse(~np.isfinite(observations), "observed values are not finite")
    if not agent_type.discrete:
        refuse(~(np.abs(actions) <= 1), "action values are not within −1..1")
        return
    refuse((actions < 0) | (actions >= agent_type.action_dim), f"actions are not in 0..{agent_type.action_dim - 1}")
    allowed = np.take_along_axis(masks, actions[..., None], axis=2)[..., 0]
    refuse(active & ~allowed, "actions are forbidden by their masks")


def _expect_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise InputError(f"{name}: expected {list(shape)}, found {list(array.shape)}")

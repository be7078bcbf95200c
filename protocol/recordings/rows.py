"""Whose and when each row of a long table is: episode, step, agent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bm3il.protocol.errors import InputError, unknown_name
from bm3il.protocol.recordings.columns import ACTIVE, AGENT, EPISODE, NUMBER, STEP, TYPE
from bm3il.protocol.recordings.names import Names
from bm3il.protocol.recordings.table import Table
from bm3il.protocol.specs import EnvironmentSpec


@dataclass(frozen=True)
class Rows:
    """Of each row of a table: number of the episode, in the order of their first rows; number of the joint step, from
    the beginning of the first episode on; number of the type, and of the agent there.

    lengths: [episodes] joint steps.   labels: [episodes], as the table calls them.
    """

    lengths: np.ndarray
    labels: list[str]
    episode: np.ndarray
    joint: np.ndarray
    kind: np.ndarray
    number: np.ndarray


def rows_of(table: Table, names: Names, spec: EnvironmentSpec, longest: int) -> Rows:
    """Rows may come in any order; every episode begins with the same step, and has no more than `longest`.

    Raises InputError, naming the row, for agents and types that there are not, an agent that is twice in one step,
    steps that are missing, and episodes that are too long.
    """
    texts = table.texts(names.column(EPISODE), "which episode a row belongs to")
    labels, first, index = np.unique(texts, return_index=True, return_inverse=True)
    episode = np.argsort(np.argsort(first))[index]
    ordered = labels[np.argsort(first)].tolist()
    every = np.arange(len(table))
    step = table.numbers(names.column(STEP), "the step of its episode", every, whole=True).astype(np.int64)
    kind, number = _agents(table, names, spec)
    _check_steps(table, ordered, episode, step)
    step -= step.min()
    _check_agents(table, names, spec, episode, np.array(spec.offsets)[kind] + number, step)
    lengths = np.zeros(len(ordered), np.int64)
    np.maximum.at(lengths, episode, step + 1)
    if (late := step >= longest).any():
        row = int(late.argmax())
        raise InputError(
            f"{table.row(row)}: expected at most {spec.episode_length} steps, as an episode of '{spec.name}' has them, "
            f"got {lengths[episode[row]]} of episode '{ordered[episode[row]]}'"
        )
    return Rows(lengths, ordered, episode, (np.cumsum(lengths) - lengths)[episode] + step, kind, number)


def _agents(table: Table, names: Names, spec: EnvironmentSpec) -> tuple[np.ndarray, np.ndarray]:
    """[rows] types and numbers of the agents, by their names or by types and numbers."""
    agent, type_, number = (names.column(name) for name in (AGENT, TYPE, NUMBER))
    counts = np.array([t.count for t in spec.types])
    if agent in table.columns:
        kinds, numbers = _looked_up(table, "agent", agent, names.agents).T
        return kinds, numbers
    if type_ not in table.columns and spec.num_agents > 1 and (spec.num_types > 1 or number not in table.columns):
        table.require(agent, f"whose row it is, as {spec.types[0].name}_0, or '{type_}' and '{number}'")
    kinds = np.zeros(len(table), np.int64)
    if type_ in table.columns:
        kinds = _looked_up(table, "type", type_, {name: (m,) for name, m in names.types.items()})[:, 0]
    if number not in table.columns and (counts == 1).all():
        return kinds, np.zeros_like(kinds)
    found = table.numbers(number, "the number of an agent among those of its type", np.arange(len(table)), whole=True)
    if (wrong := (found < 0) | (found >= counts[kinds])).any():
        row = int(wrong.argmax())
        t = spec.types[kinds[row]]
        raise InputError(f"{table.row(row)}: expected agents 0..{t.count - 1} of '{t.name}', got {found[row]:g}")
    return kinds, found.astype(np.int64)


def _looked_up(table: Table, what: str, column: str, known: Mapping[str, tuple[int, ...]]) -> np.ndarray:
    """[rows, …] what is known of the names in a column."""
    texts = table.texts(column, f"which {what} a row is of")
    unique, first, index = np.unique(texts, return_index=True, return_inverse=True)
    for row in np.sort(first).tolist():
        if texts[row] not in known:
            raise InputError(f"{table.row(row)}: {unknown_name(what, texts[row], known)}")
    return np.array([known[text] for text in unique.tolist()])[index]


def _check_steps(table: Table, labels: list[str], episode: np.ndarray, step: np.ndarray) -> None:
    """Whether each episode has rows of the first step that any has, and of all from there to its last."""
    order = np.lexsort((step, episode))
    begins = np.diff(episode[order], prepend=-1) > 0
    before = np.where(begins, step.min() - 1, np.roll(step[order], 1))
    if (gap := step[order] - before > 1).any():
        at = int(gap.argmax())
        row = int(order[at])
        raise InputError(
            f"{table.row(row)}: expected a row of step {before[at] + 1} in episode '{labels[episode[row]]}' "
            f"before one of step {step[row]}, found none"
        )


def _check_agents(
    table: Table, names: Names, spec: EnvironmentSpec, episode: np.ndarray, agent: np.ndarray, step: np.ndarray
) -> None:
    """Whether each agent has one row in every step from its first to its last."""
    order = np.lexsort((step, agent, episode))
    same = (np.diff(episode[order]) == 0) & (np.diff(agent[order]) == 0)
    passed = np.diff(step[order])
    if not (wrong := same & (passed != 1)).any():
        return
    at = int(wrong.argmax())
    row, before = int(order[at + 1]), int(order[at])
    m = int(np.searchsorted(spec.offsets, agent[row], side="right")) - 1
    who = f"{spec.types[m].name}_{agent[row] - spec.offsets[m]}"
    if passed[at] == 0:
        raise InputError(
            f"{table.row(max(row, before))}: {who} was in this step before, in row {table.line(min(row, before))}"
        )
    raise InputError(
        f"{table.row(row)}: {who} was last seen {passed[at]} steps ago, in row {table.line(before)}; expected a row "
        f"of each step between, with 0 in a column '{names.column(ACTIVE)}' if it was away"
    )

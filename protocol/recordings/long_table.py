"""A recorded table, one row for each agent and step: from CSV, TSV or Parquet to demonstrations.

`docs/recordings.md` describes it by example. Rows may come in any order, since each says whose and when it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.environment import Environment, TellsActions
from bm3il.protocol.errors import InputError
from bm3il.protocol.recordings.columns import (
    ACTION,
    ACTIVE,
    RETURN,
    REWARD,
    action_columns,
    mask_columns,
    observation_columns,
    part_columns,
    part_name,
    plain_columns,
)
from bm3il.protocol.recordings.names import Names
from bm3il.protocol.recordings.positions import retraced, teller
from bm3il.protocol.recordings.recording import Recording
from bm3il.protocol.recordings.rows import Rows, rows_of
from bm3il.protocol.recordings.table import Table
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec

FROM_POSITIONS = f"no column '{ACTION}': what agents saw and did is worked out from where they were"


def read_table(
    path: str | Path, environment: Environment, mapping: Path | None = None
) -> tuple[Demonstrations, list[str]]:
    """Demonstrations of an environment of one copy, and what a person should know of how they were read.

    mapping: a file that says what the table calls things (`recordings.names`).
    Raises InputError, naming file and row, for whatever cannot be meant.
    """
    spec = environment.spec
    written, names = Table(path), Names.read(mapping, spec)
    try:
        # Also of columns that may be left out: who names one means that it is there.
        for (kind, ours), theirs in names.columns.items():
            written.require(theirs, f"'{ours}'" + (f" of '{kind}'" if kind else ""))
    except InputError as error:
        raise InputError(f"{mapping}: {error}") from error
    table = _LongTable(written, names, spec)
    origin, tells = f"imported from {Path(path).name}", teller(environment)
    notes: list[str] = []
    if tells is None or table.has_actions:
        demonstrations = table.recording().demonstrations(spec, origin)
    else:
        try:
            found = retraced(environment, table.positions(tells))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        notes = [FROM_POSITIONS, *found.left_out]
        origin = "; ".join([f"{origin}, positions", *found.left_out])
        demonstrations = Demonstrations.from_trajectories(found.trajectories, spec, origin)
    if unread := table.unread:
        notes.append(f"columns that were not read: {', '.join(unread)}")
    return demonstrations, notes


class _LongTable:
    """What the rows of agents hold, by our names."""

    def __init__(self, table: Table, names: Names, spec: EnvironmentSpec) -> None:
        self._table, self._names, self._spec = table, names, spec

    @property
    def has_actions(self) -> bool:
        return any(self._has(column, t) for t in self._spec.types for column in action_columns(t))

    @property
    def unread(self) -> list[str]:
        """Columns that nobody has asked for."""
        return [column for column in self._table.columns if column not in self._table.read]

    def recording(self) -> Recording:
        rows = rows_of(self._table, self._names, self._spec, self._spec.episode_length)
        steps = int(rows.lengths.sum())
        observations, actions, masks, active, written = [], [], [], [], []
        for m, t in enumerate(self._spec.types):
            mine = self._active_rows(rows, m)
            place, agents = (rows.joint[mine], rows.number[mine]), (steps, t.count)
            observations.append(_spread(self._observations(t, mine), place, agents))
            actions.append(_spread(self._actions(m, mine), place, agents))
            allowed = self._masks(t, mine)
            masks.append(None if allowed is None else _spread(allowed, place, agents))
            active.append(_spread(np.ones(len(mine), bool), place, agents))
            written.append(_spread(mine, place, agents))
        return Recording(
            observations=observations,
            actions=actions,
            active=active,
            action_masks=masks,
            episode_lengths=rows.lengths,
            returns=self._returns(rows),
            place=lambda m, row, agent: self._table.row(written[m][row, agent]),
        )

    def positions(self, tells: TellsActions) -> list[list[np.ndarray]]:
        """Of each episode and type [T+1, X_m, D_m], NaN of who is not there; see `recordings.positions`."""
        rows = rows_of(self._table, self._names, self._spec, self._spec.episode_length + 1)
        if (short := rows.lengths < 2).any():
            label = rows.labels[int(short.argmax())]
            raise InputError(
                f"{self._table.path}: expected where all went after step 1 of episode '{label}', found none"
            )
        steps, ends = int(rows.lengths.sum()), np.cumsum(rows.lengths)[:-1]
        per_type = []
        for m, t in enumerate(self._spec.types):
            mine = self._active_rows(rows, m)
            places = np.full((steps, t.count, len(tells.positions[m])), np.nan)
            places[rows.joint[mine], rows.number[mine]] = self._columns(tells.positions[m], t, "where it is", mine)
            per_type.append(np.split(places, ends))
        return [list(episode) for episode in zip(*per_type, strict=True)]

    def _active_rows(self, rows: Rows, m: int) -> np.ndarray:
        """Rows of the table of the agents of a type that take part in the step."""
        mine, t = np.flatnonzero(rows.kind == m), self._spec.types[m]
        if not self._has(ACTIVE, t):
            return mine
        return mine[self._flags([ACTIVE], t, "whether it takes part", mine)[:, 0]]

    def _observations(self, t: TypeSpec, rows: np.ndarray) -> np.ndarray:
        """[len(rows), O_m] float32."""
        plain, codes = plain_columns(t), {code.first: code for code in t.codes}
        by_name = [*observation_columns(t), *(part_name(code.name) for code in t.codes)]
        if not t.parts or (self._has(plain[0], t) and not any(self._has(column, t) for column in by_name)):
            return _float32(self._columns(plain, t, "what it observes", rows))
        seen = np.zeros((len(rows), t.observation_dim), np.float32)
        first = done = 0
        for part in t.parts:
            end = first + part.width
            code = codes.get(first)
            if code is not None and self._has(part_name(code.name), t):
                done = first + code.size
                seen[:, first:done] = self._one_hot(part_name(code.name), code.size, t, rows)
            elif part.kind == "constant" and not self._has(part_columns(part)[0], t):
                seen[:, first:end] = part.values
            elif first >= done:
                if code is not None and not self._has(part_columns(part)[0], t):
                    self._table.require(self._names.column(part_name(code.name), t), f"what it observes, of '{t.name}'")
                seen[:, first:end] = _float32(self._columns(part_columns(part), t, "what it observes", rows))
            first = end
        return seen

    def _one_hot(self, name: str, size: int, t: TypeSpec, rows: np.ndarray) -> np.ndarray:
        """[len(rows), size] bool, from a code in one column."""
        column, expected = self._names.column(name, t), f"0..{size - 1} or nothing"
        values = self._table.numbers(column, f"{expected}, of '{t.name}'", rows, whole=True, optional=True)
        if (wrong := (values < 0) | (values >= size)).any():
            at = int(wrong.argmax())
            raise InputError(f"{self._table.row(rows[at])}: expected {expected} in '{column}', got {values[at]:g}")
        return values[:, None] == np.arange(size)

    def _actions(self, m: int, rows: np.ndarray) -> np.ndarray:
        """[len(rows)] int64, or [len(rows), A_m] float32."""
        t = self._spec.types[m]
        if not t.discrete:
            return _float32(self._columns(action_columns(t), t, "what it did", rows))
        column, why = self._names.column(ACTION, t), f"what it did, of '{t.name}'"
        words = self._names.actions.get(m)
        return self._table.numbers(column, why, rows, whole=True, words=words).astype(np.int64)

    def _masks(self, t: TypeSpec, rows: np.ndarray) -> np.ndarray | None:
        """[len(rows), A_m] bool; None if nobody wrote any down."""
        columns = mask_columns(t) if t.discrete else []
        if all(self._table.is_empty(self._names.column(column, t), rows) for column in columns):
            return None
        return self._flags(columns, t, "whether it may do that", rows)

    def _returns(self, rows: Rows) -> np.ndarray:
        """[episodes, N]: what is written, or the sums of rewards; NaN where neither is."""
        returns = np.zeros((len(rows.lengths), self._spec.num_agents))
        for m, t in enumerate(self._spec.types):
            mine = self._active_rows(rows, m)
            whose = rows.episode[mine], self._spec.offsets[m] + rows.number[mine]
            if self._has(RETURN, t):
                column = self._names.column(RETURN, t)
                values = self._table.numbers(column, "the return of its episode", mine, optional=True)
                returns[whose] = values
                if (differs := ~np.isclose(returns[whose], values, equal_nan=True)).any():
                    at = int(differs.argmax())
                    raise InputError(
                        f"{self._table.row(mine[at])}: expected the same '{column}' in all rows of an agent in an "
                        f"episode, got {values[at]:g} and {returns[whose][at]:g}"
                    )
            elif self._has(REWARD, t):
                column = self._names.column(REWARD, t)
                # Not +=, which would add one row of each agent. A reward that is missing makes the return NaN, unknown.
                np.add.at(returns, whose, self._table.numbers(column, "its reward", mine, optional=True))
            else:
                returns[:, self._spec.agents(m)] = np.nan
        return returns

    def _columns(self, names: Sequence[str], t: TypeSpec, why: str, rows: np.ndarray) -> np.ndarray:
        """[len(rows), len(names)] float64."""
        whose = f"{why}, of '{t.name}'"
        return np.stack([self._table.numbers(self._names.column(name, t), whose, rows) for name in names], axis=1)

    def _flags(self, names: Sequence[str], t: TypeSpec, why: str, rows: np.ndarray) -> np.ndarray:
        """[len(rows), len(names)] bool. Raises InputError for what is neither 0 nor 1: a −1, say, may mean either."""
        values = self._columns(names, t, why, rows)
        if (wrong := (values != 0) & (values != 1)).any():
            row, column = np.argwhere(wrong)[0]
            where = f"'{self._names.column(names[column], t)}' ({why}, of '{t.name}')"
            raise InputError(f"{self._table.row(rows[row])}: expected 0 or 1 in {where}, got {values[row, column]:g}")
        return values == 1

    def _has(self, name: str, t: TypeSpec) -> bool:
        return self._names.column(name, t) in self._table.columns


def _spread(values: np.ndarray, place: tuple[np.ndarray, np.ndarray], agents: tuple[int, int]) -> np.ndarray:
    """Values [len(place), …] at their places among [rows, X_m], zeros elsewhere."""
    array = np.zeros((*agents, *values.shape[1:]), values.dtype)
    array[place] = values
    return array


def _float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # what overflows is found to be infinite
        return values.astype(np.float32)
